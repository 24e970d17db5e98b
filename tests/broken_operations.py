"""Operations that are wrong in one way: the oracle with a single mistake of the kind that real kernels make.

:data:`BROKEN` has each with the part of the contract that runs on it, the test that must be the first to fail, and its
words. Those that stand in place of ``compute`` are mistakes of kernels, too: ``broken_kernels.py`` takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from contract_runs import Mistakes

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.testing.oracle import oracle_operation

Compute = Callable[..., tuple[np.ndarray, np.ndarray]]

BROKEN = Mistakes(replaces="compute")
V3_ONLY = ("v3",)

mistake = BROKEN.mistake


@functools.cache
def broken_operation(name: str, version: str) -> type:
    """The operation with the mistake of this name; one in place of ``compute`` gets the right function, too."""
    broken = BROKEN.named(name)
    right: Any = oracle_operation(version)
    member = broken.mistake
    if broken.replaces == "compute":

        def member(operation: Any, *args: Any) -> tuple[np.ndarray, np.ndarray]:
            return broken.mistake(functools.partial(right.compute, operation), *args)

    return type("BrokenOperation", (right,), {broken.replaces: member})


@mistake("window one too long", caught_by="test_values[window-1]", select="test_values and (decode or window)")
def window_off_by_one(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, options = args
    window = options.get("sliding_window")
    if isinstance(window, int):
        options = {**options, "sliding_window": window + 1}
    return right(*arrays, options)


@mistake(
    "window measured from the last query",
    caught_by="test_values[window-1]",
    select="test_values and (decode or window)",
)
def window_from_the_last_query(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, index, sinks, options = args
    output, pages = right(*arrays, index, sinks, options)
    if not isinstance(options.get("sliding_window"), int):
        return output, pages
    wider, _ = right(*arrays, index, sinks, {**options, "sliding_window": options["sliding_window"] + 1})
    for row in range(int(index[3].reshape(-1)[-1])):
        output[index[2][row] : max(index[2][row], index[2][row + 1] - 1)] = wider[
            index[2][row] : max(index[2][row], index[2][row + 1] - 1)
        ]
    return output, pages


def without(option: str) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def compute(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
        *arrays, options = args
        return right(*arrays, {name: value for name, value in options.items() if name != option})

    return compute


mistake("window ignored", caught_by="test_values[all-options]", select="test_values and (decode or all-options)")(
    without("sliding_window")
)
mistake("chunks ignored", caught_by="test_values[chunk-1]", select="test_values and (decode or chunk)")(
    without("attention_chunk_size")
)


@mistake("chunks as a window", caught_by="test_values[chunk-5]", select="test_values and (decode or chunk)")
def chunks_as_a_window(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, options = args
    size = options.get("attention_chunk_size")
    if size is not None:
        options = {**options, "attention_chunk_size": None, "sliding_window": size}
    return right(*arrays, options)


mistake(
    "pages written although they are another layer's",
    caught_by="test_values[pages-as-they-are]",
    select="test_values and (decode or as-they-are)",
    says="NaN|largest error",
    versions=V3_ONLY,
)(without("update_pages"))
mistake("soft cap ignored", caught_by="test_values[soft-cap]", select="test_values and (mixed or soft-cap)")(
    without("logits_soft_cap")
)
mistake("softmax_scale ignored", caught_by="test_values[softmax-scale]", select="test_values and (mixed or softmax)")(
    without("softmax_scale")
)


@mistake("sinks ignored", caught_by="test_values[sinks]", select="test_values and (mixed or sinks)")
def without_sinks(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, _, options = args
    return right(*arrays, None, options)


def with_table(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Attention through a wrong table; the new tokens are written through the right one."""

    def compute(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
        *arrays, index, sinks, options = args
        _, pages = right(*arrays, index, sinks, options)
        query, key, value, _ = arrays
        lens, tables, starts, last = index
        with mock.patch.object(reference, "write_tokens"):  # the pages are up to date
            output, _ = right(query, key, value, pages, (lens, change(tables), starts, last), sinks, options)
        return output, pages

    return compute


@mistake(
    "the next row's page", caught_by="test_values[decode]", select="test_values and decode", says="NaN|largest error"
)
@with_table
def next_rows_page(tables: np.ndarray) -> np.ndarray:
    return np.roll(tables, -1, axis=0)


@mistake("table slices clamped", caught_by="test_values[table-65-pages]", select="test_values and (mixed or table)")
@with_table
def clamped_slices(tables: np.ndarray) -> np.ndarray:
    """Blocks of 64 entries, the last of them read from where a whole block fits."""
    width = tables.shape[1]
    if width <= 64:
        return tables
    entries = np.arange(width)
    return tables[:, np.minimum(entries // 64 * 64, width - 64) + entries % 64]


@mistake(
    "padding written",
    caught_by="test_other_slots_keep_their_bytes[decode]",
    select="(test_values or stored or slots) and decode",
    says="changed",
    versions=V3_ONLY,
)
def padding_written(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    query, key, value, pages, index, *_ = args
    output, pages = right(*args)
    live = int(index[2][int(index[3].reshape(-1)[-1])])
    if live < len(query):  # where a slot mapping of zeros sends them
        reference.write_tokens(pages, np.array([0]), 0, key[live : live + 1], value[live : live + 1])
    return output, pages


@mistake("sums in bfloat16", caught_by="test_values[bfloat16-long-sum]", select="test_values and long-sum")
def sums_in_bfloat16(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    def attend_one(
        query: Any, keys: Any, values: Any, scale: float, cap: float | None, sinks: Any
    ) -> tuple[np.ndarray, float]:
        logits = keys @ query * scale
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        highest = max(logits.max(initial=-np.inf), sinks.max(initial=-np.inf))
        total = np.exp(sinks - highest).sum()
        weighted = np.zeros(values.shape[1], ml_dtypes.bfloat16)
        for first in range(0, len(keys), 16):
            block = np.exp(logits[first : first + 16] - highest)
            total = (total + block.sum()).astype(ml_dtypes.bfloat16)
            weighted = (weighted + block @ values[first : first + 16]).astype(ml_dtypes.bfloat16)
        return weighted.astype(np.float64) / float(total), highest + np.log(float(total))

    with mock.patch.object(reference, "_attend_one", attend_one):
        return right(*args)


@mistake(
    "compute_dtype=None means bfloat16", caught_by="test_compute_dtype_none_keeps_precision", select="compute_dtype"
)
def bfloat16_unless_told(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    query, *rest = args
    return right(query.astype(ml_dtypes.bfloat16).astype(query.dtype), *rest)


@mistake(
    "NaN where nothing is seen",
    caught_by="test_padding_tokens_are_zero[decode]",
    select="(test_values or padding) and decode",
    says="padding tokens: got values up to nan",
)
def nan_where_nothing_is_seen(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    output, pages = right(*args)
    output[~output.any(axis=(1, 2))] = np.nan
    return output, pages


@mistake(
    "dead rows attended",
    caught_by="test_padding_tokens_are_zero[dead-rows-claim-tokens]",
    select="padding and (mixed or dead)",
    says="padding tokens",
)
def all_rows_live(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, (lens, tables, starts, last), sinks, options = args
    return right(*arrays, (lens, tables, starts, np.full_like(last, len(lens))), sinks, options)


@mistake(
    "dead slots multiplied by 0",
    caught_by="test_values[decode]",
    select="test_values and (decode or mixed)",
    says="NaN in tokens",
)
def masked_values_are_multiplied(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    _, _, _, _, (lens, tables, starts, last), *_ = args
    output, pages = right(*args)
    page_size = pages.shape[1]
    for row in range(int(last.reshape(-1)[-1])):
        if starts[row] < starts[row + 1]:
            whole_page = pages[tables[row, (lens[row] - 1) // page_size]].astype(np.float64)
            output[starts[row] : starts[row + 1]] += (0.0 * whole_page).sum()
    return output, pages


@mistake("heads grouped the wrong way round", caught_by="test_values[decode]", select="test_values and decode")
def heads_interleaved(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    query, key, *rest = args
    heads, kv_heads = query.shape[1], key.shape[1]
    order = np.arange(heads).reshape(kv_heads, -1).T.reshape(-1)  # head h served as if it read kv head h % kv_heads
    output, pages = right(query[:, np.argsort(order)], key, *rest)
    return output[:, order], pages


@mistake(
    "page boundary missed when writing",
    caught_by="test_new_tokens_are_stored[page-boundaries]",
    select="stored and (decode or boundaries)",
    says="wrong bytes",
    versions=V3_ONLY,
)
def page_boundary_missed(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    def write_tokens(pages: Any, table: Any, first: int, keys: Any, values: Any) -> None:
        stuck = table.copy()
        stuck[first // pages.shape[1] :] = table[first // pages.shape[1]]
        with mock.patch.object(reference, "write_tokens", original):
            original(pages, stuck, first, keys, values)

    original = reference.write_tokens
    with mock.patch.object(reference, "write_tokens", write_tokens):
        return right(*args)


@mistake(
    "table ids clipped instead of refused",
    caught_by="test_invalid_row[None-page past the cache]",
    select="invalid",
    says="",
)
def table_ids_clipped(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, (lens, tables, starts, last), sinks, options = args
    return right(*arrays, (lens, np.clip(tables, 0, len(arrays[3]) - 1), starts, last), sinks, options)


@mistake(
    "float8 overflows",
    caught_by="test_values[float8-saturates]",
    select="test_values and float8",
    says="NaN",
    versions=V3_ONLY,
)
def no_saturation(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    with mock.patch.object(reference, "_cast_to_cache", lambda values, dtype: values.astype(dtype)):
        return right(*args)


@mistake(
    "page ids reach the result",
    caught_by="test_relabelling_pages_changes_nothing",
    select="relabelling",
    says="array_equal",
)
def page_ids_matter(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    output, pages = right(*args)
    _, tables, starts, _ = args[4]
    output[starts[0] : starts[1]] *= 1 + 1e-6 * tables[0, 0]
    return output, pages


@mistake(
    "cached tokens hidden from prefill",
    caught_by="test_prefill_in_chunks_equals_prefill_in_one",
    select="chunks_equals or hashable",
)
def cached_tokens_hidden_from_prefill(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, index, sinks, options = args
    lens, _, starts, last = index
    output, pages = right(*arrays, index, sinks, options)
    for row in range(int(last.reshape(-1)[-1])):
        new = starts[row + 1] - starts[row]
        if 1 < new < lens[row]:
            own, _ = right(*arrays, index, sinks, {**options, "sliding_window": int(new)})
            output[starts[row] : starts[row + 1]] = own[starts[row] : starts[row + 1]]
    return output, pages


@mistake(
    "decode loses its first key", caught_by="test_decode_equals_the_last_token_of_a_prefill", select="decode_equals"
)
@mistake("chance meeting with the oracle", caught_by="test_any_batch_agrees_with_the_oracle", select="any_batch")
def decode_loses_its_first_key(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, index, sinks, options = args
    lens, _, starts, last = index
    output, pages = right(*arrays, index, sinks, options)
    for row in range(int(last.reshape(-1)[-1])):
        if starts[row + 1] - starts[row] == 1 and lens[row] > 1:
            short, _ = right(*arrays, index, sinks, {**options, "sliding_window": int(lens[row]) - 1})
            output[starts[row]] = short[starts[row]]
    return output, pages


@mistake("decodes told by their place", caught_by="test_row_order_changes_nothing", select="row_order")
def second_row_is_a_decode(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    """As a kernel that tells decodes by their place: of the second row it answers the first token alone."""
    output, pages = right(*args)
    _, _, starts, last = args[4]
    if int(last.reshape(-1)[-1]) > 1:
        output[starts[1] + 1 : starts[2]] = 0
    return output, pages


@mistake("table width reaches the result", caught_by="test_wider_table_changes_nothing", select="wider")
def reads_the_last_entry(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    """As a kernel that takes the table's width for the length of a context."""
    output, pages = right(*args)
    return output * (1 + 1e-3 * args[4][1].shape[1]), pages


@mistake(
    "large windows overflow",
    caught_by="test_window_past_the_context_equals_none[1000000]",
    select="window_past_the_context",
)
def large_windows_overflow(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, options = args
    window = options.get("sliding_window")
    return right(*arrays, {**options, "sliding_window": 1} if isinstance(window, int) and window > 2**15 else options)


@mistake(
    "stale view",
    caught_by="test_view_that_went_in_holds_the_pages",
    select="test_values or holds_the_pages",
    says="assert",
    replaces="store",
    versions=V3_ONLY,
)
def stale_view(operation: Any, cache_view: Any, pages: Any) -> Any:
    return cache_view.replace(kv_pages=pages)  # a new view is right, the one that models go on using is not


@mistake(
    "view not returned",
    caught_by="test_view_that_went_in_holds_the_pages",
    select="holds_the_pages",
    says="none",
    replaces="store",
    versions=V3_ONLY,
)
def no_view(operation: Any, cache_view: Any, pages: Any) -> Any:
    cache_view.kv_pages = pages


@mistake(
    "only the host's own view class",
    caught_by="test_forwarding_view",
    select="holds_the_pages or forwarding",
    says="assert",
    replaces="store",
    versions=V3_ONLY,
)
def exact_view_class_only(operation: Any, cache_view: Any, pages: Any) -> Any:
    if hasattr(cache_view, "replace"):
        cache_view.kv_pages = pages
    return cache_view


@mistake(
    "unknown arguments dropped",
    caught_by="test_unknown_argument_is_refused",
    select="argument or hashable",
    says="DID NOT RAISE",
    replaces="__call__",
)
def drops_unknown_arguments(operation: Any, **arguments: Any) -> Any:
    arguments.pop("no_such_option", None)
    return super(type(operation), operation).__call__(**arguments)


@mistake(
    "result in float32",
    caught_by="test_result_has_the_shape_and_dtype_of_the_queries",
    select="test_result",
    says="float32",
    replaces="__call__",
)
def float32_result(operation: Any, **arguments: Any) -> Any:
    output = super(type(operation), operation).__call__(**arguments)
    output.attention_outputs = output.attention_outputs.astype(np.float32)
    return output


def any_cache(cls: type, mode: Any = None) -> Any:
    from easydel_ragged_plugin import host

    loaded = host.load()
    return loaded.RequirementsBuilder("broken").support_cache(loaded.CacheType.RAGGED_PAGES).build()


mistake(
    "requirements left empty",
    caught_by="test_requirements",
    select="requirements",
    says="required metadata",
    replaces="get_requirements",
)(classmethod(any_cache))
mistake(
    "objects without a hash",
    caught_by="test_objects_are_hashable",
    select="hashable",
    says="unhashable",
    replaces="__hash__",
)(None)
mistake(
    "a forward method missing",
    caught_by="test_forward_methods_agree[cuda]",
    select="forward_methods",
    says="NotImplementedError|missing",
    replaces="forward_cuda",
)(None)
