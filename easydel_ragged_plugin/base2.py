"""Logits in base 2, for kernels whose hardware has ``exp2``: a softmax of them needs no factor for each weight."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.types import SATURATED, AttentionRequest

__all__ = ["LOG2_E", "base2_logits", "base2_scores"]

LOG2_E = math.log2(math.e)


def base2_logits(request: AttentionRequest, products: jax.Array, k_scale: jax.Array | None) -> jax.Array:
    """Logits times :data:`LOG2_E`, from products of queries and keys.

    ``k_scale`` is a further factor of the keys, which broadcasts against the products.
    """
    scores, factor = base2_scores(request, products, k_scale)
    return scores * factor


def base2_scores(
    request: AttentionRequest, products: jax.Array, k_scale: jax.Array | None
) -> tuple[jax.Array, float | jax.Array]:
    """:func:`base2_logits` as two factors: an array of the products' shape, and a number or an array of ``k_scale``'s.

    With them ``logit - maximum`` is one multiplication and addition.
    """

    def times_scale(number: float) -> float | jax.Array:
        return number if k_scale is None else k_scale * number

    scale, cap = request.logits_scale, request.options.soft_cap
    if cap is None:
        return products, times_scale(scale * LOG2_E)
    if request.scale_over_cap is None:
        scaled = jnp.clip(products * times_scale(scale), -SATURATED * cap, SATURATED * cap) * (1 / cap)
    else:  # in one step, so that a soft cap costs no further multiplication
        scaled = products * times_scale(request.scale_over_cap)
    return jnp.tanh(scaled), cap * LOG2_E
