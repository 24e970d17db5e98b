"""The online softmax of both parts of the portable kernel and of TurboQuant caches, and what a loop over pages needs.

See FlashAttention (Dao et al., 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from easydel_ragged_plugin.types import AttentionRequest

__all__ = ["Softmax", "initial_softmax", "logits_of", "pin", "rescale", "weights_of"]


class Softmax(NamedTuple):
    """Running state of an online softmax; ``maximum`` and ``total`` lack the last axis of ``weighted``."""

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array


def pin(pages: Any, trip: jax.Array) -> tuple[Any, jax.Array]:
    """The same values, tied to the trip of a loop.

    Without it XLA moves the conversion of the cache's dtype out of the loop and converts the whole cache.
    """
    return lax.optimization_barrier((pages, trip))


def logits_of(request: AttentionRequest, products: jax.Array) -> jax.Array:
    """Scale and cap the products of queries and keys."""
    scale = request.softmax_scale * (request.q_scale or 1.0) * (request.k_scale or 1.0)
    logits = products * jnp.asarray(scale, products.dtype)
    if request.logits_soft_cap is not None:
        logits = request.logits_soft_cap * jnp.tanh(logits / request.logits_soft_cap)
    return logits


def weights_of(logits: jax.Array, visible: jax.Array, maximum: jax.Array) -> jax.Array:
    """``exp(logits - maximum)`` where visible, else 0; ``maximum`` is -inf where nothing has been seen."""
    reference = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    return jnp.where(visible, jnp.exp(logits - reference[..., None]), 0.0)


def rescale(old: jax.Array, new: jax.Array) -> jax.Array:
    """``exp(old - new)`` with the limit 0 where nothing had been seen."""
    return jnp.where(jnp.isneginf(old), 0.0, jnp.exp(old - jnp.where(jnp.isneginf(new), 0.0, new)))


def initial_softmax(
    request: AttentionRequest, sinks: jax.Array | None, leading: tuple[int, ...], dtype: jnp.dtype
) -> Softmax:
    """State before any key, ``[*leading, kv_heads, group]``: a sink counts as one key without a value."""
    heads = (request.num_kv_heads, request.group_size)
    if sinks is None:
        maximum, total = jnp.full((*leading, *heads), -jnp.inf, dtype), jnp.zeros((*leading, *heads), dtype)
    else:
        maximum = jnp.broadcast_to(sinks.astype(dtype).reshape(heads), (*leading, *heads))
        total = jnp.ones((*leading, *heads), dtype)
    return Softmax(maximum, total, jnp.zeros((*leading, *heads, request.head_dim), dtype))
