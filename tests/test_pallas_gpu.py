"""The GPU kernel's numbers without a GPU, in Pallas' interpreter: its contract, split contexts, all tile sizes.

Its work lists and sizes are in test_pallas_gpu_sizes.py. Nothing here says how fast it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_requests import SMALL, decode_parts
from kernel_calls import FEW, IN_BRIEF, QUICK_TO_COMPILE, THE_REST, WRONG_STARTS, OneNaN, overlapping_rows

from easydel_ragged_plugin import RaggedPageConfig, page_shape, prepare, select
from easydel_ragged_plugin import ragged_page_attention_v2 as v2
from easydel_ragged_plugin import ragged_page_attention_v3 as v3
from easydel_ragged_plugin.config import CACHE_VARIABLE
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, work
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Tile, Tiles
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import (
    CASES,
    Batch,
    Case,
    Row,
    build_batch,
    case_named,
    spoil_row,
)
from easydel_ragged_plugin.testing.compare import assert_close, assert_lse_close, assert_same_pages
from easydel_ragged_plugin.testing.kernel_contract import KernelResults

V2_CASES = {
    "mixed",
    "all-options",
    "scales-per-kv-head",
    "head-dim-64",
    "head-dim-80",
    "mqa",
    "table-127-pages",
    "bfloat16",
    "float8-e5m2",
}

INTERPRETED = PallasGPU(interpret=True)
CONFIG = RaggedPageConfig(kernel=INTERPRETED.name)


def config_with(tiles: Tiles) -> RaggedPageConfig:
    return dataclasses.replace(CONFIG, kernel_config=tiles)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection finds the kernel on this platform, interpreted."""
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setitem(select.BUILT_IN, INTERPRETED.name, INTERPRETED)


@functools.cache
def compiled(version: str, options: Options, config: RaggedPageConfig, return_lse: bool) -> Callable[..., Any]:
    keywords = {**options.keywords(), "config": config, "return_lse": return_lse}

    def call(pages: Any, queries: Any, keys: Any, values: Any, index: Any, last: Any, sinks: Any, scales: Any) -> Any:
        """(output, pages), and the logsumexp where it is requested."""
        if version == "v2":
            found = v2(queries, pages, *index, last, sinks, **keywords, **scales)
            return (found[0], pages, found[1]) if return_lse else (found, pages)
        return v3(queries, keys, values, pages, *index, last, sinks, **keywords, **scales)

    return jax.jit(call, compiler_options=QUICK_TO_COMPILE)


def run(batch: Batch, config: RaggedPageConfig = CONFIG, return_lse: bool = False) -> list[np.ndarray]:
    """[output, pages], and the logsumexp where it is requested."""
    is_v2 = batch.version == "v2"
    found = compiled(batch.version, batch.case.options, config, return_lse)(
        jnp.array(batch.updated_pages if is_v2 else batch.pages),
        jnp.array(batch.queries),
        jnp.array(batch.keys),
        jnp.array(batch.values),
        tuple(jnp.array(a) for a in (batch.context_lens, batch.block_tables, batch.query_start_loc)),
        jnp.array(batch.num_seqs if is_v2 else batch.distribution),
        None if batch.sinks is None else jnp.array(batch.sinks),
        {name: jnp.array(scale) for name, scale in batch.scales.items()},
    )
    return [np.asarray(each) for each in found]


def check(batch: Batch, config: RaggedPageConfig = CONFIG, return_lse: bool = False) -> None:
    expected, expected_pages, expected_lse = batch.expected_with_lse()
    output, pages, *lse = run(batch, config, return_lse)
    assert_close(output, expected, batch.case)
    assert_same_pages(pages, expected_pages)
    assert output.dtype == batch.queries.dtype
    assert not output[~batch.live_tokens].any()
    assert len(lse) == return_lse
    for each in lse:
        assert each.dtype == np.float32
        assert_lse_close(each, expected_lse, batch.case)


class TestPallasGPU(KernelContract):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    driver_class: ClassVar = OneNaN
    versions: ClassVar = ("v3",)
    cases: ClassVar = FEW
    known_failures: ClassVar = {
        "test_inside_of_shard_map": "loops of Pallas' interpreter carry no varying axes; test_gpu_lowering.py lowers it"
    }


class TestPallasGPUInBrief(KernelResults):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    driver_class: ClassVar = OneNaN
    versions: ClassVar = ("v3",)
    cases: ClassVar = IN_BRIEF


class TestPallasGPUInEveryCase(KernelResults):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    driver_class: ClassVar = OneNaN
    versions: ClassVar = ("v3",)
    cases: ClassVar = THE_REST


class TestPallasGPUV2(TestPallasGPU):
    """v2 and v3 share everything but the layout's strides and the update, which v3 has in addition."""

    versions: ClassVar = ("v2",)
    cases: ClassVar = tuple(case for case in CASES if case.name in V2_CASES or "v3" not in case.versions)


@pytest.mark.parametrize(("wrong", "start"), WRONG_STARTS)
def test_good_rows_keep_tokens_that_a_wrong_start_gives_to_others(wrong: int, start: int) -> None:
    batch, claimed_once = overlapping_rows(wrong, start)
    expected, expected_pages = batch.expected()
    output, pages = run(batch, config_with(dataclasses.replace(SMALL, update_tokens=1)))
    assert_same_pages(pages, expected_pages)
    np.testing.assert_allclose(output[claimed_once], expected[claimed_once], rtol=2e-5, atol=2e-5)


SPLIT = [
    Case("split", (Row(250, 1), Row(3, 1), Row(100, 1), Row(40, 20)), pages_per_row=64, num_pages=None),
    Case(
        "split-options",
        (Row(250, 1), Row(3, 1), Row(100, 1), Row(40, 20)),
        pages_per_row=64,
        num_pages=None,
        sinks="heads",
        options=Options(logits_soft_cap=2.0, sliding_window=70, v_scale=0.5),
    ),
    # More parts than one step of a merge takes.
    Case("split-into-63", (Row(1000, 1), Row(40, 1)), pages_per_row=256, num_pages=None, query_gain=3.0, sinks="heads"),
    # Several new tokens share the decode tile of a row: 5 of them with 2 heads each.
    Case("split-few-queries", (Row(200, 5), Row(90, 8)), pages_per_row=64, num_pages=None, sinks="heads"),
    Case("split-group-of-3", (Row(200, 5), Row(90, 4)), q_heads=6, pages_per_row=64, num_pages=None),
    Case("split-bfloat16", (Row(250, 1), Row(100, 1)), dtype="bfloat16", pages_per_row=64, num_pages=None),
    Case("one-row", (Row(250, 1),), num_tokens=1, num_rows=1, pages_per_row=64, num_pages=None, q_heads=8, kv_heads=1),
]


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_split_contexts_are_merged(case: Case) -> None:
    sizes = dataclasses.replace(SMALL, programs=200) if "63" in case.name else SMALL
    batch = build_batch(case, "v3")
    parts = np.asarray(decode_parts(batch, sizes))
    assert parts[:, work.Column.PARTS].max() > (32 if "63" in case.name else 4)
    check(batch, config_with(sizes), return_lse=True)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_layers_of_a_loop_share_what_is_prepared(version: Any) -> None:
    """Two layers of ``lax.scan``, each with its own block table, over rows of every kind and a token of none."""
    batch = build_batch(dataclasses.replace(SPLIT[0], name="scanned", num_tokens=24, rows=SPLIT[0].rows[1:]), version)
    is_v2, config = version == "v2", config_with(SMALL)
    function: Any = v2 if is_v2 else v3
    new = () if is_v2 else (batch.keys, batch.values)
    pages = jnp.array(batch.updated_pages if is_v2 else batch.pages)
    last = batch.num_seqs if is_v2 else batch.distribution
    lens, tables, starts = (jnp.array(each) for each in (batch.context_lens, batch.block_tables, batch.query_start_loc))

    def layers(share: bool) -> Any:
        def attend(pages: Any, table: Any, **prepared: Any) -> Any:
            found = function(batch.queries, *new, pages, lens, table, starts, last, config=config, **prepared)
            return (pages, found) if is_v2 else found[::-1]

        shapes = (batch.queries, *new, pages, lens, tables, starts, last)
        shared = {"prepared": prepare(function, *shapes, config=config)} if share else {}
        return jax.lax.scan(lambda pages, table: attend(pages, table, **shared), pages, jnp.stack([tables, tables]))

    alone, together = (jax.jit(layers, static_argnums=0, compiler_options=QUICK_TO_COMPILE)(each) for each in (0, 1))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    expected, _ = batch.expected()
    assert_close(np.asarray(together[1][1]), expected, batch.case)
    assert not np.asarray(together[1])[:, ~batch.live_tokens].any()


def test_row_that_lacks_a_page_gives_zeros_in_every_part() -> None:
    """Parts that do not read the missing page have logits, and the row has sinks: neither is a result."""
    case = dataclasses.replace(SPLIT[0], name="spoiled", rows=(Row(100, 1), Row(250, 1)), sinks="heads")
    check(spoil_row(build_batch(case, "v3"), "page past the cache"), config_with(SMALL), return_lse=True)


@pytest.mark.parametrize(
    "sizes",
    [
        dataclasses.replace(SMALL, programs=1),
        dataclasses.replace(SMALL, programs=1000, update_tokens=1),
        Tiles(Tile(32, 64, 4, 2), Tile(128, 32, 4, 2), programs=16, split_tokens=1, update_tokens=32),
    ],
    ids=["unsplit", "all-split", "large"],
)
def test_tiles_do_not_change_results(sizes: Tiles) -> None:
    rows = (Row(250, 1), Row(9, 1), Row(170, 40), Row(33, 33))
    case = Case("tiles", rows, options=Options(sliding_window=60), num_tokens=80, pages_per_row=64, num_pages=None)
    check(build_batch(dataclasses.replace(case, sinks="heads"), "v3"), config_with(sizes))


@pytest.mark.parametrize(
    "block",
    [{"num_kv_pages_per_block": 3}, {"num_kv_pages_per_block": 1, "num_queries_per_block": 3}, {"num_warps": 3}],
)
def test_block_sizes_of_the_config_do_not_change_results(block: dict[str, Any]) -> None:
    batch = build_batch(dataclasses.replace(case_named("window-7"), name="blocks", sinks="heads"), "v3")
    check(batch, dataclasses.replace(CONFIG, **block))


def test_float8_cache_saturates() -> None:
    batch = build_batch(case_named("float8-e4m3"), "v3")
    batch = dataclasses.replace(batch, keys=batch.keys * 0 + 1000, values=batch.values * 0 - 1000)
    _, pages = run(batch)
    written = pages[batch.written_slots].astype(np.float32)
    assert written.max() == 448
    assert written.min() == -448


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_every_float8_number_is_read_exactly(dtype: Any) -> None:
    """One key for each row: the answer is its value, whatever its logit."""
    every = np.arange(256, dtype=np.uint8).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    every = np.resize(every, 256)
    pages = np.zeros(page_shape("v2", 2, 1, 1, 256, dtype), dtype)
    pages[1, 0, 1] = every
    one = jnp.ones(1, jnp.int32)
    output = v2(jnp.ones((1, 1, 256)), jnp.array(pages), one, one.reshape(1, 1), jnp.array([0, 1]), 1, config=CONFIG)
    np.testing.assert_array_equal(np.asarray(output)[0, 0], every.astype(np.float32))
