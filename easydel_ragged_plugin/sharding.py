"""One shard_map wrapper for both operations.

Query heads and kv heads are split over the same mesh axes (tensor parallel). Pages may be split over another axis
(data parallel): then each shard owns a contiguous part of the rows and of the pages, and page ids of the block
table count through all shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .layout import PageLayout
from .types import AttentionRequest, Operands

__all__ = ["Shards", "local_request", "plan", "run"]

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How one call is split. Without axes it is not split at all.

    Attributes:
        mesh: the device mesh; None with no axes.
        head_axes: mesh axes over query heads and kv heads.
        query_only_axes: mesh axes over query heads alone; the one kv head is on every shard.
        page_axes: mesh axes over pages and rows.
    """

    mesh: Mesh | None = None
    head_axes: Axes = ()
    query_only_axes: Axes = ()
    page_axes: Axes = ()

    def size(self, axes: Axes) -> int:
        """Number of shards over ``axes``."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh is not None else 1

    @property
    def is_single(self) -> bool:
        """Whether the call runs unsplit."""
        return not (self.head_axes or self.query_only_axes or self.page_axes)


def axes_of(spec: PartitionSpec | None, dimension: int, mesh: Mesh) -> Axes:
    """Mesh axes of more than one device that split ``dimension``."""
    entry = spec[dimension] if spec is not None and len(spec) > dimension else None
    names = entry if isinstance(entry, tuple) else (entry,) if entry is not None else ()
    return tuple(name for name in names if mesh.shape[name] > 1)


def plan(
    request: AttentionRequest,
    operands: Operands,
    mesh: Mesh | None,
    query_spec: PartitionSpec | None,
    page_spec: PartitionSpec | None,
) -> Shards:
    """How to split ``request``, from the partition specs of queries and pages.

    Heads are split over the axes of the queries when kv heads divide among them and a shard of the pages holds
    whole heads. One kv head is kept on every shard, and query heads alone are split. Otherwise heads are not split.

    Raises:
        ValueError: rows or pages do not divide among the shards of the page axis.
    """
    if mesh is None or mesh.size == 1:
        return Shards()
    page_axes = axes_of(page_spec, 0, mesh)
    head_axes = axes_of(query_spec, 1, mesh)
    shards = Shards(mesh, page_axes=page_axes)
    over_pages, over_heads = shards.size(page_axes), shards.size(head_axes)
    for what, count in (("rows of the block table", request.num_rows), ("pages", request.num_pages)):
        if count % over_pages:
            raise ValueError(
                f"{count} {what} do not divide among {over_pages} shards of mesh axes {page_axes}. "
                f"Choose a number that {over_pages} divides."
            )
    if not head_axes or request.num_q_heads % over_heads:
        return shards
    layout = request.layout
    whole = request.num_kv_heads % over_heads == 0 and operands.pages.shape[2] % over_heads == 0
    whole &= layout.token_stride == request.num_kv_heads * layout.head_stride  # padding heads would shift the split
    if whole and axes_of(page_spec, 2, mesh) == head_axes:
        return dataclasses.replace(shards, head_axes=head_axes)
    if request.num_kv_heads == 1:
        return dataclasses.replace(shards, query_only_axes=head_axes)
    return shards


def local_request(request: AttentionRequest, pages_shape: tuple[int, ...], shards: Shards) -> AttentionRequest:
    """The request as one shard sees it."""
    if shards.is_single:
        return request
    over_heads, over_pages = shards.size(shards.head_axes), shards.size(shards.page_axes)
    num_kv_heads = request.num_kv_heads // over_heads
    shape = (pages_shape[0] // over_pages, pages_shape[1], pages_shape[2] // over_heads, *pages_shape[3:])
    return dataclasses.replace(
        request,
        num_q_heads=request.num_q_heads // (over_heads * shards.size(shards.query_only_axes)),
        num_kv_heads=num_kv_heads,
        num_rows=request.num_rows // over_pages,
        num_pages=shape[0],
        layout=PageLayout.of(request.version, shape, num_kv_heads, request.head_dim, request.cache_dtype),
    )


def run(
    forward: Callable[[Operands], tuple[jax.Array, jax.Array]], operands: Operands, shards: Shards
) -> tuple[jax.Array, jax.Array]:
    """``forward`` on each shard of ``operands``; output and pages come back as they went in."""
    if shards.is_single:
        return forward(operands)
    q_heads = (shards.head_axes + shards.query_only_axes) or None
    kv_heads, page_axes = shards.head_axes or None, shards.page_axes or None
    queries, keys = PartitionSpec(None, q_heads, None), PartitionSpec(None, kv_heads, None)
    pages = PartitionSpec(page_axes, None, kv_heads, *[None] * (operands.pages.ndim - 3))
    specs: Any = {
        "queries": queries,
        "keys": keys if operands.keys is not None else None,
        "values": keys if operands.values is not None else None,
        "pages": pages,
        "context_lens": PartitionSpec(page_axes),
        "block_tables": PartitionSpec(page_axes, None),
        "query_start_loc": PartitionSpec(),
        "distribution": PartitionSpec(),
        "sinks": PartitionSpec(q_heads) if operands.sinks is not None else None,
    }
    specs = Operands(**specs)

    def body(local: Operands) -> tuple[jax.Array, jax.Array]:
        if shards.page_axes:
            local = local_rows(local, shards)
        output, new_pages = forward(local)
        if shards.page_axes:  # each token is one shard's; all others have zeros for it
            output = jax.lax.psum(output, shards.page_axes)
        return output, new_pages

    return jax.shard_map(body, mesh=shards.mesh, in_specs=(specs,), out_specs=(queries, pages), check_vma=False)(
        operands
    )


def local_rows(operands: Operands, shards: Shards) -> Operands:
    """Metadata of this shard's rows: page ids become local, tokens keep their global places.

    An id of another shard's page falls outside the local pages; kernels never touch such an entry.
    """
    shard = jax.lax.axis_index(shards.page_axes)
    num_rows, num_pages = operands.context_lens.shape[0], operands.pages.shape[0]
    first_row = (shard * num_rows).astype(jnp.int32)
    start_loc = jax.lax.dynamic_slice_in_dim(operands.query_start_loc, first_row, num_rows + 1)
    return operands._replace(
        block_tables=operands.block_tables - (shard * num_pages).astype(jnp.int32),
        query_start_loc=start_loc,
        distribution=jnp.clip(operands.distribution - first_row, 0, num_rows),
    )
