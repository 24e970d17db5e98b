"""Logits in base 2, for kernels whose hardware has ``exp2``: a softmax of them needs no factor for each weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin.types import SATURATED, AttentionRequest

__all__ = ["LOG2_E", "Scores", "base2_logits", "base2_scores", "finish_sums", "rising"]

LOG2_E = math.log2(math.e)
LARGEST = float(np.finfo(np.float32).max)

Scores = tuple[jax.Array, float | jax.Array]
"""Logits as two factors: an array, and a number or what broadcasts against it. With them ``logit - maximum`` is one
multiplication and addition."""


def base2_logits(request: AttentionRequest, products: jax.Array, k_scale: jax.Array | None) -> jax.Array:
    """Logits times :data:`LOG2_E`, from products of queries and keys.

    ``k_scale`` is a further factor of the keys, which broadcasts against the products.
    """
    scores, factor = base2_scores(request, products, k_scale)
    return scores * factor


def base2_scores(
    request: AttentionRequest,
    products: jax.Array,
    k_scale: jax.Array | None,
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> Scores:
    """:func:`base2_logits` as :data:`Scores`, with an array of the products' shape."""

    def times_scale(number: float) -> float | jax.Array:
        return number if k_scale is None else k_scale * number

    scale, cap = request.logits_scale, request.options.soft_cap
    if cap is None:
        return products, times_scale(scale * LOG2_E)
    if request.scale_over_cap is None:
        scaled = jnp.clip(products * times_scale(scale), -SATURATED * cap, SATURATED * cap) * (1 / cap)
    else:  # in one step, so that a soft cap costs no further multiplication
        scaled = products * times_scale(request.scale_over_cap)
    return tanh(scaled), cap * LOG2_E


def rising(scores: Scores) -> tuple[jax.Array, float]:
    """Scores whose largest number has the largest logit: with another factor it need not."""
    array, factor = scores
    return (array, factor) if isinstance(factor, float) and factor > 0 else (array * factor, 1.0)


def finish_sums(
    request: AttentionRequest,
    maximum: jax.Array,
    total: jax.Array,
    highest: jax.Array,
    sink: jax.Array | None,
    finite: Callable[[jax.Array], jax.Array] = lambda maximum: maximum,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is left of a softmax over all keys: a sink is one more key, without a value.

    Args:
        request: the call.
        maximum: the largest logit in base 2.
        total: the sum of ``2 ** (logit - maximum)``; 0 where nothing was seen.
        highest: the largest logit in base e.
        sink: in base e, or None.
        finite: what is subtracted in a maximum's place, where that may be -inf: infinity minus itself would be NaN.

    Returns:
        The factor of the sum of weighted values, which makes it the output; and ``highest`` and ``total`` with the
        sink, of which the logsumexp is made.
    """
    kept = jnp.ones_like(total)
    if sink is not None:
        logit = jnp.minimum(sink * LOG2_E, LARGEST)
        with_sink = jnp.maximum(maximum, logit)
        highest = jnp.where(with_sink == logit, sink, highest)
        reference = finite(with_sink)
        kept = jnp.exp2(maximum - reference)
        total = total * kept + jnp.exp2(logit - reference)
    return kept * request.v_scale / jnp.where(total == 0, 1.0, total), highest, total
