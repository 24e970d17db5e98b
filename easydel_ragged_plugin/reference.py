"""The definition of ragged page attention, in plain float64 NumPy.

Every kernel is measured against this oracle, so it is slow and simple on purpose: it loops over rows, tokens and heads
(only the keys of one query are handled together), and it shares no code with the kernels or with the layout module. It
reads nothing that is masked.

The two functions take the arguments of the public functions of the same name, options as keywords or as one
:class:`~easydel_ragged_plugin.options.Options`. Options that choose how a result is computed (``compute_dtype``,
``optimized``, ...) change nothing here.

Its rules:

* Row r has the tokens ``[query_start_loc[r], query_start_loc[r + 1])``. Its i-th query is at position
  ``context_lens[r] - number_of_queries + i`` and sees the keys at positions up to its own. A sliding window of N
  leaves the last N of them; chunks of N tokens leave those of its own chunk, which begins at a multiple of N.
* Tokens of no live row give zeros. So do all tokens of an invalid row: one whose lengths are negative,
  run backwards, pass the table or the tokens, or whose table names a page that does not exist among the
  pages it needs. An invalid row writes nothing.
* v3 writes only the slots of live tokens, or none with ``update_pages=False``. There, elements past ``head_dim`` and
  heads that exist only to fill a group of 32 bits become zeros; every other slot keeps its bytes.
* The logsumexp of a token and head is the natural logarithm of the softmax's sum before it is divided by: of
  ``exp(logit)`` over the keys that are seen and the sinks. It is -inf for tokens of no live row.
* A sink of -inf is none. One that is larger than every float32 counts as the largest of them.
* ``k_scale`` and ``v_scale`` are numbers, or arrays with one for each kv head.
* float8 caches saturate at the largest finite number, int8 caches round to the nearest of -127 to 127. Wider caches
  round as NumPy does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .options import Options

__all__ = ["ragged_page_attention_v2", "ragged_page_attention_v3", "write_tokens"]

_FLOAT8 = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3",
    "float8_e3m4",
)
_LARGEST_SINK = float(np.finfo(np.float32).max)


def _first_visible(position: int, options: Options) -> int:
    """Lowest position that a query at ``position`` sees."""
    window, chunk = options.sliding_window, options.attention_chunk_size
    first = 0 if chunk is None else position // chunk * chunk
    if window is None or (isinstance(window, tuple) and window[0] == -1):
        return first
    before = window - 1 if isinstance(window, int) else window[0]
    return max(first, position - before)


def _cast_to_cache(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.name in _FLOAT8:
        largest = float(ml_dtypes.finfo(dtype).max)
        values = np.clip(values.astype(np.float32), -largest, largest)
    if dtype == np.int8 and values.dtype != np.int8:
        values = np.clip(np.rint(values.astype(np.float64)), -127, 127)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _key_and_value_place(head: int, head_dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(stored head, first element) of the key and of the value of a kv head in a v3 page with its heads flattened."""
    if head_dim == 64:
        return (head, 0), (head, 64)
    return (2 * head, 0), (2 * head + 1, 0)


def write_tokens(
    pages: np.ndarray, table_row: np.ndarray, first_position: int, keys: np.ndarray, values: np.ndarray
) -> None:
    """Store keys and values ``[n, kv_heads, head_dim]`` of one row at positions ``first_position`` and up, in place.

    Takes v2 pages (four dimensions) and v3 pages (five). All bytes of a written slot are set.
    """
    num_pages, page_size = pages.shape[:2]
    head_dim = keys.shape[2]
    flat = pages.reshape(num_pages, page_size, -1, pages.shape[-1])  # a view: writing it writes `pages`
    keys, values = _cast_to_cache(keys, pages.dtype), _cast_to_cache(values, pages.dtype)
    for index in range(len(keys)):
        position = first_position + index
        slot = flat[table_row[position // page_size], position % page_size]
        slot[...] = np.zeros((), pages.dtype)
        for head in range(keys.shape[1]):
            if pages.ndim == 4:
                slot[2 * head], slot[2 * head + 1] = keys[index, head], values[index, head]
                continue
            (k_head, k_start), (v_head, v_start) = _key_and_value_place(head, head_dim)
            slot[k_head, k_start : k_start + head_dim] = keys[index, head]
            slot[v_head, v_start : v_start + head_dim] = values[index, head]


def _live_rows(
    num_tokens: int,
    num_pages: int,
    page_size: int,
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    query_start_loc: np.ndarray,
    total: int,
    options: Options,
) -> list[tuple[int, int, int, int]]:
    """(row, first token, number of queries, context length) of each row that has queries and is valid."""
    rows = []
    for row in range(min(max(total, 0), len(context_lens))):
        start, end = int(query_start_loc[row]), int(query_start_loc[row + 1])
        context, count = int(context_lens[row]), end - start
        if count <= 0 or start < 0 or end > num_tokens:
            continue
        if context < count or context > block_tables.shape[1] * page_size:
            continue
        lowest = _first_visible(context - count, options)
        needed = block_tables[row, lowest // page_size : (context - 1) // page_size + 1]
        if np.any(needed < 0) or np.any(needed >= num_pages):
            continue
        rows.append((row, start, count, context))
    return rows


def _sinks_of_head(softmax_aux: np.ndarray | None, head: int, group: int) -> np.ndarray:
    if softmax_aux is None:
        return np.zeros(0)
    if softmax_aux.ndim == 1:
        sinks = softmax_aux[head : head + 1].astype(np.float64)
    else:
        sinks = softmax_aux[head // group].astype(np.float64)
    return np.minimum(sinks, _LARGEST_SINK)


def _scale_of_head(scale: np.ndarray | float | None, kv_head: int) -> float:
    if scale is None:
        return 1.0
    numbers = np.asarray(scale, np.float64).reshape(-1)
    return float(numbers[kv_head if len(numbers) > 1 else 0])


def _kv_heads_of_pages(num_q_heads: int, head_dim: int, groups: int, pack: int) -> int:
    """Kv heads of v3 pages, for calls without keys: the only number that fills these groups of 32 bits."""
    heads_of_one = 1 if head_dim == 64 else 2
    found = [
        heads
        for heads in range(1, groups * pack + 1)
        if -(-heads * heads_of_one // pack) == groups and num_q_heads % heads == 0
    ]
    if len(found) != 1:
        raise ValueError(f"keys: got None, and the pages can have {found} kv heads. Pass keys.")
    return found[0]


def _options(options: Options | None, keywords: dict[str, Any]) -> tuple[Options, dict[str, np.ndarray | float | None]]:
    """The options, and the scales: those that are arrays are no part of the options."""
    scales = {name: keywords.get(name) for name in ("k_scale", "v_scale")}
    arrays = [name for name, scale in scales.items() if scale is not None and np.ndim(scale) > 0]
    numbers = {name: value for name, value in keywords.items() if name not in arrays}
    options = Options(**numbers) if options is None else options
    return options, {name: scales[name] if name in arrays else getattr(options, name) for name in scales}


def _attend_one(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, soft_cap: float | None, sinks: np.ndarray
) -> tuple[np.ndarray, float]:
    """Output and logsumexp of one query ``[D]`` over the keys and values ``[n, D]`` that it sees."""
    with np.errstate(invalid="ignore"):  # keys and values may hold infinities and NaN
        logits = keys @ query * scale
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        highest = max(logits.max(initial=-np.inf), sinks.max(initial=-np.inf))
        weights = np.exp(logits - highest)
        total = weights.sum() + np.exp(sinks - highest).sum()
        return weights @ values / total, highest + math.log(total)


def _attend(
    queries: np.ndarray,
    read: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    num_kv_heads: int,
    page_size: int,
    rows: list[tuple[int, int, int, int]],
    block_tables: np.ndarray,
    softmax_aux: np.ndarray | None,
    options: Options,
    scales: dict[str, np.ndarray | float | None],
) -> tuple[np.ndarray, np.ndarray]:
    num_q_heads, head_dim = queries.shape[1:]
    group = num_q_heads // num_kv_heads
    scale = 1.0 / math.sqrt(head_dim) if options.softmax_scale is None else options.softmax_scale
    output = np.zeros(queries.shape, np.float64)
    lse = np.full(queries.shape[:2], -np.inf)
    for row, start, count, context in rows:
        for index in range(count):
            position = context - count + index
            seen = np.arange(_first_visible(position, options), position + 1)
            pages, slots = block_tables[row, seen // page_size], seen % page_size
            for head in range(num_q_heads):
                keys, values = read(pages, slots, head // group)
                output[start + index, head], lse[start + index, head] = _attend_one(
                    queries[start + index, head].astype(np.float64),
                    keys.astype(np.float64) * _scale_of_head(scales["k_scale"], head // group),
                    values.astype(np.float64) * _scale_of_head(scales["v_scale"], head // group),
                    scale,
                    options.logits_soft_cap,
                    _sinks_of_head(softmax_aux, head, group),
                )
    return output, lse


def ragged_page_attention_v2(
    queries: np.ndarray,
    kv_pages: np.ndarray,
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    query_start_loc: np.ndarray,
    num_seqs: np.ndarray | int,
    softmax_aux: np.ndarray | None = None,
    /,
    *,
    options: Options | None = None,
    return_lse: bool = False,
    **keywords: Any,
) -> Any:
    """Attention over pages ``[pages, page_size, 2 * kv_heads, head_dim]``: K in even heads, V in odd ones.

    Args:
        queries: ``[tokens, q_heads, head_dim]``.
        kv_pages: pages that already hold the new keys and values.
        context_lens: ``[rows]``, new tokens included.
        block_tables: ``[rows, pages_per_row]`` page ids, or flat.
        query_start_loc: ``[rows + 1]``.
        num_seqs: number of live rows, a scalar or ``[1]``.
        softmax_aux: sink logits, ``[q_heads]`` or ``[kv_heads, n]``.
        options, **keywords: the options, as one object or as keywords. Scales that are arrays are keywords in any case.
        return_lse: whether to return the logsumexp as well.

    Returns:
        ``[tokens, q_heads, head_dim]`` float64; with ``return_lse`` a pair of it and ``[tokens, q_heads]`` float64.
    """
    options, scales = _options(options, keywords)
    queries, kv_pages = np.asarray(queries), np.asarray(kv_pages)
    context_lens, query_start_loc = np.asarray(context_lens), np.asarray(query_start_loc)
    block_tables = np.asarray(block_tables).reshape(len(context_lens), -1)
    softmax_aux = None if softmax_aux is None else np.asarray(softmax_aux)
    num_pages, page_size, combined_heads, _ = kv_pages.shape
    rows = _live_rows(
        len(queries),
        num_pages,
        page_size,
        context_lens,
        block_tables,
        query_start_loc,
        int(np.asarray(num_seqs).reshape(-1)[0]),
        options,
    )

    def read(pages: np.ndarray, slots: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        return kv_pages[pages, slots, 2 * head], kv_pages[pages, slots, 2 * head + 1]

    heads = combined_heads // 2
    output, lse = _attend(queries, read, heads, page_size, rows, block_tables, softmax_aux, options, scales)
    return (output, lse) if return_lse else output


def ragged_page_attention_v3(
    queries: np.ndarray,
    keys: np.ndarray | None,
    values: np.ndarray | None,
    kv_pages: np.ndarray,
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    query_start_loc: np.ndarray,
    distribution: np.ndarray,
    softmax_aux: np.ndarray | None = None,
    /,
    *,
    options: Options | None = None,
    return_lse: bool = False,
    **keywords: Any,
) -> Any:
    """Write the new keys and values of live tokens into a copy of the pages, then attend over it.

    Pages are ``[pages, page_size, groups, pack, width]``. With groups and pack flattened to stored heads,
    stored head 2h has the key of kv head h and 2h + 1 its value, in the first ``head_dim`` elements; where head_dim is
    64, stored head h has the key in elements 0-63 and the value in elements 64-127.

    Args:
        queries: ``[tokens, q_heads, head_dim]``.
        keys, values: ``[tokens, kv_heads, head_dim]``, stored as given after a cast to the cache's dtype. With
            ``update_pages=False`` only the keys' shape is read, and both may be None.
        kv_pages: pages before the new tokens; not changed.
        distribution: ``[3]``; its last entry is the number of live rows.
        context_lens, block_tables, query_start_loc, softmax_aux, options, **keywords, return_lse: as for v2.

    Returns:
        ``[tokens, q_heads, head_dim]`` float64, and the new pages in the cache's dtype; with ``return_lse`` also
        ``[tokens, q_heads]`` float64.
    """
    options, scales = _options(options, keywords)
    queries, kv_pages = np.asarray(queries), np.asarray(kv_pages)
    context_lens, query_start_loc = np.asarray(context_lens), np.asarray(query_start_loc)
    block_tables = np.asarray(block_tables).reshape(len(context_lens), -1)
    softmax_aux = None if softmax_aux is None else np.asarray(softmax_aux)
    num_pages, page_size, groups, pack, width = kv_pages.shape
    head_dim = queries.shape[2]
    num_kv_heads = _kv_heads_of_pages(queries.shape[1], head_dim, groups, pack) if keys is None else keys.shape[1]
    rows = _live_rows(
        len(queries),
        num_pages,
        page_size,
        context_lens,
        block_tables,
        query_start_loc,
        int(np.asarray(distribution)[2]),
        options,
    )
    updated = kv_pages.copy()
    flat = updated.reshape(num_pages, page_size, groups * pack, width)
    if options.update_pages:
        keys, values = np.asarray(keys), np.asarray(values)
        for row, start, count, context in rows:
            new = slice(start, start + count)
            write_tokens(updated, block_tables[row], context - count, keys[new], values[new])

    def read(pages: np.ndarray, slots: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        (k_head, k_start), (v_head, v_start) = _key_and_value_place(head, head_dim)
        return (
            flat[pages, slots, k_head, k_start : k_start + head_dim],
            flat[pages, slots, v_head, v_start : v_start + head_dim],
        )

    output, lse = _attend(queries, read, num_kv_heads, page_size, rows, block_tables, softmax_aux, options, scales)
    return (output, updated, lse) if return_lse else (output, updated)
