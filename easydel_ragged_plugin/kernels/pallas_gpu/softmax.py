"""The online softmax of FlashAttention (Dao et al., 2022, arXiv 2205.14135), in base 2 and float32."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.base2 import LOG2_E, Scores, finish_sums, rising
from easydel_ragged_plugin.types import AttentionRequest

from .blocks import broadcast_along

__all__ = ["Exp2", "Softmax", "add_block", "empty_softmax", "exp2", "exp2_of_nvidia", "finish", "is_spoiled"]


class Softmax(NamedTuple):
    """Running state of an online softmax, float32: ``[queries]``, ``[queries]`` and ``[queries, lanes]``.

    ``maximum`` is -inf and the others are zero where nothing was seen.
    """

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array


def empty_softmax(queries: int, lanes: int) -> Softmax:
    """The state before any key."""
    return Softmax(
        jnp.full((queries,), -jnp.inf, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
        jnp.zeros((queries, lanes), jnp.float32),
    )


Exp2 = Callable[[jax.Array, float, jax.Array], jax.Array]
"""``2 ** (array * factor - reference)``, where ``reference`` has the array's shape."""


def exp2(array: jax.Array, factor: float, reference: jax.Array) -> jax.Array:
    """:data:`Exp2` in JAX."""
    return jnp.exp2(array * factor - reference)


def exp2_of_nvidia(array: jax.Array, factor: float, reference: jax.Array) -> jax.Array:
    """:data:`Exp2` in two instructions of an NVIDIA GPU, to within 2**-22 of it; less than 2**-126 becomes 0.

    From :func:`exp2` Triton makes six there: it rounds the product, and keeps numbers that are as small as that.
    """
    (bits,) = struct.unpack("<I", struct.pack("<f", factor))
    (found,) = pltriton.elementwise_inline_asm(
        f"{{ .reg .f32 power; fma.rn.f32 power, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, power; }}",
        args=[array, -reference],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(array.shape, array.dtype)],
    )
    return found


def finite(maximum: jax.Array) -> jax.Array:
    """What is subtracted from logits in place of their maximum: -inf - -inf would be NaN."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def add_block(
    request: AttentionRequest,
    state: Softmax,
    scores: Scores,
    visible: jax.Array,
    values: jax.Array,
    multiply: Callable[..., jax.Array],
    exp2: Exp2 = exp2,
) -> Softmax:
    """``state`` with a block of keys.

    Args:
        request: the call.
        state: that of the blocks before.
        scores: ``[queries, keys]`` and a factor, of which the product is the logits: see
            :func:`~easydel_ragged_plugin.base2.base2_scores`.
        visible: ``[queries, keys]``, or what broadcasts to it: whether a query sees a key.
        values: ``[keys, lanes]``.
        multiply: ``multiply(weights, values, 0)`` is the product of weights and values.
        exp2: how weights are computed.
    """
    array, factor = rising(scores)
    array = jnp.where(visible, array, -jnp.inf)
    maximum = jnp.maximum(state.maximum, jnp.max(array, axis=1) * factor)
    reference = finite(maximum)
    weights = exp2(array, factor, broadcast_along(reference, 0, array.shape))
    kept = exp2(state.maximum, 1.0, reference)
    return Softmax(
        maximum,
        state.total * kept + jnp.sum(weights, axis=1),
        state.weighted * kept[:, None] + multiply(weights.astype(request.compute_dtype), values, 0),
    )


def is_spoiled(state: Softmax) -> jax.Array:
    """Whether the sums of a tile hold a NaN, which never leaves them.

    A weight of 0 times a value that is not finite is NaN, also for a query that does not see the value. Such a tile is
    not stored: ``attend.attend_singly`` takes its queries one by one.
    """
    return jnp.max(jnp.where(state.weighted == state.weighted, 0, 1)) > 0


def finish(
    request: AttentionRequest, state: Softmax, sink: jax.Array | None, v_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Output and logsumexp of a finished softmax; no logsumexp where it is not requested.

    A sink is one more key, without a value. Where nothing was seen the output is zero and the logsumexp -inf.
    ``v_scale`` is a further factor of the output.
    """
    highest = state.maximum / LOG2_E
    factor, highest, total = finish_sums(request, state.maximum, state.total, highest, sink, finite)
    factor = factor if v_scale is None else factor * v_scale
    output = (state.weighted * factor[:, None]).astype(request.query_dtype)
    if not request.return_lse:
        return output, None
    # A row that lacks a page saw nothing, and its sinks are no result.
    lse = jnp.where(state.total == 0, -jnp.inf, highest + jnp.log2(total) / LOG2_E)
    return output, lse
