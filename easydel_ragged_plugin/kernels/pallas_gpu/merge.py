"""The merge of a split context's partial results."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.types import AttentionRequest

from .blocks import broadcast_along, iota
from .call import Extras, Results, launch, store_results
from .softmax import Softmax, finish
from .tiles import power_of_two
from .work import Column

__all__ = ["merge_parts"]

MERGED_PARTS = 32
"""Partial results that one step reads."""

WARPS = 4


def ragged_merge(request: AttentionRequest, *refs: Any) -> None:
    """Grid ``(q_heads, rows of several parts)``: one head of one row, over its few tokens."""
    work, maxima, totals, weighted, *rest = refs
    out = rest[-2:] if request.return_lse else rest[-1:]
    head, index = pl.program_id(0), pl.program_id(1)
    start, count, partial, parts = (
        work[index, int(column)] for column in (Column.START, Column.TOKENS, Column.PARTIAL, Column.PARTS)
    )
    extras = Extras.of_refs(request, rest)
    _, v_scale = extras.scales_of(lax.div(head, jnp.int32(request.group_size)))
    lanes = power_of_two(request.head_dim)
    shape = (MERGED_PARTS, lanes)
    lane = iota(lanes)

    def token(offset: jax.Array, carry: jax.Array) -> jax.Array:
        def step(block: jax.Array, state: Softmax) -> Softmax:
            part = block * MERGED_PARTS + iota(MERGED_PARTS)
            there = part < parts
            heads, offsets = (jnp.broadcast_to(each, part.shape) for each in (head, offset))
            at = (heads, offsets, partial + part)
            part_maximum = pltriton.load(maxima.at[at], mask=there, other=-jnp.inf)
            part_total = pltriton.load(totals.at[at], mask=there, other=0.0)
            wide = (*(broadcast_along(each, 0, shape) for each in at), broadcast_along(lane, 1, shape))
            part_weighted = pltriton.load(weighted.at[wide], mask=broadcast_along(there, 0, shape), other=0.0)
            maximum = jnp.maximum(state.maximum, jnp.max(part_maximum))
            reference = jnp.where(maximum == -jnp.inf, 0.0, maximum)
            factor = jnp.exp2(part_maximum - reference)
            kept = jnp.exp2(state.maximum - reference)
            return Softmax(
                maximum,
                state.total * kept + jnp.sum(part_total * factor),
                state.weighted * kept + jnp.sum(part_weighted * factor[:, None], axis=0),
            )

        nothing = Softmax(jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.zeros((lanes,), jnp.float32))
        steps = lax.div(parts + (MERGED_PARTS - 1), jnp.int32(MERGED_PARTS))
        state = lax.fori_loop(0, steps, step, nothing)
        sink = None if extras.sinks is None else extras.sinks[head].reshape(1)
        state = Softmax(state.maximum.reshape(1), state.total.reshape(1), state.weighted.reshape(1, lanes))
        at = ((start + offset).reshape(1), head.reshape(1))
        store_results(request, out, finish(request, state, sink, v_scale), *at, jnp.ones((1,), bool))
        return carry

    lax.fori_loop(0, count, token, jnp.int32(0))


def merge_parts(
    request: AttentionRequest,
    work: jax.Array,
    partials: tuple[jax.Array, ...],
    extras: Extras,
    results: Results,
    interpret: bool,
) -> Results:
    """The results, with the rows in ``work`` made from their partial results."""
    results, _ = launch(
        functools.partial(ragged_merge, request),
        (request.num_q_heads, work.shape[0]),
        WARPS,
        1,
        interpret,
        (work, *partials, *extras.arrays()),
        results,
    )
    return results
