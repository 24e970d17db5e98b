"""Kernels through the public functions and without a host: what is no part of their contract.

Each has its contract in a file of its own: test_xla.py, test_native.py, test_pallas_gpu.py, test_turboquant.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import WRONG_STARTS, compiled, overlapping_rows, run_batch

from easydel_ragged_plugin import page_shape, ragged_page_attention_v3
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.select import BUILT_IN, ORDER
from easydel_ragged_plugin.testing import kernel_driver
from easydel_ragged_plugin.testing.batches import Version
from easydel_ragged_plugin.testing.cases import CASES, build_batch, case_named
from easydel_ragged_plugin.testing.compare import assert_close, assert_same_pages

PORTABLE = "xla"
# ejkernel's results on a CPU are EasyDeL's, faults included: test_contract.py has them.
NO_LIBRARY = cpu_native.availability()
KERNELS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "cpu_native" and NO_LIBRARY is not None, reason=str(NO_LIBRARY))
    )
    for name in ORDER["cpu"]
    if not BUILT_IN[name].is_hosts and "plain" in BUILT_IN[name].features.cache_formats
]
VERSIONS: tuple[Version, ...] = ("v2", "v3")


@pytest.mark.usefixtures("as_users_compile")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name",
    [
        "mixed",
        "all-options",
        "sinks-per-kv-head",
        "float32-scales",
        "scales-per-kv-head",
        "float8-e4m3",
        "chunk-5",
        "pages-as-they-are",
    ],
)
def test_public_functions_match_the_oracle(name: str, version: Version, kernel: str) -> None:
    """Arguments reach the kernel: its contract calls it without them."""
    if version not in case_named(name).versions:
        pytest.skip("v2 never writes")
    batch = build_batch(case_named(name), version)
    expected, expected_pages = batch.expected()
    output, pages = run_batch(batch, kernel)
    assert_close(output, expected, batch.case)
    assert_same_pages(pages, expected_pages)
    assert output.dtype == batch.queries.dtype


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("wrong", "start"), WRONG_STARTS)
def test_good_rows_keep_tokens_that_a_wrong_start_gives_to_others(wrong: int, start: int, kernel: str) -> None:
    batch, claimed_once = overlapping_rows(wrong, start)
    expected, expected_pages = batch.expected()
    output, pages = run_batch(batch, kernel)
    assert_same_pages(pages, expected_pages)
    np.testing.assert_allclose(output[claimed_once], expected[claimed_once], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "block", [{}, {"num_kv_pages_per_block": 1}, {"num_kv_pages_per_block": 3}, {"num_queries_per_block": 4}]
)
def test_block_sizes_do_not_change_results(block: dict[str, int], kernel: str) -> None:
    from easydel_ragged_plugin import override_config

    batch = build_batch(dataclasses.replace(case_named("window-7"), name="blocks", sinks="heads"), "v3")
    expected, _ = batch.expected()
    compiled.cache_clear()
    with override_config(**block):
        output, _ = run_batch(batch, kernel)
    compiled.cache_clear()
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)


def memory_of_update(dtype: Any, num_pages: int, kernel: str) -> tuple[int, int]:
    """(temporary bytes, bytes of the cache) of a compiled v3 decode step with the pages donated."""
    rows, width, page_size, q_heads, kv_heads, head_dim = 4, 16, 16, 8, 4, 128
    pages = jax.ShapeDtypeStruct(page_shape("v3", num_pages, page_size, kv_heads, head_dim, dtype), dtype)
    token = functools.partial(jax.ShapeDtypeStruct, dtype=dtype if np.dtype(dtype).itemsize > 1 else jnp.bfloat16)
    index = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    new = token((rows, kv_heads, head_dim))

    def step(pages: Any, *arguments: Any) -> Any:
        queries, keys, values, *rest = arguments
        return ragged_page_attention_v3(queries, keys, values, pages, *rest, config=kernel)

    memory = (
        jax.jit(step, donate_argnums=0)
        .lower(
            pages,
            token((rows, q_heads, head_dim)),
            new,
            new,
            index((rows,)),
            index((rows, width)),
            index((rows + 1,)),
            index((3,)),
        )
        .compile()
        .memory_analysis()
    )
    assert memory is not None
    cache_bytes = int(np.prod(pages.shape)) * np.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= cache_bytes
    return memory.temp_size_in_bytes, cache_bytes


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_donated_pages_are_not_copied(dtype: Any, kernel: str) -> None:
    small, _ = memory_of_update(dtype, 64, kernel)
    large, cache_bytes = memory_of_update(dtype, 4096, kernel)
    # A slot map of one int32 for each slot may grow with the cache; a copy of the cache may not.
    assert large - small < cache_bytes / 50


def call_that_does_not_write(kernel: str, num_pages: int) -> tuple[Any, list[Any]]:
    """A jitted v3 call over pages as they are, its pages donated, and the shapes of its arguments."""
    rows, page_size, dtype = 4, 16, jnp.float32
    index = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def step(pages: Any, queries: Any, *index: Any) -> Any:
        output, same = ragged_page_attention_v3(queries, None, None, pages, *index, update_pages=False, config=kernel)
        return output, same

    shapes = [
        jax.ShapeDtypeStruct(page_shape("v3", num_pages, page_size, 4, 128, np.dtype(dtype)), dtype),
        jax.ShapeDtypeStruct((rows, 8, 128), dtype),
        index((rows,)),
        index((rows, 16)),
        index((rows + 1,)),
        index((3,)),
    ]
    return jax.jit(step, donate_argnums=0), shapes


@pytest.mark.parametrize("kernel", KERNELS)
def test_pages_as_they_are_are_not_copied(kernel: str) -> None:
    temporary = []
    for num_pages in (64, 4096):
        step, shapes = call_that_does_not_write(kernel, num_pages)
        compiled = step.lower(*shapes).compile()
        cache = "f32[" + ",".join(map(str, shapes[0].shape)) + "]"
        assert not re.search(rf"= {re.escape(cache)}\S* copy\(", compiled.as_text())
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= int(np.prod(shapes[0].shape)) * 4
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[0] == temporary[1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_pages_as_they_are_come_back(kernel: str) -> None:
    """The very array, outside of a trace, too."""
    batch = build_batch(case_named("pages-as-they-are"), "v3")
    pages = jnp.asarray(batch.pages)
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    output, same = ragged_page_attention_v3(batch.queries, None, None, pages, *index, update_pages=False, config=kernel)
    assert same is pages
    assert_close(np.asarray(output), batch.expected()[0], batch.case)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_scales_may_be_traced_and_without_axes(version: Version, kernel: str) -> None:
    """One program serves all scales of a shape, and a scale without axes holds for all heads."""
    batch = build_batch(case_named("scales-per-kv-head"), version)
    for k_scale, v_scale in (([0.5, 2.0], [3.0, 0.25]), ([0.7, 0.7], [1.5, 1.5])):
        each = dataclasses.replace(batch, k_scale=np.array(k_scale, np.float32), v_scale=np.array(v_scale, np.float32))
        assert_close(run_batch(each, kernel)[0], each.expected()[0], batch.case)
    scalar = dataclasses.replace(batch, k_scale=np.array(0.7, np.float32), v_scale=np.array(1.5, np.float32))
    np.testing.assert_array_equal(run_batch(scalar, kernel)[0], run_batch(each, kernel)[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_float64_is_computed_in_float64(kernel: str) -> None:
    if kernel != PORTABLE:
        pytest.skip("float64 is refused by name: tests/test_native.py")
    with jax.enable_x64(True):
        batch = build_batch(case_named("mixed"), "v2")
        wide = dataclasses.replace(
            batch,
            queries=batch.queries.astype(np.float64),
            updated_pages=batch.updated_pages.astype(np.float64),
        )
        output, _ = run_batch(wide, kernel)
        expected, _ = wide.expected()
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float8_cache_saturates(kernel: str) -> None:
    case = next(c for c in CASES if c.cache_dtype == "float8_e4m3fn" and "v3" in c.versions)
    batch = build_batch(case, "v3")
    batch = dataclasses.replace(batch, keys=batch.keys * 0 + 1000, values=batch.values * 0 - 1000)
    _, pages = run_batch(batch, kernel)
    written = pages[batch.written_slots].astype(np.float32)
    assert written.max() == 448
    assert written.min() == -448


def test_the_kit_drops_programs_before_memory_maps_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux allows a process 65,530, and XLA's compiler ends it there. Other drivers compile again."""
    batch = build_batch(case_named("decode"), "v2")
    first, second = (kernel_driver.KernelDriver(BUILT_IN["xla"], "v2") for _ in range(2))
    wanted = first.call(batch).output
    clear_caches = unittest.mock.Mock(wraps=jax.clear_caches)
    monkeypatch.setattr(jax, "clear_caches", clear_caches)
    second.call(batch)
    clear_caches.assert_not_called()
    monkeypatch.setattr(kernel_driver, "MOST_MEMORY_MAPS", -1)
    second.call(batch, return_lse=True)
    clear_caches.assert_called_once()
    np.testing.assert_array_equal(first.call(batch).output, wanted)
