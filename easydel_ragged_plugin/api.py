"""Ragged page attention as plain JAX functions.

Both functions take the arguments of ejkernel's functions of the same names, in the same order, and need nothing but
JAX. All rows of a batch are packed along the token axis: row ``r`` has the tokens
``[query_start_loc[r], query_start_loc[r + 1])``, and its i-th query is at position
``context_lens[r] - num_queries + i`` of its context. A query sees positions up to its own.

Run-time values are not trusted. A row is malformed when its queries run backwards or outside the batch, when its
context is shorter than its queries or longer than its part of the block table, or when it needs a page outside the
cache. Such a row gives zeros and writes nothing. ``EASYDEL_RAGGED_CHECK=1`` reports malformed rows in the log.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from . import programs, rows, sharding
from .config import RaggedPageConfig, as_config
from .errors import Unsupported
from .layout import Version
from .options import Options, Window, split_scales
from .request import describe, distribution_of
from .select import Selection, kernels, select
from .sharding import Shards
from .turboquant import TurboQuantPages
from .types import Attended, AttentionRequest, Kernel, Operands, Prepared
from .varying import vary

__all__ = ["attend", "explain", "prepare", "ragged_page_attention_v2", "ragged_page_attention_v3"]

programs.register_available()  # here, because a process that loads saved programs may trace none

Config = RaggedPageConfig | str | None
Specs = tuple[PartitionSpec | None, ...] | None
Scale = float | Float[Array, " kv_heads"] | Float[Array, ""] | None
Sinks = Float[Array, " q_heads"] | Float[Array, "kv_heads sinks"] | None
Output = Float[Array, "tokens q_heads head_dim"]
LogSumExp = Float[Array, "tokens q_heads"]
PagesV2 = Float[Array, "pages page_size kv_heads_x2 head_dim"] | TurboQuantPages
PagesV3 = Float[Array, "pages page_size groups pack padded_head_dim"] | TurboQuantPages


# The overloads give type checkers the result; the arguments are those of the definitions.
@overload
def ragged_page_attention_v2(*arrays: Any, return_lse: Literal[True], **keywords: Any) -> tuple[Output, LogSumExp]: ...
@overload
def ragged_page_attention_v2(*arrays: Any, return_lse: Literal[False] = False, **keywords: Any) -> Output: ...
def ragged_page_attention_v2(  # type: ignore[misc]
    queries: Float[Array, "tokens q_heads head_dim"],
    kv_pages: PagesV2,
    context_lens: Int[Array, " rows"],
    block_tables: Int[Array, "rows pages_per_row"],
    query_start_loc: Int[Array, " rows_plus_1"],
    num_seqs: Int[Array, " 1"] | int,
    softmax_aux: Sinks = None,
    /,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = None,
    optimized: bool = False,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    q_scale: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    return_lse: bool = False,
    config: Config | Any = None,
    platform: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: Specs = None,
    prepared: Prepared | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Attention of packed queries over pages that hold their keys and values already.

    Args:
        queries: queries of all rows; float32, bfloat16, float16 or float64. Tokens of no live row give zeros.
        kv_pages: keys at even heads, values at odd ones. Any float dtype, 8-bit ones included, or int8 with
            ``k_scale`` and ``v_scale``. Or a TurboQuant cache.
        context_lens: int32 tokens of each row, its new ones included.
        block_tables: int32 page ids of each row. Entries past a row's context, or left of its window, are not used.
        query_start_loc: int32 first token of each row.
        num_seqs: int32 number of rows in use; the rows after them are dead. Rows without tokens may be among them.
        softmax_aux: sink logits, which are added to the softmax's sum and have no value: one for each query head,
            or ``[kv_heads, sinks]``, where all sinks of a kv head count for each of its query heads. -inf is no sink;
            inf, and any number past float32, counts as the largest float32.
        softmax_scale: factor on ``query . key``; None for ``head_dim ** -0.5``. Scales are 0 or of a magnitude between
            2**-126 and 2**127, and so are their products.
        logits_soft_cap: c of ``c * tanh(logits / c)``, applied to the scaled logits. From 2**60 on it caps nothing,
            and is the same as None.
        compute_dtype: dtype of the operands of the two products, or a wider one where that is faster; None for the
            queries' dtype. Softmax and sums are float32 at least.
        optimized: hint for EasyDeL's TPU kernel; results do not depend on it.
        sliding_window: tokens that a query sees, its own included; or a pair (tokens left of it, tokens right of
            it), of which causality cuts the right part. -1 in a pair means no limit, and so does any number from 2**31
            on.
        attention_chunk_size: tokens of a chunk of chunked attention (Llama 4): a query at position p sees only keys
            from ``p // attention_chunk_size * attention_chunk_size`` on. With a sliding window both limits hold.
        mask_value: logit of a masked key. Masked keys have no weight at all here, so only None and values up to
            -1e9, which have the same effect, are accepted.
        vmem_limit_bytes: upper limit of the scoped VMEM of a TPU kernel, in bytes. Other kernels use none.
        q_scale: step of a quantization of the queries, as in ejkernel and tpu-inference: queries are divided by it,
            cast, and multiplied by it again, so it cancels but for rounding. The kernels of this package compute with
            the queries as they are; ejkernel's v3 gets it.
        k_scale, v_scale: factors that turn stored keys and values into real ones: a number, or a float array
            ``[kv_heads]`` or ``[]``, which may be traced. Arrays are held in float32.
        return_lse: whether to return the logsumexp of each token and query head as well: the natural logarithm of the
            sum of ``exp(logit)`` over the keys that the token sees and its sinks. With it the results over two parts
            of a context can be merged.
        config: a RaggedPageConfig, a kernel's name, or ejkernel's config object.
        platform: ``"cpu"``, ``"gpu"`` (or ``"cuda"``, ``"rocm"``) or ``"tpu"``; None for JAX's default backend.
        mesh: mesh to split the call over; needs ``in_specs``.
        in_specs: partition specs of the positional arguments in order. Those of queries and pages are read.
        prepared: what :func:`prepare` gave for a call like this one over the same rows; None to compute it here.

    Returns:
        The attention output in the queries' dtype. With ``return_lse`` a pair of it and the logsumexp, float32, which
        is -inf for tokens of no live row.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype or value. Raised while tracing.
        Unsupported: the kernel that was named refuses.
    """
    scales, arrays = split_scales({"k_scale": k_scale, "v_scale": v_scale})
    options = Options(
        softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, compute_dtype=compute_dtype, optimized=optimized,
        sliding_window=sliding_window, attention_chunk_size=attention_chunk_size, mask_value=mask_value,
        vmem_limit_bytes=vmem_limit_bytes, q_scale=q_scale, **scales,
    )  # fmt: skip
    attended = attend(
        "v2", queries, None, None, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux,
        options, **arrays, return_lse=return_lse, config=config, platform=platform, mesh=mesh, in_specs=in_specs,
        prepared=prepared,
    )  # fmt: skip
    return attended.output if attended.lse is None else (attended.output, attended.lse)


@overload
def ragged_page_attention_v3(
    *arrays: Any, return_lse: Literal[True], **keywords: Any
) -> tuple[Output, PagesV3, LogSumExp]: ...
@overload
def ragged_page_attention_v3(
    *arrays: Any, return_lse: Literal[False] = False, **keywords: Any
) -> tuple[Output, PagesV3]: ...
def ragged_page_attention_v3(  # type: ignore[misc]
    queries: Float[Array, "tokens q_heads head_dim"],
    keys: Float[Array, "tokens kv_heads head_dim"] | None,
    values: Float[Array, "tokens kv_heads head_dim"] | None,
    kv_pages: PagesV3,
    context_lens: Int[Array, " rows"],
    block_tables: Int[Array, "rows pages_per_row"] | Int[Array, " rows_x_pages_per_row"],
    query_start_loc: Int[Array, " rows_plus_1"],
    distribution: Int[Array, " 3"],
    softmax_aux: Sinks = None,
    /,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = None,
    optimized: bool = False,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    q_scale: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    update_pages: bool = True,
    return_lse: bool = False,
    config: Config | Any = None,
    platform: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: Specs = None,
    prepared: Prepared | None = None,
) -> tuple[Output, PagesV3] | tuple[Output, PagesV3, LogSumExp]:
    """Write the new keys and values of each live token into its page, then attend; or attend alone.

    Inside ``jax.jit`` with the pages donated, the update is in place and the pages are not copied. Slots of other
    tokens keep their bits; the padding of a written slot becomes zero. Keys and values are stored as they are given,
    cast to the cache's dtype: 8-bit floats saturate, int8 rounds to the nearest of -127 to 127. With ``k_scale`` and
    ``v_scale`` the caller has divided by them.

    With ``update_pages=False`` nothing is written: the pages hold the new tokens' keys and values already, as those of
    a layer that shares another layer's cache do. Context lengths include these tokens in both cases.

    Args:
        queries, softmax_aux, context_lens, query_start_loc: as for :func:`ragged_page_attention_v2`.
        keys, values: keys and values of the new tokens. With ``update_pages=False`` only their shape is read, and they
            may be None where the pages' shape tells the number of kv heads.
        kv_pages: the cache, in the shape that :func:`~easydel_ragged_plugin.layout.page_shape` gives for ``"v3"``; or
            a :class:`~easydel_ragged_plugin.turboquant.TurboQuantPages`, whose constants come back as they are.
        block_tables: int32 page ids, ``[rows, pages_per_row]`` or flat.
        distribution: int32 ``[decode_end, prefill_end, total]``; see ``types.Distribution``.
        update_pages: whether to write the new keys and values.
        softmax_scale: factor on ``query . key``; None for ``head_dim ** -0.5``. ejkernel's own v3 takes 1.0 for None.
        logits_soft_cap, compute_dtype, optimized, sliding_window, attention_chunk_size: as for
            :func:`ragged_page_attention_v2`.
        mask_value, vmem_limit_bytes, q_scale, k_scale, v_scale: as for :func:`ragged_page_attention_v2`.
        return_lse, config, platform, mesh, in_specs, prepared: as for :func:`ragged_page_attention_v2`.

    Returns:
        The attention output in the queries' dtype, and the updated pages (the given ones where nothing is written);
        with ``return_lse`` also the logsumexp.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype or value. Raised while tracing: nothing is written.
        Unsupported: the kernel that was named refuses.
    """
    scales, arrays = split_scales({"k_scale": k_scale, "v_scale": v_scale})
    options = Options(
        softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap, compute_dtype=compute_dtype, optimized=optimized,
        sliding_window=sliding_window, attention_chunk_size=attention_chunk_size, mask_value=mask_value,
        vmem_limit_bytes=vmem_limit_bytes, q_scale=q_scale, update_pages=update_pages, **scales,
    )  # fmt: skip
    attended = attend(
        "v3", queries, keys, values, kv_pages, context_lens, block_tables, query_start_loc, distribution, softmax_aux,
        options, **arrays, return_lse=return_lse, config=config, platform=platform, mesh=mesh, in_specs=in_specs,
        prepared=prepared,
    )  # fmt: skip
    return attended[:2] if attended.lse is None else (attended.output, attended.pages, attended.lse)


def attend(
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
    options: Options,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    return_lse: bool = False,
    config: Any = None,
    platform: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: Specs = None,
    prepared: Prepared | None = None,
) -> Attended:
    """Either operation, with its options as one object. The public functions and the host's operations call it.

    Args:
        version: which operation.
        queries, ..., softmax_aux: the positional arguments of :func:`ragged_page_attention_v3`. For v2 ``keys`` and
            ``values`` are None, and ``distribution`` is ``num_seqs``.
        options: the options; ``sinks`` is set from ``softmax_aux``, and ``scale_arrays`` from the next two.
        k_scale, v_scale: the options of these names where they are arrays; else None.
        return_lse: as for the public functions.
        config, platform, mesh, in_specs, prepared: as for the public functions.
    """
    request, operands = describe(
        version, queries, keys, values, pages, context_lens, block_tables, query_start_loc, distribution, softmax_aux,
        options, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse, platform=platform,
    )  # fmt: skip
    shards = sharding.plan(request, operands, mesh, in_specs)
    kernel, selection = select(sharding.local_request(request, operands, shards), as_config(config))
    if rows.checking():
        jax.debug.callback(functools.partial(rows.report_bad_rows, request), *operands[4:8])
    explained = _explained.get()
    if explained is not None:  # no kernel has to be traced; these stand-ins have the right shapes
        explained.append((selection, shards))
        lse = jnp.zeros(operands.queries.shape[:2], jnp.float32) if return_lse else None
        return Attended(operands.queries, operands.pages, lse)
    if prepared is not None:
        operands = operands._replace(work=_shared_work(prepared, selection, shards, operands))
    attended = _run(kernel, selection.request, selection.config, shards, operands)
    return attended if request.writes_pages else attended._replace(pages=operands.pages)


# All layers of a model make the same call. jit keeps its trace, so it is traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=False)
def _run(
    kernel: Kernel, request: AttentionRequest, config: RaggedPageConfig, shards: Shards, operands: Operands
) -> Attended:
    def forward(local: Operands) -> Attended:
        return kernel.forward(request, config, vary(local, local))

    attended = sharding.run(forward, request, operands, shards)
    return attended if request.writes_pages else attended._replace(pages=None)  # no copy where it is no part of a trace


Found = list[tuple[Selection, Shards]]
_explained: contextvars.ContextVar[Found | None] = contextvars.ContextVar("ragged_explained", default=None)
"""Where :func:`explain` and :func:`prepare` collect what is decided about the call that they trace."""


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Selection:
    """The kernel that a call would run, and the reason for each other kernel. Nothing is computed.

    Args:
        function: :func:`ragged_page_attention_v2` or :func:`ragged_page_attention_v3`.
        *args, **kwargs: the call's arguments, with arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError, Unsupported: what the call itself would raise.
    """
    return _decided("explain", function, args, kwargs)[0]


def _decided(name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Selection, Shards]:
    """The selection of a call and how it is split. Nothing is computed."""
    if function not in (ragged_page_attention_v2, ragged_page_attention_v3):
        raise ValueError(f"{name}: got {function!r}, wanted ragged_page_attention_v2 or ragged_page_attention_v3.")
    found: Found = []
    token = _explained.set(found)
    try:
        shapes = {name: value for name, value in kwargs.items() if isinstance(value, jax.ShapeDtypeStruct)}
        given = {name: value for name, value in kwargs.items() if name not in shapes}
        jax.eval_shape(functools.partial(function, **given), *args, **shapes)
    finally:
        _explained.reset(token)
    return found[0]


def prepare(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Prepared:
    """What calls over the same rows share, computed once: their keyword ``prepared`` takes it.

    Kernels compute lists of work from ``context_lens``, ``query_start_loc`` and ``distribution`` (or ``num_seqs``)
    before they attend. XLA shares them between calls of one program, but not between the trips of a loop: a
    ``lax.scan`` over layers computes them again for each layer, unless its body gets them through ``prepared``. A
    kernel without such lists prepares nothing, and takes the result all the same.

    What is prepared is for calls with the same static facts: shapes, dtypes, options, configuration, kernel. Layers of
    two kinds, such as those with a window and those without, need one each. The rows must be the same, too; their
    numbers are not compared, unless ``EASYDEL_RAGGED_CHECK`` is set. The block tables may differ.

    Args:
        function: :func:`ragged_page_attention_v2` or :func:`ragged_page_attention_v3`.
        *args, **kwargs: the arguments of one of the calls. Arrays of which the values are not read (all but the three
            above) may be ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: what the call itself would raise.
        Unsupported: what the call itself would raise; or its pages are split over mesh axes, or its arrays are sharded
            explicitly: then each device has rows of its own.
    """
    selection, shards = _decided("prepare", function, args, kwargs)
    _refuse_own_rows("prepare", shards)
    context_lens, _, query_start_loc, last = args[2:6] if function is ragged_page_attention_v2 else args[4:8]
    if function is ragged_page_attention_v2:
        last = distribution_of(last)
    index = (jnp.asarray(context_lens), jnp.asarray(query_start_loc), jnp.asarray(last))
    work = _prepare(kernels()[selection.kernel], selection.request, selection.config, *index)
    return Prepared(work, index, selection.kernel, selection.request, selection.config)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prepare(
    kernel: Kernel,
    request: AttentionRequest,
    config: RaggedPageConfig,
    context_lens: jax.Array,
    query_start_loc: jax.Array,
    distribution: jax.Array,
) -> Any:
    unread: Any = None
    index = {"context_lens": context_lens, "query_start_loc": query_start_loc, "distribution": distribution}
    rest = dict.fromkeys(("queries", "keys", "values", "pages", "block_tables", "sinks"), unread)
    return kernel.prepare(request, config, Operands(**index, **rest))


def _refuse_own_rows(what: str, shards: Shards) -> None:
    if shards.page_axes or sharding.is_explicit(shards.mesh):
        why = (
            f"pages are split over mesh axes {shards.page_axes}"
            if shards.page_axes
            else "arrays are sharded explicitly"
        )
        raise Unsupported(f"{what}: {why}, so each device has its own lists of work. Leave prepared= out.")


def _shared_work(prepared: Any, selection: Selection, shards: Shards, operands: Operands) -> Any:
    """The work of ``prepared``, if it is for this call."""
    if not isinstance(prepared, Prepared):
        raise ValueError(f"prepared: got {type(prepared).__name__}, wanted what easydel_ragged_plugin.prepare returns.")
    _refuse_own_rows("prepared", shards)
    differences = prepared.differences(selection.kernel, selection.request, selection.config)
    if differences:
        raise ValueError(
            f"prepared: it is for {'; '.join(differences)}, which this call has. Prepare one for this call's arguments."
        )
    if rows.checking():
        given = (operands.context_lens, operands.query_start_loc, operands.distribution)
        jax.debug.callback(rows.report_other_rows, prepared.index, given)
    return prepared.work
