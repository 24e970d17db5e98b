"""Ragged page attention as plain JAX functions.

Both functions take the arguments of ejkernel's functions of the same names, in the same order, and need nothing but
JAX. All rows of a batch are packed along the token axis: row ``r`` owns tokens
``[query_start_loc[r], query_start_loc[r + 1])``, and its i-th query stands at position
``context_lens[r] - num_queries + i`` of its context. A query sees positions up to its own.

Run-time values are not trusted. A row whose queries run backwards or leave the batch, whose context is shorter than
its queries or longer than its part of the block table, or that needs a page outside the cache, gives zeros, and
nothing of it is written. ``EASYDEL_RAGGED_CHECK=1`` reports such rows in the log.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from . import sharding, validation
from .config import RaggedPageConfig, as_config
from .layout import PageLayout, Version
from .select import Selection, select
from .sharding import Shards
from .turboquant import TurboQuantPages
from .types import AttentionRequest, Kernel, Operands

__all__ = ["CHECK_VARIABLE", "explain", "ragged_page_attention_v2", "ragged_page_attention_v3"]

CHECK_VARIABLE = "EASYDEL_RAGGED_CHECK"

PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}
"""JAX's names for a lowering platform, to its names for a backend, which selection goes by."""

logger = logging.getLogger("easydel_ragged_plugin")

Config = RaggedPageConfig | str | None
Window = int | tuple[int, int] | None
Sinks = Float[Array, "q_heads"] | Float[Array, "kv_heads sinks"] | None


def ragged_page_attention_v2(
    queries: Float[Array, "tokens q_heads head_dim"],
    kv_pages: Float[Array, "pages page_size kv_heads_x2 head_dim"] | TurboQuantPages,
    context_lens: Int[Array, rows],  # noqa: F821
    block_tables: Int[Array, "rows pages_per_row"],
    query_start_loc: Int[Array, rows_plus_1],  # noqa: F821
    num_seqs: Int[Array, 1] | int,
    softmax_aux: Sinks = None,
    /,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = None,
    optimized: bool = False,
    sliding_window: Window = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    config: Config | Any = None,
    platform: str | None = None,
    mesh: Mesh | None = None,
    in_specs: tuple[PartitionSpec | None, ...] | None = None,
) -> Float[Array, "tokens q_heads head_dim"]:
    """Attention of packed queries over pages that hold their keys and values already.

    Args:
        queries: queries of all rows; float32, bfloat16, float16 or float64. Tokens of no live row give zeros.
        kv_pages: keys at even heads, values at odd ones. Any float dtype, 8-bit ones included, or int8 with
            ``k_scale`` and ``v_scale``. Or a TurboQuant cache, which is read in float32 at least.
        context_lens: int32 tokens of each row, its new ones included.
        block_tables: int32 page ids of each row. Entries past a row's context, or left of its window, are not used.
        query_start_loc: int32 first token of each row.
        num_seqs: int32 rows to look at; rows from there on are dead. A row without tokens may stand before it.
        softmax_aux: sink logits that take part in the softmax's sum and have no value: one for each query head,
            or ``[kv_heads, sinks]``, all of whose row joins each query head of that kv head.
        softmax_scale: factor on ``query . key``; None for ``head_dim ** -0.5``.
        logits_soft_cap: c of ``c * tanh(logits / c)``, applied to the scaled logits.
        compute_dtype: dtype in which the operands of the two products are held, or a wider one where that is
            faster; None for the queries' dtype. Softmax and sums are float32 at least.
        optimized: hint for the host's TPU kernel; results do not depend on it.
        sliding_window: tokens that a query sees, its own included; or a pair (tokens left of it, tokens right of
            it), of which causality cuts the right part. -1 in a pair means no limit.
        mask_value: logit of a masked key. Masked keys have no weight at all here, so only None or a value up to
            -1e9, which says the same, is accepted.
        vmem_limit_bytes: ceiling on the scoped VMEM of a TPU kernel, in bytes. Other kernels use none.
        q_scale, k_scale, v_scale: factors that turn stored queries, keys and values into real ones.
        config: a RaggedPageConfig, a kernel's name, or ejkernel's config object.
        platform: ``"cpu"``, ``"gpu"`` (or ``"cuda"``, ``"rocm"``) or ``"tpu"``; None for JAX's default backend.
        mesh: mesh to split the call over; needs ``in_specs``.
        in_specs: partition specs of the positional arguments in order. Those of queries and pages are read.

    Returns:
        The attention output in the queries' dtype.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype or value. Raised while tracing.
        Unsupported: the kernel that was named refuses.
    """
    num_seqs = jnp.asarray(num_seqs, jnp.int32).reshape(-1)
    if num_seqs.shape != (1,):
        raise ValueError(f"num_seqs: got {num_seqs.size} numbers, wanted one: the count of rows to look at.")
    call = _prepare(
        "v2", queries, None, None, kv_pages, context_lens, block_tables, query_start_loc,
        jnp.broadcast_to(num_seqs, (3,)), softmax_aux,
        softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, compute_dtype=compute_dtype,
        optimized=optimized, sliding_window=sliding_window, mask_value=mask_value, vmem_limit_bytes=vmem_limit_bytes,
        q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, config=config, platform=platform, mesh=mesh,
        in_specs=in_specs,
    )  # fmt: skip
    return call.run()[0]


def ragged_page_attention_v3(
    queries: Float[Array, "tokens q_heads head_dim"],
    keys: Float[Array, "tokens kv_heads head_dim"],
    values: Float[Array, "tokens kv_heads head_dim"],
    kv_pages: Float[Array, "pages page_size groups pack padded_head_dim"] | TurboQuantPages,
    context_lens: Int[Array, rows],  # noqa: F821
    block_tables: Int[Array, "rows pages_per_row"] | Int[Array, rows_x_pages_per_row],  # noqa: F821
    query_start_loc: Int[Array, rows_plus_1],  # noqa: F821
    distribution: Int[Array, 3],
    softmax_aux: Sinks = None,
    /,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = None,
    optimized: bool = False,
    sliding_window: Window = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    config: Config | Any = None,
    platform: str | None = None,
    mesh: Mesh | None = None,
    in_specs: tuple[PartitionSpec | None, ...] | None = None,
) -> tuple[
    Float[Array, "tokens q_heads head_dim"],
    Float[Array, "pages page_size groups pack padded_head_dim"] | TurboQuantPages,
]:
    """Write the new keys and values of each live token into its page, then attend.

    Inside ``jax.jit`` with the pages donated, the update is in place and the pages are not copied. Slots of other
    tokens keep their bits; the padding of a written slot becomes zero. Keys and values are stored as they are given,
    cast to the cache's dtype: 8-bit floats saturate, int8 rounds to the nearest of -127 to 127. With ``k_scale`` and
    ``v_scale`` the caller has divided by them.

    Args:
        queries, softmax_aux, context_lens, query_start_loc: as for :func:`ragged_page_attention_v2`.
        keys, values: keys and values of the new tokens.
        kv_pages: the cache, in the shape that :func:`~easydel_ragged_plugin.layout.page_shape` gives for ``"v3"``; or
            a :class:`~easydel_ragged_plugin.turboquant.TurboQuantPages`, whose constants come back as they are.
        block_tables: int32 page ids, ``[rows, pages_per_row]`` or flat.
        distribution: int32 ``[decode_end, prefill_end, total]``; see ``types.Distribution``.
        softmax_scale ... in_specs: as for :func:`ragged_page_attention_v2`.

    Returns:
        The attention output in the queries' dtype, and the updated pages.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype or value. Raised while tracing: nothing is written.
        Unsupported: the kernel that was named refuses.
    """
    call = _prepare(
        "v3", queries, keys, values, kv_pages, context_lens, block_tables, query_start_loc, distribution,
        softmax_aux, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, compute_dtype=compute_dtype,
        optimized=optimized, sliding_window=sliding_window, mask_value=mask_value, vmem_limit_bytes=vmem_limit_bytes,
        q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, config=config, platform=platform, mesh=mesh,
        in_specs=in_specs,
    )  # fmt: skip
    return call.run()


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Selection:
    """What a call would run, and why each other kernel would not. Nothing is computed.

    Args:
        function: :func:`ragged_page_attention_v2` or :func:`ragged_page_attention_v3`.
        *args, **kwargs: the call's arguments; ``jax.ShapeDtypeStruct`` stands for an array.

    Raises:
        ValueError, Unsupported: what the call itself would raise.
    """
    if function not in (ragged_page_attention_v2, ragged_page_attention_v3):
        raise ValueError(f"explain: got {function!r}, wanted ragged_page_attention_v2 or ragged_page_attention_v3.")
    found: list[Selection] = []
    token = _recorder.set(found)
    try:
        jax.eval_shape(functools.partial(function, **kwargs), *args)
    finally:
        _recorder.reset(token)
    return found[0]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A validated call: what to run, and on what."""

    kernel: Kernel
    selection: Selection
    shards: Shards
    operands: Operands

    def run(self) -> tuple[jax.Array, Any]:
        """Output and pages."""
        found = _recorder.get()
        if found is not None:  # explain asks: nothing need be traced further, and these have the right shapes
            found.append(self.selection)
            return self.operands.queries, self.operands.pages
        return _run(self.kernel, self.selection.request, self.selection.config, self.shards, self.operands)


# All layers of a model make the same call: jit keeps its trace, so that it is traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=False)
def _run(
    kernel: Kernel, request: AttentionRequest, config: RaggedPageConfig, shards: Shards, operands: Operands
) -> tuple[jax.Array, Any]:
    return sharding.run(lambda local: kernel.forward(request, config, local), operands, shards)


_recorder: contextvars.ContextVar[list[Selection] | None] = contextvars.ContextVar("ragged_recorder", default=None)
"""Where :func:`explain` collects the selection of the call that it traces."""


def _prepare(
    version: Version,
    queries: Any,
    keys: Any,
    values: Any,
    pages: Any,
    context_lens: Any,
    block_tables: Any,
    query_start_loc: Any,
    distribution: Any,
    softmax_aux: Any,
    *,
    softmax_scale: float | None,
    compute_dtype: Any,
    sliding_window: Window,
    mask_value: float | None,
    logits_soft_cap: float | None,
    config: Any,
    platform: str | None,
    mesh: Mesh | None,
    in_specs: tuple[PartitionSpec | None, ...] | None,
    **options: Any,
) -> _Call:
    """Validate a call and choose its kernel."""
    call_config = as_config(config)
    num_kv_heads = validation.check_shapes(version, queries, keys, values, pages)
    num_tokens, num_q_heads, head_dim = queries.shape
    known_lens = context_lens if isinstance(context_lens, np.ndarray) else None
    context_lens, query_start_loc, block_tables = validation.check_index_arrays(
        context_lens, query_start_loc, block_tables, distribution
    )
    num_rows, pages_per_row = block_tables.shape
    capacity = pages_per_row * pages.shape[1]
    if known_lens is not None and known_lens.size and int(known_lens.max()) > capacity:
        raise ValueError(
            f"block_tables: a context of {int(known_lens.max())} tokens was given, wanted at most {capacity}: "
            f"{pages_per_row} pages of {pages.shape[1]}. Widen the block table."
        )
    coded = isinstance(pages, TurboQuantPages)
    cache_dtype = np.dtype(np.uint8 if coded else pages.dtype)
    request = AttentionRequest(
        version=version,
        platform=PLATFORMS.get(platform or "", platform) or jax.default_backend(),
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_rows=num_rows,
        pages_per_row=pages_per_row,
        num_pages=pages.shape[0],
        query_dtype=np.dtype(queries.dtype),
        cache_dtype=cache_dtype,
        compute_dtype=validation.float_dtype("compute_dtype", compute_dtype, queries.dtype),
        layout=PageLayout.of_codes(pages.shape[1], num_kv_heads, head_dim)
        if coded
        else PageLayout.of(version, pages.shape, num_kv_heads, head_dim, cache_dtype),
        softmax_scale=head_dim**-0.5 if softmax_scale is None else validation.number("softmax_scale", softmax_scale),
        sliding_window=validation.window_tokens(sliding_window),
        logits_soft_cap=None if logits_soft_cap is None else validation.positive("logits_soft_cap", logits_soft_cap),
        has_sinks=softmax_aux is not None,
        turboquant=coded,
        **validation.check_options(options),
    )
    validation.check_mask_value(mask_value)
    validation.check_scales(pages, options)
    operands = Operands(
        jnp.asarray(queries),
        None if keys is None else jnp.asarray(keys),
        None if values is None else jnp.asarray(values),
        jax.tree.map(jnp.asarray, pages),
        context_lens,
        block_tables,
        query_start_loc,
        jnp.asarray(distribution),
        None if softmax_aux is None else validation.sinks_per_head(softmax_aux, num_q_heads, num_kv_heads),
    )
    specs = validation.specs_of(version, mesh, in_specs)
    shards = sharding.plan(request, operands, mesh, *specs)
    local = sharding.local_request(request, operands.pages.shape, shards)
    kernel, selection = select(local, call_config)
    if os.environ.get(CHECK_VARIABLE, "") not in ("", "0"):
        jax.debug.callback(functools.partial(_report_bad_rows, request), *operands[4:8])
    return _Call(kernel, selection, shards, operands)


def _report_bad_rows(
    request: AttentionRequest, context_lens: Any, block_tables: Any, query_start_loc: Any, distribution: Any
) -> None:
    """Log what is wrong with each row that a kernel will skip."""
    lens, tables, starts = (np.asarray(array) for array in (context_lens, block_tables, query_start_loc))
    total, capacity = int(np.asarray(distribution)[2]), request.pages_per_row * request.page_size
    if not 0 <= total <= request.num_rows:
        logger.error("%s: distribution says %d rows, the block table has %d", CHECK_VARIABLE, total, request.num_rows)
    for row in range(min(max(total, 0), request.num_rows)):
        start, end, context = int(starts[row]), int(starts[row + 1]), int(lens[row])
        if start == end:
            continue
        problem = None
        if not 0 <= start < end <= request.num_tokens:
            problem = f"its tokens are [{start}, {end}) of {request.num_tokens}"
        elif context < end - start:
            problem = f"its context of {context} tokens is shorter than its {end - start} new ones"
        elif context > capacity:
            problem = f"its context of {context} tokens exceeds the {capacity} of its part of the block table"
        else:
            first_query = context - (end - start)
            first = max(0, first_query - request.sliding_window + 1) if request.sliding_window else 0
            needed = tables[row, first // request.page_size : -(-context // request.page_size)]
            outside = needed[(needed < 0) | (needed >= request.num_pages)]
            if outside.size:
                problem = f"it needs page {int(outside[0])}, the cache has {request.num_pages}"
        if problem:
            logger.error("%s: row %d of %s is skipped: %s", CHECK_VARIABLE, row, request.describe(), problem)
