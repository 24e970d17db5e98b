"""The GPU kernel without a GPU: its numbers in Pallas' interpreter, its work lists and its tile sizes.

Whether it lowers for a GPU is test_gpu_lowering.py. Nothing here says how fast it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_calls import WRONG_STARTS, overlapping_rows

from easydel_ragged_plugin import RaggedPageConfig, Unsupported, explain, page_shape, select
from easydel_ragged_plugin import ragged_page_attention_v2 as v2
from easydel_ragged_plugin import ragged_page_attention_v3 as v3
from easydel_ragged_plugin.config import CACHE_VARIABLE
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, tiles, work
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import CARDS, Card, Tile, Tiles
from easydel_ragged_plugin.layout import PageLayout
from easydel_ragged_plugin.rows import Rows
from easydel_ragged_plugin.testing.cases import CASES, FAULTS, Batch, Case, Row, build_batch, case_named, spoil_row
from easydel_ragged_plugin.testing.tolerances import tolerance_for
from easydel_ragged_plugin.types import AttentionRequest

NAME = "pallas_gpu"

# v2 and v3 share everything but the layout's strides and the update, which v3 has in addition: v3 runs every case.
V2_CASES = {"mixed", "all-options", "head-dim-64", "head-dim-80", "mqa", "table-127-pages", "bfloat16", "float8-e5m2"}
PAIRS = [
    pytest.param(case, version, id=f"{case.name}-{version}")
    for case in CASES
    for version in case.versions
    if version == "v3" or case.name in V2_CASES or "v3" not in case.versions
]

SMALL = Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), programs=24, split_tokens=16, update_tokens=4)
"""Tiles that split even the short contexts of the tests."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[PallasGPU], None]]:
    """Selection finds the kernel on this platform, interpreted. The result puts another one in its place."""

    def use(kernel: PallasGPU) -> None:
        monkeypatch.setitem(select.BUILT_IN, NAME, kernel)
        compiled.cache_clear()

    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setitem(select.BUILT_IN, NAME, INTERPRETED)
    yield use
    if select.BUILT_IN[NAME] is not INTERPRETED:
        compiled.cache_clear()


INTERPRETED = PallasGPU(interpret=True)


@functools.cache
def compiled(version: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    def call(pages: Any, queries: Any, keys: Any, values: Any, index: Any, last: Any, sinks: Any) -> Any:
        if version == "v2":
            return v2(queries, pages, *index, last, sinks, config=NAME, **dict(options)), pages
        return v3(queries, keys, values, pages, *index, last, sinks, config=NAME, **dict(options))

    # An interpreted kernel is a large program that runs once.
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def run(batch: Batch, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    is_v2 = batch.version == "v2"
    output, pages = compiled(batch.version, tuple(sorted({**batch.case.options, **options}.items())))(
        jnp.array(batch.updated_pages if is_v2 else batch.pages),
        jnp.array(batch.queries),
        jnp.array(batch.keys),
        jnp.array(batch.values),
        tuple(jnp.array(a) for a in (batch.context_lens, batch.block_tables, batch.query_start_loc)),
        jnp.array(batch.num_seqs if is_v2 else batch.distribution),
        None if batch.sinks is None else jnp.array(batch.sinks),
    )
    return np.asarray(output), np.asarray(pages)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def check(batch: Batch, **options: Any) -> None:
    expected, expected_pages = batch.expected()
    output, pages = run(batch, **options)
    tolerance = tolerance_for(batch.case)
    np.testing.assert_allclose(output.astype(np.float64), expected, rtol=tolerance.rtol, atol=tolerance.atol)
    if pages.dtype == ml_dtypes.float8_e5m2:
        # XLA's CPU backend, which the interpreter writes through, has one NaN where float8_e5m2 has several.
        pages, expected_pages = pages.astype(np.float32), expected_pages.astype(np.float32)
        np.testing.assert_array_equal(pages, expected_pages)
    else:
        np.testing.assert_array_equal(bits(pages), bits(expected_pages))
    assert output.dtype == batch.queries.dtype
    assert not output[~batch.live_tokens].any()


@pytest.mark.parametrize(("case", "version"), PAIRS)
def test_case_matches_oracle(case: Case, version: Any) -> None:
    check(build_batch(case, version))


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_row_gives_zeros_and_writes_nothing(fault: Any, version: Any) -> None:
    check(spoil_row(build_batch(case_named("mixed"), version), fault))


@pytest.mark.parametrize(("wrong", "start"), WRONG_STARTS)
def test_good_rows_keep_tokens_that_a_wrong_start_gives_to_others(
    wrong: int, start: int, interpreted: Callable[[PallasGPU], None]
) -> None:
    interpreted(PallasGPU(interpret=True, tiles=dataclasses.replace(SMALL, update_tokens=1)))
    batch, claimed_once = overlapping_rows(wrong, start)
    expected, expected_pages = batch.expected()
    output, pages = run(batch)
    np.testing.assert_array_equal(bits(pages), bits(expected_pages))
    np.testing.assert_allclose(output[claimed_once], expected[claimed_once], rtol=2e-5, atol=2e-5)


SPLIT = [
    Case("split", (Row(250, 1), Row(3, 1), Row(100, 1), Row(40, 20)), pages_per_row=64, num_pages=None),
    Case(
        "split-options",
        (Row(250, 1), Row(3, 1), Row(100, 1), Row(40, 20)),
        pages_per_row=64,
        num_pages=None,
        sinks="heads",
        logits_soft_cap=2.0,
        sliding_window=70,
        v_scale=0.5,
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
def test_split_contexts_are_merged(case: Case, interpreted: Callable[[PallasGPU], None]) -> None:
    sizes = dataclasses.replace(SMALL, programs=200) if "63" in case.name else SMALL
    interpreted(PallasGPU(interpret=True, tiles=sizes))
    batch = build_batch(case, "v3")
    parts = np.asarray(decode_parts(batch, sizes).parts)
    assert parts[:, work.Column.PARTS].max() > (32 if "63" in case.name else 4)
    check(batch)


def test_row_that_lacks_a_page_gives_zeros_in_every_part(interpreted: Callable[[PallasGPU], None]) -> None:
    """The parts that do not read the missing page would have something to say."""
    interpreted(PallasGPU(interpret=True, tiles=SMALL))
    case = dataclasses.replace(SPLIT[0], name="spoilt", rows=(Row(100, 1), Row(250, 1)), sinks="heads")
    check(spoil_row(build_batch(case, "v3"), "page past the cache"))


@pytest.mark.parametrize(
    "sizes",
    [
        dataclasses.replace(SMALL, programs=1),
        dataclasses.replace(SMALL, programs=1000, update_tokens=1),
        Tiles(Tile(32, 64, 4, 2), Tile(128, 32, 4, 2), programs=16, split_tokens=1, update_tokens=32),
    ],
    ids=["unsplit", "all-split", "large"],
)
def test_tiles_do_not_change_results(sizes: Tiles, interpreted: Callable[[PallasGPU], None]) -> None:
    interpreted(PallasGPU(interpret=True, tiles=sizes))
    rows = (Row(250, 1), Row(9, 1), Row(170, 40), Row(33, 33))
    fields = {"num_tokens": 80, "pages_per_row": 64, "num_pages": None, "sliding_window": 60, "sinks": "heads"}
    check(build_batch(Case("tiles", rows, **fields), "v3"))


@pytest.mark.parametrize(
    "block",
    [{"num_kv_pages_per_block": 3}, {"num_kv_pages_per_block": 1, "num_queries_per_block": 3}, {"num_warps": 3}],
)
def test_block_sizes_of_the_config_do_not_change_results(
    block: dict[str, int], interpreted: Callable[[PallasGPU], None]
) -> None:
    from easydel_ragged_plugin import override_config

    interpreted(PallasGPU(interpret=True))
    with override_config(**block):
        check(build_batch(dataclasses.replace(case_named("window-7"), name="blocks", sinks="heads"), "v3"))


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
    output = v2(jnp.ones((1, 1, 256)), jnp.array(pages), one, one.reshape(1, 1), jnp.array([0, 1]), 1, config=NAME)
    np.testing.assert_array_equal(np.asarray(output)[0, 0], every.astype(np.float32))


# What selection and the work lists make of a request; nothing is run from here on.


def request_for(
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    rows: int = 64,
    width: int = 64,
    page_size: int = 128,
    tokens: int = 64,
    pages: int = 4096,
    **fields: Any,
) -> AttentionRequest:
    dtype, cache = np.dtype(dtype), np.dtype(cache or dtype)
    shape = page_shape("v3", pages, page_size, kv_heads, head_dim, cache)
    layout = PageLayout.of("v3", shape, kv_heads, head_dim, cache)
    fields = {"compute_dtype": dtype, "platform": "gpu", **fields}
    return AttentionRequest(
        version="v3",
        num_tokens=tokens,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_rows=rows,
        pages_per_row=width,
        num_pages=pages,
        query_dtype=dtype,
        cache_dtype=cache,
        layout=layout,
        softmax_scale=1.0,
        **fields,
    )


def decode_rows(*contexts: int) -> Rows:
    ones = jnp.ones(len(contexts), jnp.int32)
    return Rows(jnp.arange(len(contexts), dtype=jnp.int32), ones, jnp.array(contexts, jnp.int32))


def decode_parts(batch: Batch, sizes: Tiles) -> work.DecodeWork:
    case = batch.case
    request = request_for(
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.np_dtype,
        rows=case.num_rows,
        width=case.pages_per_row,
        page_size=case.page_size,
        tokens=case.num_tokens,
        pages=len(batch.pages),
        sliding_window=case.window,
    )
    starts = jnp.array(batch.query_start_loc)
    rows = Rows(starts[:-1], starts[1:] - starts[:-1], jnp.array(batch.context_lens))
    return work.decode_work(request, sizes, rows, sizes.decode.rows // request.group_size)


H100 = CARDS["H100"]
HOPPER = tiles.default_tiles(request_for(), "NVIDIA H100 80GB HBM3", H100)


@pytest.mark.parametrize(
    ("contexts", "most", "wanted"),
    [
        # (parts of the longest row at most, programs of 8 kv heads at least)
        ((2048,) * 64, 1, 512),
        ((131072,), 67, 500),
        ((8192,), 32, 256),
        ((65536, *(1024,) * 31), 50, 500),
        ((100,) * 4, 1, 32),
    ],
    ids=["64x2k", "1x128k", "1x8k", "skewed", "short"],
)
def test_splits_fill_the_chip_and_no_more(contexts: tuple[int, ...], most: int, wanted: int) -> None:
    request = request_for(rows=len(contexts), width=1024, tokens=len(contexts))
    found = work.decode_work(request, HOPPER, decode_rows(*contexts), 4)
    parts = np.asarray(found.parts)
    live = parts[parts[:, work.Column.QUERIES] > 0]
    assert 8 * len(live) >= wanted
    assert live[:, work.Column.PARTS].max() <= most
    blocks = live[:, work.Column.END] - live[:, work.Column.FIRST]
    assert blocks.sum() == sum(-(-context // HOPPER.decode.keys) for context in contexts)
    # No program has much more to do than the average one, unless the contexts are too short to split.
    if live[:, work.Column.PARTS].max() > 1:
        assert blocks.max() <= 2 * max(blocks.mean(), HOPPER.least_blocks)


def check_parts(found: work.DecodeWork, contexts: list[int], windows_begin: list[int], keys: int) -> None:
    """Each live row's blocks are covered once, partial results have a place each, and merges list these places."""
    parts = np.asarray(found.parts)
    slots: list[int] = []
    merged = {}
    for row, context in enumerate(contexts):
        mine = parts[(parts[:, work.Column.ROW] == row) & (parts[:, work.Column.QUERIES] > 0)]
        covered = [b for part in mine for b in range(part[work.Column.FIRST], part[work.Column.END])]
        assert covered == list(range(windows_begin[row] // keys, -(-context // keys)))
        assert set(mine[:, work.Column.PARTS]) <= {len(mine)}
        if len(mine) > 1:
            merged[row] = mine[0, work.Column.SLOT]
            assert mine[:, work.Column.SLOT].tolist() == list(range(merged[row], merged[row] + len(mine)))
            slots += mine[:, work.Column.SLOT].tolist()
    assert len(slots) == len(set(slots))
    assert max(slots, default=0) < found.num_slots
    merges = [] if found.merges is None else np.asarray(found.merges)
    listed = {each[work.Column.ROW]: each[work.Column.SLOT] for each in merges if each[work.Column.QUERIES]}
    assert listed == merged


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [None, 300])
def test_parts_cover_every_context_once(window: int | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    contexts = [int(2 ** random.uniform(0, 13)) for _ in range(random.integers(1, 40))]
    sizes = dataclasses.replace(SMALL, programs=int(random.integers(1, 300)), split_tokens=int(random.integers(1, 999)))
    request = request_for(rows=len(contexts), width=128, tokens=len(contexts), sliding_window=window)
    found = work.decode_work(request, sizes, decode_rows(*contexts), 4)
    begin = [max(0, context - window) if window else 0 for context in contexts]
    check_parts(found, contexts, begin, sizes.decode.keys)


def test_a_wider_table_is_no_more_work() -> None:
    contexts = (5000, 300, 2000, 1)
    narrow, wide = (
        work.decode_work(request_for(rows=4, width=width, tokens=4), HOPPER, decode_rows(*contexts), 4)
        for width in (64, 512)
    )
    size = len(narrow.parts)
    np.testing.assert_array_equal(np.asarray(wide.parts)[:size], narrow.parts)
    assert not np.asarray(wide.parts)[size:].any()
    wanted = HOPPER.programs // 8 + 1
    assert len(wide.parts) <= len(contexts) + wanted


@pytest.mark.parametrize("seed", range(8))
def test_query_tiles_cover_every_token_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    queries = random.integers(0, 70, size=random.integers(1, 20))
    size, more_than = int(random.integers(1, 40)), int(random.integers(0, 9))
    starts = np.concatenate([[0], np.cumsum(queries)])
    request = request_for(rows=len(queries), tokens=max(1, int(starts[-1])))
    rows = Rows(*(jnp.array(each, jnp.int32) for each in (starts[:-1], queries, queries + 5)))
    found = np.asarray(work.query_work(request, rows, size, more_than))
    covered = [
        each[work.Column.START] + each[work.Column.FIRST] + offset
        for each in found
        for offset in range(min(size, each[work.Column.QUERIES] - each[work.Column.FIRST]))
    ]
    wanted = [
        start + offset
        for start, count in zip(starts, queries, strict=False)
        if count > more_than
        for offset in range(count)
    ]
    assert covered == wanted


# Tile sizes.

GEOMETRIES = [
    (q_heads, kv_heads, head_dim, dtype, cache)
    for q_heads, kv_heads in ((32, 8), (32, 32), (8, 1), (9, 3), (128, 1))
    for head_dim in (32, 64, 80, 96, 128, 192, 256)
    for dtype, cache in (
        (jnp.bfloat16, None),
        (jnp.float16, None),
        (jnp.float32, None),
        (jnp.bfloat16, jnp.float8_e4m3fn),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float8_e5m2),
    )
]


@pytest.mark.parametrize(("name", "card"), [*CARDS.items(), ("RTX 4090", tiles.ANY_CARD)])
def test_tiles_fit_every_card(name: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "card", lambda: (name, card))
    for q_heads, kv_heads, head_dim, dtype, cache in GEOMETRIES:
        request = request_for(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, cache=cache)
        reason = tiles.too_large(request)
        if reason is not None:
            # 128 query heads for a kv head are 128 rows at least, and nothing else may be too much.
            assert request.group_size == 128, reason
            assert head_dim > 64, reason
            assert name not in ("H100", "H200"), reason
            continue
        sizes = tiles.choose(request, RaggedPageConfig())
        for tile in (sizes.decode, sizes.prefill):
            about = f"{tile} for {request.describe()}"
            assert tile.shared_bytes(request) <= card.shared_bytes, about
            assert tile.rows >= request.group_size, about
            assert tile.registers(request) <= tiles.MOST_REGISTERS, about


def test_shared_memory_of_one_tile() -> None:
    # By hand: 2 stages of keys and values, 64 tokens of 128 lanes in 2 bytes; queries and weights of 16 rows.
    assert Tile(16, 64, 4, 2).shared_bytes(request_for()) == 2 * 2 * 64 * 128 * 2 + 16 * 128 * 2 + 16 * 64 * 2
    # A float8 cache: 1 byte in flight, and one step in bfloat16.
    request = request_for(cache=jnp.float8_e4m3fn)
    wanted = 2 * 2 * 64 * 128 + 2 * 64 * 128 * 2 + 16 * 128 * 2 + 16 * 64 * 2
    assert Tile(16, 64, 4, 2).shared_bytes(request) == wanted


def test_config_fields_set_tiles() -> None:
    request = request_for(page_size=16)
    config = RaggedPageConfig(num_kv_pages_per_block=3, num_queries_per_block=5, num_warps=3, num_stages=1)
    sizes = tiles.choose(request, config)
    assert (sizes.decode.keys, sizes.decode.warps, sizes.decode.stages) == (64, 4, 1)
    assert (sizes.prefill.keys, sizes.prefill.rows) == (64, 32)  # 5 tokens of 4 heads


def test_config_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"pallas_gpu: decode tiles .* 9 stages take \d+ KiB of shared memory, this"):
        tiles.choose(request_for(), RaggedPageConfig(num_stages=9))


@pytest.mark.parametrize(
    "bad", [{"rows": 8}, {"rows": 24}, {"keys": 0}, {"warps": 3}, {"stages": 0}, {"keys": True}, {"keys": 32.0}]
)
def test_impossible_tiles_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        Tile(**{"rows": 16, "keys": 16, "warps": 4, "stages": 1, **bad})


# Refusals.


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head_dim": 320}, "head_dim 320, more than 256"),
        ({"q_heads": 256, "kv_heads": 1}, "256 query heads for a kv head, more than 128"),
        ({"dtype": np.float64}, "queries: float64; takes float32, bfloat16, float16"),
        ({"compute_dtype": np.dtype(np.float64)}, "compute_dtype: float64; takes float32, bfloat16, float16"),
        ({"cache": ml_dtypes.float8_e4m3b11fnuz}, "cache: float8_e4m3b11fnuz; takes float32, bfloat16, float16, fl"),
        # 2**31 + 2**18 and 2**32 elements; 2**31 is fine, and so is more than 2**32.
        ({"cache": jnp.float8_e4m3fn, "pages": 2**13 + 1}, "an 8-bit cache of 2.00 GiB: between 2 and 4 GiB"),
        ({"cache": jnp.float8_e5m2, "pages": 2**14}, "an 8-bit cache of 4.00 GiB: between 2 and 4 GiB"),
    ],
)
def test_refuses_by_name(fields: dict[str, Any], reason: str) -> None:
    assert str(PallasGPU().refuses(request_for(**fields))).startswith(reason)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cache": jnp.float8_e4m3fn, "pages": 2**13},
        {"cache": jnp.float8_e4m3fn, "pages": 2**14 + 1},
        {"pages": 2**14},
        {"head_dim": 80, "q_heads": 5, "kv_heads": 5, "dtype": np.float32},
    ],
)
def test_takes(fields: dict[str, Any]) -> None:
    assert PallasGPU().refuses(request_for(**fields)) is None


@pytest.mark.parametrize(
    ("capability", "cache", "refused"),
    [
        ((7, 5), jnp.bfloat16, "a bfloat16 cache on compute capability 7.5, less than 8.0"),
        ((8, 0), jnp.bfloat16, None),
        ((8, 0), jnp.float8_e5m2, None),
        ((8, 6), jnp.float8_e4m3fn, "a float8_e4m3fn cache on compute capability 8.6, less than 8.9"),
        ((9, 0), jnp.float8_e4m3fn, None),
    ],
)
def test_old_cards_are_refused_by_name(
    capability: tuple[int, int], cache: Any, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(tiles.ANY_CARD, capability=capability)
    monkeypatch.setattr("easydel_ragged_plugin.kernels.pallas_gpu.card", lambda: ("a card", found))
    assert PallasGPU().refuses(request_for(cache=cache)) == refused


@pytest.mark.parametrize("platform", ["gpu", "cuda", "rocm"])
@pytest.mark.parametrize("config", [None, RaggedPageConfig(platform="triton"), RaggedPageConfig(platform="pallas")])
def test_is_the_first_choice_on_a_gpu(
    platform: str, config: RaggedPageConfig | None, interpreted: Callable[[PallasGPU], None]
) -> None:
    interpreted(PallasGPU())
    batch = build_batch(case_named("mixed"), "v2")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)
    selection = explain(v2, batch.queries, batch.updated_pages, *index, platform=platform, config=config)
    assert selection.kernel == NAME
    on_cpu = explain(v2, batch.queries, batch.updated_pages, *index, platform="cpu")
    assert select.Refusal(NAME, "runs on gpu, not on cpu") in on_cpu.refusals


# Tuned tiles.


@pytest.fixture
def tuned(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Writes the file of tuned tiles, as seen by a process on an H100."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA H100 80GB HBM3", H100))
    tiles.read_tuned.cache_clear()

    def write(content: Any) -> None:
        tiles.tuned_file().write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        tiles.read_tuned.cache_clear()

    yield write
    tiles.read_tuned.cache_clear()


def test_tuned_tiles_are_between_config_and_table(tuned: Callable[[Any], None]) -> None:
    request = request_for()
    assert tiles.choose(request, RaggedPageConfig()) == HOPPER
    key = tiles.tuned_key("NVIDIA H100 80GB HBM3", request)
    tuned({"format": tiles.FORMAT, "entries": {key: {"tiles": dataclasses.asdict(SMALL)}}})
    assert tiles.choose(request, RaggedPageConfig()) == SMALL
    assert tiles.choose(request, RaggedPageConfig(num_warps=8)).decode == dataclasses.replace(SMALL.decode, warps=8)
    # Another head_dim was not tuned.
    other = request_for(head_dim=64)
    assert tiles.choose(other, RaggedPageConfig()) == tiles.default_tiles(other, "NVIDIA H100 80GB HBM3", H100)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"format": 0, "entries": {}},
        {"format": 1},
        {"format": 1, "entries": {"a": {"tiles": {"decode": {}}}}},
        {"format": 1, "entries": {"a": {"tiles": {**dataclasses.asdict(SMALL), "programs": 0}}}},
        {"format": 1, "entries": {"a": {"tiles": {**dataclasses.asdict(SMALL), "speed": 1}}}},
    ],
)
def test_unusable_tuned_file_is_named_and_ignored(
    content: Any, tuned: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    tuned(content)
    with caplog.at_level(logging.WARNING, logger="easydel_ragged_plugin"):
        assert tiles.choose(request_for(), RaggedPageConfig()) == HOPPER
    assert "easydel-ragged tune" in caplog.text
    assert str(tiles.tuned_file()) in caplog.text
