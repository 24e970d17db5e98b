"""v3's update: new keys and values into their slots, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.types import AttentionRequest
from easydel_ragged_plugin.varying import result_type

from .blocks import broadcast_along, iota, row_has_pages
from .tiles import power_of_two
from .work import Column

__all__ = ["update_pages"]

WARPS = 4


def ragged_update(request: AttentionRequest, tokens: int, *refs: Any) -> None:
    """Grid ``(kv heads of a slot, tiles)``: the keys and values of one head of a few tokens of a row.

    Only slots of live tokens are stored to. Their padding (lanes past head_dim, heads past kv_heads) becomes zero, as
    in the TPU kernel.
    """
    work, keys, values, tables, _, pages = refs
    layout = request.layout
    head, part = pl.program_id(0), pl.program_id(1)
    row, start, count, context = (work[part, int(column)] for column in Column if column <= Column.CONTEXT)
    has_pages = row_has_pages(request, tables, row, context, count)

    offset = work[part, int(Column.FIRST)] + iota(tokens)
    live = has_pages & (offset < count)
    position = jnp.where(live, context - count + offset, 0)
    entry = lax.div(position, jnp.int32(layout.page_size))
    slot = lax.rem(position, jnp.int32(layout.page_size))
    page = pltriton.load(tables.at[jnp.broadcast_to(row, entry.shape), entry], mask=live, other=0)
    page = jnp.where(live, page, request.num_pages)  # past the end: the interpreter drops it, a GPU's mask hides it

    shape = (tokens, power_of_two(layout.padded_head_dim))
    lane = broadcast_along(iota(shape[1]), 1, shape)
    token, slots, pages_at, mask = (broadcast_along(each, 0, shape) for each in (start + offset, slot, page, live))
    real = mask & (lane < request.head_dim) & (head < request.num_kv_heads)
    source_head = broadcast_along(jnp.minimum(head, request.num_kv_heads - 1), 0, shape)
    for source, at in ((keys, 0), (values, layout.value_offset)):
        new = pltriton.load(source.at[token, source_head, lane], mask=real, other=0.0)
        element = broadcast_along(head * layout.head_stride + at, 0, shape) + lane
        pltriton.store(pages.at[pages_at, slots, element], new, mask=mask & (lane < layout.padded_head_dim))


def update_pages(
    request: AttentionRequest,
    tokens: int,
    work: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    pages: jax.Array,
    interpret: bool,
) -> jax.Array:
    """``pages [pages, page_size, slot]`` after the update, in the same memory; keys and values have their dtype."""
    heads = request.layout.token_stride // request.layout.head_stride
    return pl.pallas_call(
        functools.partial(ragged_update, request, tokens),
        grid=(heads, work.shape[0]),
        out_shape=result_type(pages.shape, pages.dtype, (work, keys, values, tables, pages)),
        input_output_aliases={4: 0},
        compiler_params=pltriton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(work, keys, values, tables, pages)
