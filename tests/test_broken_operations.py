"""The contract kit catches operations that are wrong in one way.

Each one below is the oracle as an operation (which passes the whole contract, see ``test_contract.py``) with a
single mistake of the kind that real kernels make. For each it is stated which part of the contract runs and which
test must be the first to fail, with which words. So a test that has lost its teeth shows here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.testing.oracle import oracle_operation

pytestmark = pytest.mark.host

Compute = Callable[..., tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Broken:
    """A mistake and who must find it.

    ``compute`` replaces the oracle's function: it gets that function and its arguments. ``members`` replaces
    members of the operation class. ``select`` is the part of the contract that runs (pytest's ``-k``).
    """

    name: str
    caught_by: str
    says: str
    select: str
    compute: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None
    members: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: tuple[str, ...] = ("v2", "v3")

    def operation(self, version: str) -> type:
        """The broken class."""
        base = oracle_operation(version)
        members = dict(self.members)
        if self.compute is not None:
            wrong = self.compute

            def compute(
                operation: Any,
                query: np.ndarray,
                key: np.ndarray,
                value: np.ndarray,
                pages: np.ndarray,
                index: tuple[np.ndarray, ...],
                sinks: np.ndarray | None,
                options: dict[str, Any],
            ) -> tuple[np.ndarray, np.ndarray]:
                right = super(broken, operation).compute
                return wrong(right, query, key, value, pages, index, sinks, options)

            members["compute"] = compute
        broken = type("BrokenOperation", (base,), members)
        return broken


def _window_off_by_one(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, options = args
    window = options.get("sliding_window")
    if isinstance(window, int):
        options = {**options, "sliding_window": window + 1}
    return right(*arrays, options)


def _window_from_the_last_query(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
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


def _without(option: str) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def compute(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
        *arrays, options = args
        return right(*arrays, {name: value for name, value in options.items() if name != option})

    return compute


def _without_sinks(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, _, options = args
    return right(*arrays, None, options)


def _with_table(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
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


def _next_rows_page(tables: np.ndarray) -> np.ndarray:
    return np.roll(tables, -1, axis=0)


def _clamped_slices(tables: np.ndarray) -> np.ndarray:
    """Blocks of 64 entries, the last of them read from where a whole block fits."""
    width = tables.shape[1]
    if width <= 64:
        return tables
    entries = np.arange(width)
    return tables[:, np.minimum(entries // 64 * 64, width - 64) + entries % 64]


def _padding_written(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    query, key, value, pages, index, *_ = args
    output, pages = right(*args)
    live = int(index[2][int(index[3].reshape(-1)[-1])])
    if live < len(query):  # where a slot mapping of zeros sends them
        reference.write_tokens(pages, np.array([0]), 0, key[live : live + 1], value[live : live + 1])
    return output, pages


def _sums_in_bfloat16(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    def attend_one(query: Any, keys: Any, values: Any, scale: float, cap: float | None, sinks: Any) -> np.ndarray:
        logits = keys @ query * scale
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        highest = max(logits.max(initial=-np.inf), sinks.max(initial=-np.inf))
        total = np.exp(sinks - highest).sum()
        weighted = np.zeros(values.shape[1], ml_dtypes.bfloat16)
        for first in range(0, len(keys), 16):
            block = np.exp(logits[first : first + 16] - highest)
            total = (total + block.sum()).astype(ml_dtypes.bfloat16)
            weighted = (weighted + block @ values[first : first + 16]).astype(ml_dtypes.bfloat16)
        return weighted.astype(np.float64) / float(total)

    with mock.patch.object(reference, "_attend_one", attend_one):
        return right(*args)


def _bfloat16_unless_told(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    query, *rest = args
    return right(query.astype(ml_dtypes.bfloat16).astype(query.dtype), *rest)


def _nan_where_nothing_is_seen(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    output, pages = right(*args)
    output[~output.any(axis=(1, 2))] = np.nan
    return output, pages


def _all_rows_live(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, (lens, tables, starts, last), sinks, options = args
    return right(*arrays, (lens, tables, starts, np.full_like(last, len(lens))), sinks, options)


def _masked_values_are_multiplied(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    _, _, _, _, (lens, tables, starts, last), *_ = args
    output, pages = right(*args)
    page_size = pages.shape[1]
    for row in range(int(last.reshape(-1)[-1])):
        if starts[row] < starts[row + 1]:
            whole_page = pages[tables[row, (lens[row] - 1) // page_size]].astype(np.float64)
            output[starts[row] : starts[row + 1]] += (0.0 * whole_page).sum()
    return output, pages


def _heads_interleaved(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    query, key, *rest = args
    heads, kv_heads = query.shape[1], key.shape[1]
    order = np.arange(heads).reshape(kv_heads, -1).T.reshape(-1)  # head h served as if it read kv head h % kv_heads
    output, pages = right(query[:, np.argsort(order)], key, *rest)
    return output[:, order], pages


def _page_boundary_missed(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    def write_tokens(pages: Any, table: Any, first: int, keys: Any, values: Any) -> None:
        stuck = table.copy()
        stuck[first // pages.shape[1] :] = table[first // pages.shape[1]]
        with mock.patch.object(reference, "write_tokens", original):
            original(pages, stuck, first, keys, values)

    original = reference.write_tokens
    with mock.patch.object(reference, "write_tokens", write_tokens):
        return right(*args)


def _table_ids_clipped(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, (lens, tables, starts, last), sinks, options = args
    return right(*arrays, (lens, np.clip(tables, 0, len(arrays[3]) - 1), starts, last), sinks, options)


def _no_saturation(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    with mock.patch.object(reference, "_cast_to_cache", lambda values, dtype: values.astype(dtype)):
        return right(*args)


def _page_ids_matter(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    output, pages = right(*args)
    _, tables, starts, _ = args[4]
    output[starts[0] : starts[1]] *= 1 + 1e-6 * tables[0, 0]
    return output, pages


def _cached_tokens_hidden_from_prefill(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, index, sinks, options = args
    lens, _, starts, last = index
    output, pages = right(*arrays, index, sinks, options)
    for row in range(int(last.reshape(-1)[-1])):
        new = starts[row + 1] - starts[row]
        if 1 < new < lens[row]:
            own, _ = right(*arrays, index, sinks, {**options, "sliding_window": int(new)})
            output[starts[row] : starts[row + 1]] = own[starts[row] : starts[row + 1]]
    return output, pages


def _decode_loses_its_first_key(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, index, sinks, options = args
    lens, _, starts, last = index
    output, pages = right(*arrays, index, sinks, options)
    for row in range(int(last.reshape(-1)[-1])):
        if starts[row + 1] - starts[row] == 1 and lens[row] > 1:
            short, _ = right(*arrays, index, sinks, {**options, "sliding_window": int(lens[row]) - 1})
            output[starts[row]] = short[starts[row]]
    return output, pages


def _second_row_is_a_decode(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    """As a kernel that tells decodes by their place: of the second row it answers the first token alone."""
    output, pages = right(*args)
    _, _, starts, last = args[4]
    if int(last.reshape(-1)[-1]) > 1:
        output[starts[1] + 1 : starts[2]] = 0
    return output, pages


def _reads_the_last_entry(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    """As a kernel that takes the table's width for the length of a context."""
    output, pages = right(*args)
    return output * (1 + 1e-3 * args[4][1].shape[1]), pages


def _large_windows_overflow(right: Compute, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    *arrays, options = args
    window = options.get("sliding_window")
    return right(*arrays, {**options, "sliding_window": 1} if isinstance(window, int) and window > 2**15 else options)


def _stale_view(operation: Any, cache_view: Any, pages: Any) -> Any:
    return cache_view.replace(kv_pages=pages)  # a new view is right, the one that models go on using is not


def _no_view(operation: Any, cache_view: Any, pages: Any) -> Any:
    cache_view.kv_pages = pages


def _exact_view_class_only(operation: Any, cache_view: Any, pages: Any) -> Any:
    if hasattr(cache_view, "replace"):
        cache_view.kv_pages = pages
    return cache_view


def _drops_unknown_arguments(operation: Any, **arguments: Any) -> Any:
    arguments.pop("no_such_option", None)
    return super(type(operation), operation).__call__(**arguments)


def _float32_result(operation: Any, **arguments: Any) -> Any:
    output = super(type(operation), operation).__call__(**arguments)
    output.attention_outputs = output.attention_outputs.astype(np.float32)
    return output


def _any_cache(cls: type, mode: Any = None) -> Any:
    from easydel_ragged_plugin import host

    loaded = host.load()
    return loaded.RequirementsBuilder("broken").support_cache(loaded.CacheType.RAGGED_PAGES).build()


V3_ONLY = ("v3",)
BROKEN = (
    Broken(
        "window one too long",
        caught_by="test_values[window-1]",
        says="largest error",
        select="test_values and (decode or window)",
        compute=_window_off_by_one,
    ),
    Broken(
        "window measured from the last query",
        caught_by="test_values[window-1]",
        says="largest error",
        select="test_values and (decode or window)",
        compute=_window_from_the_last_query,
    ),
    Broken(
        "window ignored",
        caught_by="test_values[all-options]",
        says="largest error",
        select="test_values and (decode or all-options)",
        compute=_without("sliding_window"),
    ),
    Broken(
        "sinks ignored",
        caught_by="test_values[sinks]",
        says="largest error",
        select="test_values and (mixed or sinks)",
        compute=_without_sinks,
    ),
    Broken(
        "soft cap ignored",
        caught_by="test_values[soft-cap]",
        says="largest error",
        select="test_values and (mixed or soft-cap)",
        compute=_without("logits_soft_cap"),
    ),
    Broken(
        "softmax_scale ignored",
        caught_by="test_values[softmax-scale]",
        says="largest error",
        select="test_values and (mixed or softmax)",
        compute=_without("softmax_scale"),
    ),
    Broken(
        "the next row's page",
        caught_by="test_values[decode]",
        says="NaN|largest error",
        select="test_values and decode",
        compute=_with_table(_next_rows_page),
    ),
    Broken(
        "table slices clamped",
        caught_by="test_values[table-65-pages]",
        says="largest error",
        select="test_values and (mixed or table)",
        compute=_with_table(_clamped_slices),
    ),
    Broken(
        "sums in bfloat16",
        caught_by="test_values[bfloat16-long-sum]",
        says="largest error",
        select="test_values and long-sum",
        compute=_sums_in_bfloat16,
    ),
    Broken(
        "compute_dtype=None means bfloat16",
        caught_by="test_compute_dtype_none_keeps_precision",
        says="largest error",
        select="compute_dtype",
        compute=_bfloat16_unless_told,
    ),
    Broken(
        "NaN where nothing is seen",
        caught_by="test_padding_tokens_are_zero[decode]",
        says="padding tokens: got values up to nan",
        select="(test_values or padding) and decode",
        compute=_nan_where_nothing_is_seen,
    ),
    Broken(
        "dead rows attended",
        caught_by="test_padding_tokens_are_zero[dead-rows-claim-tokens]",
        says="padding tokens",
        select="padding and (mixed or dead)",
        compute=_all_rows_live,
    ),
    Broken(
        "dead slots multiplied by 0",
        caught_by="test_values[decode]",
        says="NaN in tokens",
        select="test_values and (decode or mixed)",
        compute=_masked_values_are_multiplied,
    ),
    Broken(
        "heads grouped the wrong way round",
        caught_by="test_values[decode]",
        says="largest error",
        select="test_values and decode",
        compute=_heads_interleaved,
    ),
    Broken(
        "table ids clipped instead of refused",
        caught_by="test_invalid_row[None-page past the cache]",
        says="",
        select="invalid",
        compute=_table_ids_clipped,
    ),
    Broken(
        "padding written",
        caught_by="test_other_slots_keep_their_bytes[decode]",
        says="changed",
        select="(test_values or stored or slots) and decode",
        compute=_padding_written,
        versions=V3_ONLY,
    ),
    Broken(
        "page boundary missed when writing",
        caught_by="test_new_tokens_are_stored[page-boundaries]",
        says="wrong bytes",
        select="stored and (decode or boundaries)",
        compute=_page_boundary_missed,
        versions=V3_ONLY,
    ),
    Broken(
        "float8 overflows",
        caught_by="test_values[float8-saturates]",
        says="NaN",
        select="test_values and float8",
        compute=_no_saturation,
        versions=V3_ONLY,
    ),
    Broken(
        "page ids reach the result",
        caught_by="test_relabelling_pages_changes_nothing",
        says="array_equal",
        select="relabelling",
        compute=_page_ids_matter,
    ),
    Broken(
        "cached tokens hidden from prefill",
        caught_by="test_prefill_in_chunks_equals_prefill_in_one",
        says="largest error",
        select="chunks or hashable",
        compute=_cached_tokens_hidden_from_prefill,
    ),
    Broken(
        "decode loses its first key",
        caught_by="test_decode_equals_the_last_token_of_a_prefill",
        says="largest error",
        select="decode_equals",
        compute=_decode_loses_its_first_key,
    ),
    Broken(
        "decodes told by their place",
        caught_by="test_row_order_changes_nothing",
        says="largest error",
        select="row_order",
        compute=_second_row_is_a_decode,
    ),
    Broken(
        "table width reaches the result",
        caught_by="test_wider_table_changes_nothing",
        says="largest error",
        select="wider",
        compute=_reads_the_last_entry,
    ),
    Broken(
        "large windows overflow",
        caught_by="test_window_past_the_context_equals_none[1000000]",
        says="largest error",
        select="window_past_the_context",
        compute=_large_windows_overflow,
    ),
    Broken(
        "chance meeting with the oracle",
        caught_by="test_any_batch_agrees_with_the_oracle",
        says="largest error",
        select="any_batch",
        compute=_decode_loses_its_first_key,
    ),
    Broken(
        "stale view",
        caught_by="test_view_that_went_in_holds_the_pages",
        says="assert",
        select="test_values or holds_the_pages",
        members={"store": _stale_view},
        versions=V3_ONLY,
    ),
    Broken(
        "view not returned",
        caught_by="test_view_that_went_in_holds_the_pages",
        says="none",
        select="holds_the_pages",
        members={"store": _no_view},
        versions=V3_ONLY,
    ),
    Broken(
        "only the host's own view class",
        caught_by="test_forwarding_view",
        says="assert",
        select="holds_the_pages or forwarding",
        members={"store": _exact_view_class_only},
        versions=V3_ONLY,
    ),
    Broken(
        "unknown arguments dropped",
        caught_by="test_unknown_argument_is_refused",
        says="DID NOT RAISE",
        select="argument or hashable",
        members={"__call__": _drops_unknown_arguments},
    ),
    Broken(
        "result in float32",
        caught_by="test_result_has_the_shape_and_dtype_of_the_queries",
        says="float32",
        select="test_result",
        members={"__call__": _float32_result},
    ),
    Broken(
        "requirements left empty",
        caught_by="test_requirements",
        says="required metadata",
        select="requirements",
        members={"get_requirements": classmethod(_any_cache)},
    ),
    Broken(
        "objects without a hash",
        caught_by="test_objects_are_hashable",
        says="unhashable",
        select="hashable",
        members={"__hash__": None},
    ),
    Broken(
        "a forward method missing",
        caught_by="test_forward_methods_agree[cuda]",
        says="NotImplementedError|missing",
        select="forward_methods",
        members={"forward_cuda": None},
    ),
)


@functools.cache
def broken_operation(name: str, version: str) -> type:
    """The operation with the mistake of this name."""
    return next(broken for broken in BROKEN if broken.name == name).operation(version)


class _Reports:
    """A pytest plugin that keeps what happened."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self.errors: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rsplit("::", 1)[-1]
        if report.failed and report.when == "call":
            self.failed.append((name, str(report.longrepr)))
        elif report.skipped:
            self.skipped.append((name, str(report.longrepr)))
        elif report.failed:
            self.errors.append(f"{name}: {report.longrepr}")
        elif report.passed and report.when == "call":
            self.passed.append(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(str(report.longrepr))


def run_contract(folder: Path, class_body: str, select: str, *options: str) -> _Reports:
    """Run a part of the contract on the class with this body, in this process."""
    module = folder / f"test_generated_{zlib.crc32(str(folder).encode())}.py"
    module.write_text(
        f"""
import pytest
import {__name__} as broken_operations
from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract, oracle_operation

class TestGenerated(RaggedPageAttentionContract):
{textwrap.indent(textwrap.dedent(class_body), "    ")}
"""
    )
    configuration = folder / "pytest.ini"
    configuration.write_text("[pytest]\n")
    reports = _Reports()
    arguments = ["-c", str(configuration), "--rootdir", str(folder), "-W", "ignore", "-k", select, *options]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--capture=no"]
    pytest.main([*arguments, *quiet, str(module)], plugins=[reports])
    return reports


@pytest.mark.parametrize(
    ("broken", "version"),
    [pytest.param(broken, version, id=f"{broken.name}-{version}") for broken in BROKEN for version in broken.versions],
)
def test_is_caught(broken: Broken, version: str, tmp_path: Path) -> None:
    body = f"""
        @pytest.fixture
        def operation(self):
            return broken_operations.broken_operation({broken.name!r}, {version!r})
        """
    reports = run_contract(tmp_path, body, broken.select, "-x")
    assert not reports.errors
    assert len(reports.failed) == 1, f"nothing failed; passed: {reports.passed}"
    name, text = reports.failed[0]
    assert name == broken.caught_by
    assert re.search(broken.says, text), text


_RIGHT = """
    capabilities = Capabilities(sliding_window=False)
    known_failures = {known_failures}

    @pytest.fixture
    def operation(self):
        return oracle_operation("v3")
    """


def test_a_known_failure_that_passes_is_a_failure(tmp_path: Path) -> None:
    body = _RIGHT.format(known_failures={"test_values[decode]": "was wrong once"})
    reports = run_contract(tmp_path, body, "test_values and decode")
    assert not reports.errors
    assert reports.failed == [("test_values[decode]", "[XPASS(strict)] was wrong once")]


def test_a_known_failure_by_name_of_the_case_covers_all_its_tests(tmp_path: Path) -> None:
    body = _RIGHT.format(known_failures={"decode": "was wrong once"})
    reports = run_contract(tmp_path, body, "decode and not equals")
    assert [name for name, _ in reports.failed] == [
        "test_values[decode]",
        "test_padding_tokens_are_zero[decode]",
        "test_new_tokens_are_stored[decode]",
        "test_other_slots_keep_their_bytes[decode]",
    ]


def test_what_is_not_declared_is_skipped_with_the_reason(tmp_path: Path) -> None:
    reports = run_contract(tmp_path, _RIGHT.format(known_failures={}), "test_values and (window-3 or soft-cap)")
    assert reports.passed == ["test_values[soft-cap]"]
    assert [name for name, _ in reports.skipped] == ["test_values[window-3]"]
    assert "does not declare: sliding_window" in reports.skipped[0][1]


def test_an_operation_must_be_named(tmp_path: Path) -> None:
    reports = run_contract(tmp_path, "pass", "test_values and soft-cap")
    assert len(reports.errors) == 1
    assert "must define the fixture `operation`" in reports.errors[0]
