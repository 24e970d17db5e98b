"""From the arguments of a call to ``(request, operands)``: all validation, once.

It runs while a call is traced, so nothing has been written when it raises. Messages give what was got, what was wanted
and what to do next.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import turboquant
from .formats import PLAIN, CacheFormat
from .layout import Version
from .options import Options, check_magnitude, is_wide_float
from .types import AttentionRequest, Distribution, Operands

__all__ = ["FORMATS", "describe", "distribution_of"]

FORMATS: tuple[CacheFormat, ...] = (turboquant.FORMAT, PLAIN)
"""Every cache format. The first that holds a cache is used. Anything else is refused by the check of plain pages."""

MOST_INDICES = 2**31 - 1
"""Most of what an index in 32 bits counts."""

MOST_POSITIONS = 2**30
"""Most positions of a row. Below it a position and the tokens of a block that begins there add up in 32 bits."""

PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}
"""JAX's names of a lowering platform, to its names of a backend, which selection uses."""


def describe(
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
    platform: str | None = None,
) -> tuple[AttentionRequest, Operands]:
    """The static description of a call, and its arrays in the form that kernels take.

    Args:
        version: which operation.
        queries, ..., softmax_aux: the positional arguments of the public v3 function. For v2 ``keys`` and ``values``
            are None, and ``distribution`` is the number of rows in use. So they may be for v3 where ``update_pages`` is
            off.
        options: the options; ``sinks`` is set from ``softmax_aux``, and ``scale_arrays`` from the next two.
        k_scale, v_scale: the options of these names where they are arrays; else None.
        return_lse: whether the logsumexp is a result, too.
        platform: as for the public functions.

    Raises:
        ValueError: an argument has a wrong rank, shape or dtype, or its size is not that of another.
        Unsupported: an option that a cache of this format can't have.
    """
    cache_format = next((each for each in FORMATS if each.holds(pages)), PLAIN)
    if version == "v2" and not options.update_pages:
        raise ValueError("update_pages: got False for v2, which never writes pages. Leave it out.")
    writes = version == "v3" and options.update_pages
    if writes:
        _require_new_tokens(keys, values)
    _check_heads(queries, keys, values, pages, cache_format, writes)
    num_tokens, num_q_heads, head_dim = queries.shape
    cache_format.check(version, pages, head_dim)
    num_kv_heads = _num_kv_heads(version, cache_format, pages, keys if keys is not None else values, queries)
    _check_sizes(queries, pages, context_lens, block_tables)
    if version == "v2":
        distribution = distribution_of(distribution)
    block_tables = _check_index_arrays(context_lens, query_start_loc, block_tables, distribution)
    _check_known_lengths(context_lens, query_start_loc, distribution, block_tables.shape[1], pages.shape[1])
    arrays = {name: array for name, array in (("k_scale", k_scale), ("v_scale", v_scale)) if array is not None}
    options = dataclasses.replace(options, sinks=softmax_aux is not None, scale_arrays=tuple(arrays))
    cache_format.check_options(pages, options)
    cache_dtype = cache_format.dtype(pages)
    request = AttentionRequest(
        version=version,
        platform=PLATFORMS.get(platform or "", platform) or jax.default_backend(),
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_rows=block_tables.shape[0],
        pages_per_row=block_tables.shape[1],
        num_pages=pages.shape[0],
        query_dtype=np.dtype(queries.dtype),
        cache_dtype=cache_dtype,
        layout=cache_format.layout(version, tuple(pages.shape), num_kv_heads, head_dim, cache_dtype),
        cache_format=cache_format,
        options=options,
        return_lse=bool(return_lse),
    )
    _check_logits_scale(request.softmax_scale, options.k_scale)
    operands = Operands(
        queries=jnp.asarray(queries),
        keys=jnp.asarray(keys) if writes else None,
        values=jnp.asarray(values) if writes else None,
        pages=jax.tree.map(jnp.asarray, pages),
        context_lens=jnp.asarray(context_lens),
        block_tables=block_tables,
        query_start_loc=jnp.asarray(query_start_loc),
        distribution=jnp.asarray(distribution),
        sinks=None if softmax_aux is None else _sinks_per_head(softmax_aux, num_q_heads, num_kv_heads),
        **{name: _scale_per_head(name, array, request) for name, array in arrays.items()},
    )
    return request, operands


def _require_new_tokens(keys: Any, values: Any) -> None:
    for name, array in (("keys", keys), ("values", values)):
        if array is None:
            raise ValueError(
                f"{name}: got None, wanted those of the new tokens. Pass update_pages=False where the pages have them."
            )


def _num_kv_heads(version: Version, cache_format: CacheFormat, pages: Any, new: Any, queries: Any) -> int:
    """Key/value heads: those of new keys, where there are some, else those that the pages' shape allows."""
    _, num_q_heads, head_dim = queries.shape
    counts = (new.shape[1],) if new is not None else cache_format.num_kv_heads(version, pages, head_dim)
    possible = [count for count in counts if count and num_q_heads % count == 0]
    if len(possible) > 1:
        raise ValueError(
            f"keys: got None, and {version} pages of shape {tuple(pages.shape)} can have "
            f"{' or '.join(map(str, possible))} kv heads: some are padded. Pass keys; only their shape is read."
        )
    if possible:
        return possible[0]
    if not counts:
        raise ValueError(
            f"kv_pages: got shape {tuple(pages.shape)}, which page_shape gives for no number of kv heads of head_dim "
            f"{head_dim}. Build the cache with page_shape({version!r}, ...)."
        )
    raise ValueError(
        f"queries: got {num_q_heads} heads over {' or '.join(map(str, counts))} kv heads, wanted a multiple. "
        "Every kv head serves the same number of query heads."
    )


def _check_sizes(queries: Any, pages: Any, context_lens: Any, block_tables: Any) -> None:
    """Refuse sizes that kernels can't count in 32 bits."""
    num_pages, page_size = pages.shape[:2]
    tokens, heads, head_dim = queries.shape
    entries = math.prod(getattr(block_tables, "shape", ()))
    rows = max(1, math.prod(getattr(context_lens, "shape", ())))
    for what, count, most in (
        ("queries: got {} tokens", tokens, MOST_INDICES),
        ("queries: got {} elements in a token", heads * head_dim, MOST_INDICES),
        ("kv_pages: got {} pages", num_pages, MOST_INDICES),
        ("kv_pages: got {} tokens in a page", page_size, MOST_POSITIONS),
        ("block_tables: got {} entries", entries, MOST_INDICES),
        ("block_tables: got room for {} tokens in a row", -(-entries // rows) * page_size, MOST_POSITIONS),
    ):
        if count > most:
            raise ValueError(f"{what.format(count)}, wanted at most {most}: they are counted in 32 bits.")


def _check_logits_scale(softmax_scale: float, k_scale: float | None) -> None:
    """Refuse a product that float32 can't hold. Of numbers in its range none is 0 in float64."""
    if k_scale is not None:
        check_magnitude(f"softmax_scale * k_scale, {softmax_scale} * {k_scale}", softmax_scale * k_scale)


def _check_heads(queries: Any, keys: Any, values: Any, pages: Any, cache_format: CacheFormat, writes: bool) -> None:
    """Check ranks and sizes of queries, keys and values, and the dtypes of those that are used."""
    for name, array, form in (
        ("queries", queries, "[tokens, q_heads, head_dim]"),
        ("keys", keys, "[tokens, kv_heads, head_dim]"),
        ("values", values, "[tokens, kv_heads, head_dim]"),
    ):
        if array is None:
            continue
        if len(array.shape) != 3:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, wanted {form}. Reshape a batch axis away.")
        if name != "queries" and (not writes or cache_format.stores(pages, array.dtype)):
            continue
        if not is_wide_float(array.dtype):
            raise ValueError(
                f"{name}: got dtype {array.dtype}, wanted a float dtype of at least 16 bits. "
                "Cast with .astype(jnp.bfloat16)."
            )
    num_tokens, _, head_dim = queries.shape
    if 0 in queries.shape:
        raise ValueError(f"queries: got shape {tuple(queries.shape)}, wanted at least one token, head and element.")
    if keys is not None and values is not None and tuple(keys.shape) != tuple(values.shape):
        raise ValueError(f"values: got shape {tuple(values.shape)}, wanted the keys' {tuple(keys.shape)}.")
    for name, array in (("keys", keys), ("values", values)):
        if array is not None and (array.shape[0], array.shape[2]) != (num_tokens, head_dim):
            raise ValueError(
                f"{name}: got shape {tuple(array.shape)}, wanted [{num_tokens}, kv_heads, {head_dim}] as the queries "
                "have."
            )


def distribution_of(num_seqs: Any) -> Any:
    """The number of rows of v2 as a distribution, of which kernels read the last entry; in NumPy where it is known."""
    xp: Any = jnp if isinstance(num_seqs, jax.Array) else np
    num_seqs = xp.asarray(num_seqs, xp.int32).reshape(-1)
    if num_seqs.shape != (1,):
        raise ValueError(f"num_seqs: got {num_seqs.size} numbers, wanted one: the number of rows in use.")
    return xp.broadcast_to(num_seqs, (3,))


def _check_index_arrays(context_lens: Any, query_start_loc: Any, block_tables: Any, distribution: Any) -> jax.Array:
    """Check the metadata, and return the block table as ``[rows, pages_per_row]``."""
    for name, array, ranks in (
        ("context_lens", context_lens, (1,)),
        ("query_start_loc", query_start_loc, (1,)),
        ("block_tables", block_tables, (1, 2)),
        ("distribution", distribution, (1,)),
    ):
        if not hasattr(array, "shape") or len(array.shape) not in ranks:
            raise ValueError(
                f"{name}: got {getattr(array, 'shape', type(array).__name__)}, wanted an array of rank {ranks[-1]}."
            )
        if array.dtype != np.int32:
            raise ValueError(f"{name}: got dtype {array.dtype}, wanted int32. Cast with .astype(jnp.int32).")
    num_rows = context_lens.shape[0]
    if not num_rows:
        raise ValueError("context_lens: got no rows, wanted at least one. Skip the call for an empty batch.")
    if query_start_loc.shape != (num_rows + 1,):
        raise ValueError(
            f"query_start_loc: got shape {tuple(query_start_loc.shape)}, wanted ({num_rows + 1},): a start for "
            f"each of the {num_rows} rows, and the end of the last."
        )
    if distribution.shape != (3,):
        raise ValueError(
            f"distribution: got shape {tuple(distribution.shape)}, wanted (3,): decode_end, prefill_end, total."
        )
    size = math.prod(block_tables.shape)
    if not size or size % num_rows or (len(block_tables.shape) == 2 and block_tables.shape[0] != num_rows):
        raise ValueError(
            f"block_tables: got shape {tuple(block_tables.shape)}, wanted [{num_rows}, pages_per_row] (or flat) "
            "with at least one page for each row of context_lens."
        )
    return jnp.asarray(block_tables).reshape(num_rows, size // num_rows)


def _check_known_lengths(
    context_lens: Any, query_start_loc: Any, distribution: Any, pages_per_row: int, page_size: int
) -> None:
    """Refuse lengths that exceed the block table, where all metadata is in NumPy and so has values while tracing.

    Rows that are dead or have no tokens are not looked at, here as in the kernels: what they hold may be stale.
    """
    if not all(isinstance(each, np.ndarray) for each in (context_lens, query_start_loc, distribution)):
        return
    live = np.arange(context_lens.size) < Distribution(*distribution).total
    used = live & (query_start_loc[1:] > query_start_loc[:-1])
    longest, capacity = int(np.max(context_lens, initial=0, where=used)), pages_per_row * page_size
    if longest > capacity:
        raise ValueError(
            f"block_tables: a context of {longest} tokens was given, wanted at most {capacity}: "
            f"{pages_per_row} pages of {page_size}. Widen the block table."
        )


def _sinks_per_head(softmax_aux: Any, num_q_heads: int, num_kv_heads: int) -> jax.Array:
    """One sink logit for each query head, float32 at least. Several sinks of a kv head become their logsumexp."""
    with np.errstate(over="ignore"):
        sinks = jnp.asarray(softmax_aux)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"softmax_aux: got dtype {sinks.dtype}, wanted a float dtype.")
    # The kernels hold them in float32. A sink that is infinite, or larger than that, is the largest number there.
    sinks = jnp.minimum(sinks.astype(np.promote_types(sinks.dtype, np.float32)), float(jnp.finfo(jnp.float32).max))
    if sinks.shape == (num_q_heads,):
        return sinks
    if sinks.ndim == 2 and sinks.shape[0] == num_kv_heads and sinks.shape[1] > 0:
        return jnp.repeat(jax.nn.logsumexp(sinks, axis=1), num_q_heads // num_kv_heads)
    raise ValueError(
        f"softmax_aux: got shape {sinks.shape}, wanted ({num_q_heads},): one logit for each query head, or "
        f"({num_kv_heads}, sinks): the sinks of each kv head."
    )


def _scale_per_head(name: str, scale: Any, request: AttentionRequest) -> jax.Array:
    """A factor for each kv head, float32."""
    num_kv_heads = request.num_kv_heads
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"{name}: got dtype {scale.dtype}, wanted a float dtype.")
    if tuple(scale.shape) not in ((), (num_kv_heads,)):
        raise ValueError(
            f"{name}: got shape {tuple(scale.shape)}, wanted ({num_kv_heads},): one factor for each kv head, or one "
            "number."
        )
    if isinstance(scale, np.ndarray):  # its numbers are known while tracing
        for factor in scale.reshape(-1).tolist():
            _check_logits_scale(request.softmax_scale, Options(**{name: factor}).k_scale)
    return jnp.broadcast_to(jnp.asarray(scale).astype(jnp.float32), (num_kv_heads,))
