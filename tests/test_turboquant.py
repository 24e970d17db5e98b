"""TurboQuant caches: the contract of the kernel, numbers, slots, refusals. test_turboquant_host.py has the host."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import FEW, IN_BRIEF, THE_REST, WRONG_STARTS, overlapping_rows
from native_library import LEVELS, UNAVAILABLE, needs_library
from turboquant_oracle import TurboQuantDriver, check_written, constants, expected_output, random_pages

from easydel_ragged_plugin import Unsupported, explain, override_config, ragged_page_attention_v2, select
from easydel_ragged_plugin import ragged_page_attention_v3 as v3
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.kernels.turboquant import KERNEL
from easydel_ragged_plugin.kernels.xla import XlaKernel
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, Batch, Case, Row, build_batch
from easydel_ragged_plugin.testing.compare import assert_close, assert_lse_close, assert_same_pages
from easydel_ragged_plugin.testing.kernel_contract import KernelResults
from easydel_ragged_plugin.turboquant import TurboQuantPages

# Decode, chunked prefill, prefill, one token, an idle row, padding. One shape for all cases: they share programs.
CASE = Case("turboquant", (Row(9, 1), Row(21, 6), Row(12, 12), Row(1, 1), Row(0, 0)), num_tokens=24, num_rows=6)


@pytest.mark.once
class TestTurboQuant(KernelContract):
    kernel: ClassVar = KERNEL
    driver_class: ClassVar = TurboQuantDriver
    cases: ClassVar = FEW


@pytest.mark.once
class TestTurboQuantInBrief(KernelResults):
    kernel: ClassVar = KERNEL
    driver_class: ClassVar = TurboQuantDriver
    cases: ClassVar = IN_BRIEF


@pytest.mark.once
class TestTurboQuantInEveryCase(KernelResults):
    kernel: ClassVar = KERNEL
    driver_class: ClassVar = TurboQuantDriver
    cases: ClassVar = THE_REST


def beside_codes(cases: tuple[Case, ...], level: str | None = None) -> tuple[Case, ...]:
    """The cases for an instruction set, None for the one in use. Where it multiplies bfloat16, those of bfloat16 have
    the bounds of a float32 cache: codes times norms are numbers of float32, which are rounded there."""
    if UNAVAILABLE or (level or cpu_native.isa()) not in ("avx512_bf16", "amx_bf16"):
        return cases
    return tuple(
        dataclasses.replace(case, cache_dtype="float32") if case.dtype == "bfloat16" else case for case in cases
    )


@needs_library
@pytest.mark.once
class TestCpuNative(KernelContract):
    kernel: ClassVar = cpu_native.KERNEL
    driver_class: ClassVar = TurboQuantDriver
    cases: ClassVar = beside_codes(FEW)


@needs_library
@pytest.mark.once
class TestCpuNativeInEveryCase(KernelResults):
    kernel: ClassVar = cpu_native.KERNEL
    driver_class: ClassVar = TurboQuantDriver
    cases: ClassVar = beside_codes(tuple(case for case in CASES if case not in FEW))


@needs_library
@pytest.mark.once
@pytest.mark.parametrize("level", [name for name in LEVELS if name != cpu_native.isa()])
def test_every_instruction_set_unpacks_codes(level: str) -> None:
    driver = TurboQuantDriver(cpu_native.KERNEL, "v3")
    cpu_native.set_isa(level)
    try:
        for case in beside_codes(FEW, level):
            if driver.missing(case) is None:
                batch = build_batch(case, "v3")
                outcome = driver.call(batch, return_lse=True)
                expected, pages, lse = driver.expected_with_lse(batch, outcome)
                assert_close(outcome.output, expected, case)
                assert_same_pages(outcome.pages, pages)
                assert outcome.lse is not None
                assert_lse_close(outcome.lse, lse, case)
    finally:
        cpu_native.set_isa(None)


each_kernel = pytest.mark.parametrize("kernel", ["turboquant", pytest.param("cpu_native", marks=needs_library)])


@functools.cache
def compiled(version: str, kernel: str, options: tuple[tuple[str, Any], ...]) -> Any:
    given = {**dict(options), "config": kernel}

    def call(pages: Any, queries: Any, keys: Any, values: Any, index: Any, last: Any, sinks: Any) -> Any:
        if version == "v2":
            return ragged_page_attention_v2(queries, pages, *index, last, sinks, **given), pages
        return v3(queries, keys, values, pages, *index, last, sinks, **given)

    return jax.jit(call)


def run(
    batch: Batch, pages: TurboQuantPages, version: str = "v3", kernel: str = "turboquant", **options: Any
) -> tuple[np.ndarray, Any]:
    call = compiled(version, kernel, tuple(sorted({**batch.case.options.keywords(), **options}.items())))
    output, pages = call(
        pages,
        *(jnp.asarray(each) for each in (batch.queries, batch.keys, batch.values)),
        [jnp.asarray(each) for each in (batch.context_lens, batch.block_tables, batch.query_start_loc)],
        jnp.asarray(batch.num_seqs if version == "v2" else batch.distribution),
        None if batch.sinks is None else jnp.asarray(batch.sinks),
    )
    return np.asarray(output), pages


@each_kernel
@pytest.mark.usefixtures("as_users_compile")
def test_indices_that_name_no_centroid_stand_for_zero(kernel: str) -> None:
    """Half of the keys' are such: what the contract compresses has none."""
    batch = build_batch(CASE, "v3")
    before = random_pages(batch.case, len(batch.pages))
    output, after = run(batch, before, kernel=kernel)
    check_written(batch, before, after)
    np.testing.assert_allclose(output, expected_output(batch, after), rtol=2e-5, atol=2e-5)


def test_float64_is_computed_in_float64() -> None:
    with jax.enable_x64(True):
        batch = build_batch(CASE, "v3")
        wide = dataclasses.replace(batch, queries=batch.queries.astype(np.float64))
        pages = random_pages(batch.case, len(batch.pages))
        output, _ = run(wide, pages, "v2")
        assert output.dtype == np.float64
        np.testing.assert_allclose(output, expected_output(wide, pages), rtol=1e-12, atol=1e-12)


@each_kernel
def test_short_compute_dtypes_lose_nothing(kernel: str) -> None:
    """Documented: codes are read in float32 at least, unless the queries are short."""
    batch = build_batch(CASE, "v3")
    pages = random_pages(batch.case, len(batch.pages))
    output, _ = run(batch, pages, "v2", kernel, compute_dtype=jnp.bfloat16)
    np.testing.assert_allclose(output, expected_output(batch, pages), rtol=2e-5, atol=2e-5)


@each_kernel
@pytest.mark.parametrize("signs", [8, 56, 136])
def test_signs_need_not_be_as_many_as_coordinates(signs: int, kernel: str) -> None:
    batch = build_batch(CASE, "v3")
    before = random_pages(batch.case, len(batch.pages), signs=signs)
    output, after = run(batch, before, kernel=kernel)
    check_written(batch, before, after)
    np.testing.assert_allclose(output, expected_output(batch, after), rtol=2e-5, atol=2e-5)


@each_kernel
def test_zero_vectors_are_stored_without_nan(kernel: str) -> None:
    batch = build_batch(CASE, "v3")
    batch = dataclasses.replace(batch, keys=batch.keys * 0, values=batch.values * 0)
    output, after = run(batch, random_pages(batch.case, len(batch.pages)), kernel=kernel)
    np.testing.assert_allclose(output, expected_output(batch, after), rtol=2e-5, atol=2e-5)
    assert not np.asarray(after.value_norms)[batch.written_slots].any()


@each_kernel
@pytest.mark.parametrize(("wrong", "start"), WRONG_STARTS)
def test_good_rows_keep_tokens_that_a_wrong_start_gives_to_others(wrong: int, start: int, kernel: str) -> None:
    batch, claimed_once = overlapping_rows(wrong, start)
    before = random_pages(batch.case, len(batch.pages))
    output, after = run(batch, before, kernel=kernel)
    starts, lens, size = batch.query_start_loc, batch.context_lens, batch.case.page_size
    expected = np.zeros(output.shape)
    for row in range(5):
        first, end = int(starts[row]), int(starts[row + 1])
        if not 0 <= first < end <= 21 or lens[row] < end - first:
            continue
        # The row on its own: its slots, and the output of the tokens that no other row claims.
        mine = dataclasses.replace(
            batch,
            block_tables=batch.block_tables[[row]],
            context_lens=lens[[row]],
            query_start_loc=np.array([first, end], np.int32),
            num_seqs=np.array([1], np.int32),
            written_slots=np.zeros_like(batch.written_slots),
        )
        position = np.arange(lens[row] - (end - first), lens[row])
        mine.written_slots[mine.block_tables[0, position // size], position % size] = True
        pairs = zip(before.arrays, after.arrays, strict=True)
        only = (jnp.where(expand(mine.written_slots, new), new, old) for old, new in pairs)
        check_written(mine, before, before.with_arrays(only))
        expected[first:end] = expected_output(mine, after)[first:end]
    np.testing.assert_allclose(output[claimed_once], expected[claimed_once], rtol=2e-5, atol=2e-5)


def expand(mask: np.ndarray, array: Any) -> np.ndarray:
    return mask.reshape(*mask.shape, *[1] * (array.ndim - 2))


@pytest.mark.parametrize("block", [{"num_kv_pages_per_block": 1}, {"num_queries_per_block": 5}])
def test_block_sizes_do_not_change_results(block: dict[str, int]) -> None:
    batch = build_batch(CASE.with_options(sliding_window=6), "v3")
    pages = random_pages(batch.case, len(batch.pages))
    compiled.cache_clear()
    with override_config(**block):
        output, _ = run(batch, pages, "v2")
    compiled.cache_clear()
    np.testing.assert_allclose(output, expected_output(batch, pages), rtol=2e-5, atol=2e-5)


def arguments_of(pages: Any, tokens: int = 4, rows: int = 4, heads: int = 4) -> tuple[Any, ...]:
    head_dim = pages.constants.rotation.shape[0]
    queries, new = jnp.zeros((tokens, heads, head_dim)), jnp.zeros((tokens, pages.shape[2], head_dim))
    index = (jnp.ones(rows, jnp.int32), jnp.zeros((rows, 4), jnp.int32), jnp.arange(rows + 1, dtype=jnp.int32))
    return (queries, new, new, pages, *index, jnp.array([rows] * 3, jnp.int32))


def test_which_code_runs_is_explained() -> None:
    pages = random_pages(CASE, 8)
    selection = explain(v3, *arguments_of(pages))
    assert selection.kernel == ("turboquant" if UNAVAILABLE else "cpu_native")
    assert "TurboQuant cache" in str(selection)
    wide = (jnp.zeros((4, 4, 32), jnp.float64) if i == 0 else each for i, each in enumerate(arguments_of(pages)))
    with jax.enable_x64(True):
        selection = explain(v3, *wide)
    assert selection.kernel == "turboquant"
    reasons = {refusal.kernel: refusal.reason for refusal in selection.refusals}
    assert reasons["xla"] == "takes no TurboQuant cache"
    assert UNAVAILABLE or reasons["cpu_native"].startswith("float64 queries")
    assert selection.request.describe().endswith("TurboQuant cache")
    for name in ("pallas_gpu", "xla"):
        with pytest.raises(Unsupported, match=f"{name}: (takes no TurboQuant cache|runs on gpu)"):
            explain(v3, *arguments_of(pages), config=name)


def test_kernels_of_hooks_are_given_no_codes_unless_they_declare_the_format() -> None:
    class Older(XlaKernel):
        name = "older"

    request = explain(v3, *arguments_of(random_pages(CASE, 8))).request
    assert select.why_not(Older(), request, select.resolve_config(request)) == "takes no TurboQuant cache"


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("scale", [2.0, np.ones(2, np.float32)], ids=["number", "array"])
def test_scales_are_refused(scale: Any, name: str) -> None:
    with pytest.raises(Unsupported, match=f"{name} with a TurboQuant cache"):
        explain(v3, *arguments_of(random_pages(CASE, 8)), **{name: scale})


def test_more_slots_than_an_int32_counts_are_refused_where_they_are_written() -> None:
    pages = random_pages(CASE, 1)
    many = pages.with_arrays(
        jax.ShapeDtypeStruct((2**20, 2**12, *array.shape[2:]), array.dtype) for array in pages.arrays
    )
    queries, keys, values, _, *index = arguments_of(pages)
    with pytest.raises(Unsupported, match=r"turboquant: writes to 1048576 pages of 4096 tokens: more than 2147483647"):
        explain(v3, queries, keys, values, many, *index, config="turboquant")
    assert (
        explain(v3, queries, keys, values, many, *index, config="turboquant", update_pages=False).kernel == "turboquant"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constants": constants(32, levels=(16, 32))}, "value codebook: got shape .32,., wanted up to 16 entries"),
        ({"constants": constants(64)}, "wanted .32, 32. and .signs, 32. for queries of head_dim 32"),
        ({"constants": constants(32, 12)}, "wanted an even head_dim, and a multiple of 8 signs"),
        ({"key_signs": jnp.zeros((8, 4, 2, 3), jnp.uint8)}, "key_signs: got shape .8, 4, 2, 3., wanted .8, 4, 2, 4."),
        (
            {"value_norms": jnp.zeros((8, 4, 2), jnp.uint8)},
            "value_norms: got dtype uint8, wanted float32 or bfloat16 or float16",
        ),
        ({"value_indices": jnp.zeros((8, 4, 2, 16), jnp.int8)}, "value_indices: got dtype int8, wanted uint8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    pages = random_pages(CASE, 8)
    queries, *rest = arguments_of(pages)
    rest[2] = pages._replace(**changes)
    with pytest.raises(ValueError, match=message):
        explain(v3, queries, *rest)


def test_other_kv_heads_than_the_caches_are_refused() -> None:
    queries, keys, values, *rest = arguments_of(random_pages(CASE, 8))
    with pytest.raises(ValueError, match="keys: got 1 kv heads, wanted the 2 of the TurboQuant cache"):
        explain(v3, queries, keys[:, :1], values[:, :1], *rest)


@each_kernel
@pytest.mark.parametrize("norms", [jnp.bfloat16, jnp.float32])
def test_donated_cache_is_not_copied(norms: Any, kernel: str) -> None:
    def memory(num_pages: int) -> tuple[int, int]:
        pages = random_pages(CASE, 1)
        shapes = [
            jax.ShapeDtypeStruct(
                (num_pages, *each.shape[1:]), norms if jnp.issubdtype(each.dtype, jnp.floating) else each.dtype
            )
            for each in pages.arrays
        ]

        def step(arrays: Any, queries: Any, keys: Any, values: Any, *index: Any) -> Any:
            output, after = v3(queries, keys, values, pages.with_arrays(arrays), *index, config=kernel)
            assert isinstance(after, TurboQuantPages)
            return output, after.arrays

        queries, keys, values, _, *index = arguments_of(pages)
        compiled = jax.jit(step, donate_argnums=0).lower(shapes, queries, keys, values, *index).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        assert analysis.alias_size_in_bytes >= sum(int(np.prod(each.shape)) * each.dtype.itemsize for each in shapes)
        return analysis.temp_size_in_bytes, num_pages * CASE.page_size

    (small, _), (large, slots) = memory(64), memory(8192)
    # On a CPU `turboquant` has a map of one int32 for each slot; the smallest array of the cache is as large here.
    assert large - small < (1.2 * 4 * slots if kernel == "turboquant" else 4096)
