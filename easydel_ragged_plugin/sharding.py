"""One shard_map wrapper for both operations.

Query heads and kv heads are split over the same mesh axes (tensor parallel). Pages may be split over another axis
(data parallel): then each shard has a contiguous part of the rows and of the pages, and page ids of the block table
count through all shards. Pages are not moved. The collectives of a call are those that combine the tokens of all
data-parallel shards: a sum of the output, and a maximum of the logsumexp. Where heads can't be split, every shard
computes all of them, and a warning is logged once.

Types of arrays hold how they are split over the explicit axes of a mesh (``jax.sharding.AxisType.Explicit``, what
``jax.make_mesh`` makes since JAX 0.9). No kernel sees such types: ``shard_map`` is around every call that has them, and
its operands are resharded for it. Arrays that are sharded explicitly need no ``mesh=``: their types hold mesh and
specs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from .layout import Version
from .select import warn_once
from .types import Attended, AttentionRequest, Distribution, Operands

__all__ = ["Shards", "is_explicit", "local_request", "plan", "run"]

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How one call is split; not at all where there are no axes.

    Attributes:
        mesh: the device mesh; None with no axes.
        head_axes: mesh axes over query heads and kv heads.
        query_only_axes: mesh axes over query heads alone; the one kv head is on every shard.
        page_axes: mesh axes over pages and rows.
    """

    mesh: Mesh | AbstractMesh | None = None
    head_axes: Axes = ()
    query_only_axes: Axes = ()
    page_axes: Axes = ()

    def size(self, axes: Axes) -> int:
        """Number of shards over ``axes``."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh is not None else 1

    @property
    def is_single(self) -> bool:
        """Whether the call runs unsplit, with no types of shards for a kernel to meet."""
        return not (self.head_axes or self.query_only_axes or self.page_axes or is_explicit(self.mesh))


def is_explicit(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether types of arrays hold how they are split over an axis of ``mesh``."""
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def explicit_mesh(operands: Operands) -> AbstractMesh | None:
    """The mesh in the types of ``operands``, or None where no axis of it is explicit."""
    for leaf in jax.tree.leaves(operands):
        mesh = jax.typeof(leaf).sharding.mesh
        if is_explicit(mesh):
            return mesh
    return None


def with_types(
    operands: Operands, mesh: Mesh | AbstractMesh | None, specs: tuple[PartitionSpec | None, PartitionSpec | None]
) -> tuple[Mesh | AbstractMesh | None, tuple[PartitionSpec | None, PartitionSpec | None]]:
    """Mesh and specs of queries and pages: those of the call, or else those that the operands' types hold."""
    found = explicit_mesh(operands)
    if found is None:
        return mesh, specs
    if mesh is None:
        typed = (operands.queries, jax.tree.leaves(operands.pages)[0])
        return found, tuple(jax.typeof(each).sharding.spec for each in typed)
    given = mesh.abstract_mesh
    if described(given) != described(found):
        raise ValueError(
            f"mesh: got {described(given)}, and arrays that are sharded explicitly over {described(found)}. Pass their "
            "mesh, or leave mesh= out, or move the arrays with jax.device_put."
        )
    return mesh, specs


def described(mesh: AbstractMesh) -> str:
    """The axes of a mesh for messages."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return "axes " + ", ".join(f"{name}={size} ({kind.name})" for name, size, kind in axes)


def resharded(operands: Operands, specs: Operands, mesh: Mesh | AbstractMesh) -> Operands:
    """The operands, split over the explicit axes of ``mesh`` as ``specs`` say. An array that is so already stays."""
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit}

    def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        kept = (tuple(name for name in axes_of_entry(entry) if name in explicit) for entry in spec)
        return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec(*(names or None for names in kept))))

    return jax.tree.map(one, operands, specs)


def specs_of(
    version: Version, mesh: Mesh | AbstractMesh | None, in_specs: tuple[PartitionSpec | None, ...] | None
) -> tuple[PartitionSpec | None, PartitionSpec | None]:
    """Partition specs of queries and pages."""
    if mesh is None:
        if in_specs is not None:
            raise ValueError("in_specs: got specs without a mesh. Pass mesh= as well.")
        return None, None
    wanted = (6, 7) if version == "v2" else (8, 9)
    if in_specs is None or len(in_specs) not in wanted:
        got = "None" if in_specs is None else f"{len(in_specs)} specs"
        raise ValueError(f"in_specs: got {got}, wanted one for each of the {wanted[1]} positional arguments, in order.")
    return in_specs[0], in_specs[1 if version == "v2" else 3]


def axes_of(spec: PartitionSpec | None, dimension: int, mesh: Mesh | AbstractMesh) -> Axes:
    """Mesh axes of more than one device that split ``dimension``."""
    entry = spec[dimension] if spec is not None and len(spec) > dimension else None
    return tuple(name for name in axes_of_entry(entry) if mesh.shape[name] > 1)


def axes_of_entry(entry: Any) -> Axes:
    """The names of one entry of a spec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry is not None else ()


def plan(
    request: AttentionRequest,
    operands: Operands,
    mesh: Mesh | AbstractMesh | None,
    in_specs: tuple[PartitionSpec | None, ...] | None,
) -> Shards:
    """How to split ``request``, from the partition specs of the public function's positional arguments.

    Heads are split over the axes of the queries when kv heads divide among them and a shard of the pages holds
    whole heads. With one kv head, every shard has it, and only query heads are split. Otherwise heads are not split,
    and a warning in the log has the reason. Pages that are split in a way that the call can't use are gathered by JAX
    on each call; the warning says so.

    Raises:
        ValueError: specs without a mesh or not one for each argument; or rows or pages do not divide among the shards
            of the page axis.
    """
    mesh, (query_spec, page_spec) = with_types(operands, mesh, specs_of(request.version, mesh, in_specs))
    if mesh is None or (mesh.size == 1 and not is_explicit(mesh)):
        return Shards()
    page_axes = axes_of(page_spec, 0, mesh)
    head_axes, stored_axes = axes_of(query_spec, 1, mesh), axes_of(page_spec, 2, mesh)
    shards = Shards(mesh, page_axes=page_axes)
    over_pages = shards.size(page_axes)
    for what, count in (("rows of the block table", request.num_rows), ("pages", request.num_pages)):
        if count % over_pages:
            raise ValueError(
                f"{count} {what} do not divide among {over_pages} shards of mesh axes {page_axes}. "
                f"Choose a number that {over_pages} divides."
            )
    if not head_axes and not stored_axes:
        return shards
    reason = why_not_heads(request, operands, shards, head_axes, stored_axes)
    if reason is None:
        return dataclasses.replace(shards, head_axes=head_axes)
    gathered = f"; its pages are split over {stored_axes} and gathered on every call" if stored_axes else ""
    if request.num_kv_heads == 1 and head_axes and request.num_q_heads % shards.size(head_axes) == 0:
        if gathered:
            warn_once(f"{request.version}: the one kv head has no parts{gathered}.")
        return dataclasses.replace(shards, query_only_axes=head_axes)
    warn_once(f"{request.version}: every shard of {head_axes or stored_axes} computes all heads{gathered}: {reason}.")
    return shards


def why_not_heads(
    request: AttentionRequest, operands: Operands, shards: Shards, head_axes: Axes, stored_axes: Axes
) -> str | None:
    """Why heads can't be split over ``head_axes`` together with the pages, or None when they can."""
    over_heads = shards.size(head_axes)
    for what, count in (("query heads", request.num_q_heads), ("kv heads", request.num_kv_heads)):
        if count % over_heads:
            return f"{count} {what} do not divide among {over_heads} shards"
    if stored_axes != head_axes:
        names = (head_axes or "nothing", stored_axes or "nothing")
        return f"the query heads are split over {names[0]}, those of the pages over {names[1]}"
    layout = request.layout
    stored = operands.pages.shape[2]
    if stored % over_heads or layout.token_stride != request.num_kv_heads * layout.head_stride:
        return (
            f"the {stored} head groups of a {request.cache_dtype.name} cache with {request.num_kv_heads} kv heads "
            f"can't be split into {over_heads} shards of whole heads; a wider cache dtype has more groups"
        )
    return None


def local_request(request: AttentionRequest, operands: Operands, shards: Shards) -> AttentionRequest:
    """The request of one shard."""
    if shards.is_single:
        return request
    over_heads, over_pages = shards.size(shards.head_axes), shards.size(shards.page_axes)
    num_kv_heads = request.num_kv_heads // over_heads
    whole = operands.pages.shape
    shape = (whole[0] // over_pages, whole[1], whole[2] // over_heads, *whole[3:])
    return dataclasses.replace(
        request,
        num_q_heads=request.num_q_heads // (over_heads * shards.size(shards.query_only_axes)),
        num_kv_heads=num_kv_heads,
        num_rows=request.num_rows // over_pages,
        num_pages=shape[0],
        layout=request.cache_format.layout(request.version, shape, num_kv_heads, request.head_dim, request.cache_dtype),
    )


def run(
    forward: Callable[[Operands], Attended], request: AttentionRequest, operands: Operands, shards: Shards
) -> Attended:
    """``forward`` on each shard of ``operands``; the results are split as the operands were."""
    if shards.is_single:
        return forward(operands)
    q_heads = (shards.head_axes + shards.query_only_axes) or None
    kv_heads, page_axes = shards.head_axes or None, shards.page_axes or None
    queries, keys = PartitionSpec(None, q_heads, None), PartitionSpec(None, kv_heads, None)
    pages = request.cache_format.specs(operands.pages, shards.page_axes, shards.head_axes)
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
        "k_scale": PartitionSpec(kv_heads) if operands.k_scale is not None else None,
        "v_scale": PartitionSpec(kv_heads) if operands.v_scale is not None else None,
        "work": jax.tree.map(lambda _: PartitionSpec(), operands.work),  # all shards have the same rows: see api.py
    }
    lse = PartitionSpec(None, q_heads) if request.return_lse else None

    def body(local: Operands) -> Attended:
        if not shards.page_axes:
            return forward(local)
        local = local_rows(local, shards)
        attended = forward(local)
        # Each token belongs to one shard. Not every kernel gives zeros for tokens of no row.
        mine = tokens_of_rows(local)[:, None]
        output = jax.lax.psum(jnp.where(mine[:, :, None], attended.output, 0), shards.page_axes)
        attended = attended._replace(output=output)
        if attended.lse is None:
            return attended
        return attended._replace(lse=jax.lax.pmax(jnp.where(mine, attended.lse, -jnp.inf), shards.page_axes))

    assert shards.mesh is not None
    if is_explicit(shards.mesh):
        operands = resharded(operands, Operands(**specs), shards.mesh)
    results: dict[str, Any] = {"output": queries, "pages": pages, "lse": lse}
    # check_vma=False: EasyDeL's kernels do not follow what varies. And where every shard has the one kv head, types
    # can't say that all of them write the same pages.
    split = jax.shard_map(
        body, mesh=shards.mesh, in_specs=(Operands(**specs),), out_specs=Attended(**results), check_vma=False
    )
    return split(operands)


def local_rows(operands: Operands, shards: Shards) -> Operands:
    """Metadata of this shard's rows: page ids become local, tokens keep their global indices.

    An id of another shard's page is outside the local pages; kernels never use such an entry. The bounds of the
    distribution are computed again, because those of the whole batch do not hold for a part of it: the rows before the
    first that does not decode are decode rows, and all others may be of any kind.
    """
    shard = jax.lax.axis_index(shards.page_axes)
    num_rows, num_pages = operands.context_lens.shape[0], operands.pages.shape[0]
    first_row = (shard * num_rows).astype(jnp.int32)
    start_loc = jax.lax.dynamic_slice_in_dim(operands.query_start_loc, first_row, num_rows + 1)
    total = jnp.clip(Distribution(*operands.distribution).total - first_row, 0, num_rows)
    decodes = (start_loc[1:] - start_loc[:-1] == 1) & (jnp.arange(num_rows, dtype=jnp.int32) < total)
    decode_end = jnp.sum(jnp.cumprod(decodes.astype(jnp.int32)), dtype=jnp.int32)
    return operands._replace(
        block_tables=operands.block_tables - (shard * num_pages).astype(jnp.int32),
        query_start_loc=start_loc,
        distribution=jnp.stack([decode_end, decode_end, total]),  # types.Distribution
    )


def tokens_of_rows(operands: Operands) -> jax.Array:
    """Which tokens belong to a row that is not dead, ``[tokens]`` bool."""
    token = jnp.arange(operands.queries.shape[0], dtype=jnp.int32)[None, :]
    start, end = operands.query_start_loc[:-1, None], operands.query_start_loc[1:, None]
    row = jnp.arange(operands.context_lens.shape[0], dtype=jnp.int32)
    live = (row < Distribution(*operands.distribution).total)[:, None]
    return jnp.any(live & (start <= token) & (token < end), axis=0)
