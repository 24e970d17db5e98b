"""The online softmax of FlashAttention (Dao et al., 2022, arXiv 2205.14135), in base 2 and float32, as a warpgroup
holds it in registers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from easydel_ragged_plugin.base2 import LOG2_E, Scores, base2_scores, finish_sums, rising
from easydel_ragged_plugin.types import AttentionRequest

from .sizes import QUERIES

__all__ = ["ROW", "State", "empty", "finish", "scores_of", "spread", "with_weights"]

LOWEST = float(np.finfo(np.float32).min)
"""The maximum of no logits: finite, so that nothing is infinity minus itself."""

ROW = plgpu.Layout.WGMMA.reduce(1)
"""How the registers of a warpgroup hold one number for each query."""


class State(NamedTuple):
    """Running state, float32: ``[64, head_dim]``, ``[64]`` and ``[64]``."""

    weighted: jax.Array
    maximum: jax.Array
    total: jax.Array


def empty(request: AttentionRequest) -> State:
    """The state before any key."""
    return State(
        plgpu.layout_cast(jnp.zeros((QUERIES, request.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((QUERIES,), LOWEST, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((QUERIES,), jnp.float32), ROW),
    )


def spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number for each query, all over its row."""
    return lax.broadcast_in_dim(rows, shape, (0,))


def tanh(array: jax.Array) -> jax.Array:
    """It is 1 - 2 / (exp(2x) + 1). The hardware's own one errs by 2**-11."""
    reciprocal_root = lax.rsqrt(jnp.exp2(array * (2 * LOG2_E)) + 1.0)
    return 1.0 - 2.0 * reciprocal_root * reciprocal_root


def scores_of(request: AttentionRequest, products: jax.Array) -> Scores:
    """Logits of products of queries and keys."""
    return rising(base2_scores(request, products, None, tanh))


def with_weights(scores: Scores, state: State) -> tuple[State, jax.Array]:
    """``state`` for the maximum of more keys, and their weights, which are in none of its sums yet."""
    array, factor = scores
    maximum = jnp.maximum(state.maximum, array.max(axis=1) * factor)
    kept = jnp.exp2(state.maximum - maximum)
    weights = jnp.exp2(array * factor - spread(maximum, array.shape))
    return State(state.weighted * spread(kept, state.weighted.shape), maximum, state.total * kept), weights


def finish(request: AttentionRequest, state: State, sink: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output ``[64, head_dim]``, float32, and logsumexp of a finished softmax; the latter is NaN for a query whose sums
    hold one. A sink is one more key, without a value. Where nothing was seen: zeros, and -inf."""
    highest = state.maximum * (1 / LOG2_E)
    factor, highest, total = finish_sums(request, state.maximum, state.total, highest, sink)
    summed = state.weighted.sum(axis=1)
    lse = jnp.where(state.total == 0, -jnp.inf, highest + jnp.log(total))
    lse = jnp.where(summed == summed, lse, jnp.nan)
    return state.weighted * spread(factor, state.weighted.shape), lse
