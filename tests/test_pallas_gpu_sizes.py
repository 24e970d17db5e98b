"""What the GPU kernel makes of a request before it runs: work lists, tile sizes, refusals. Nothing is run here."""

from __future__ import annotations

import dataclasses
import json
import logging
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_requests import SMALL, decode_rows, request_for

from easydel_ragged_plugin import RaggedPageConfig, Unsupported, explain, select
from easydel_ragged_plugin import ragged_page_attention_v2 as v2
from easydel_ragged_plugin.config import CACHE_VARIABLE
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, tiles, work
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import CARDS, Card, Tile, Tiles
from easydel_ragged_plugin.rows import Rows
from easydel_ragged_plugin.testing.cases import build_batch, case_named
from easydel_ragged_plugin.types import AttentionRequest

NAME = "pallas_gpu"


@pytest.fixture(autouse=True)
def nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine's own cache directory holds."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    tiles.read_tuned.cache_clear()
    yield
    tiles.read_tuned.cache_clear()


H100 = CARDS["H100"]
HOPPER = tiles.default_tiles(request_for(), H100)


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
    parts = np.asarray(work.decode_work(request, HOPPER, decode_rows(*contexts))[0])
    live = parts[parts[:, work.Column.TOKENS] > 0]
    assert 8 * len(live) >= wanted
    assert live[:, work.Column.PARTS].max() <= most
    blocks = live[:, work.Column.END] - live[:, work.Column.FIRST]
    assert blocks.sum() == sum(-(-context // HOPPER.decode.keys) for context in contexts)
    # No program has much more to do than the average one, unless the contexts are too short to split.
    if live[:, work.Column.PARTS].max() > 1:
        assert blocks.max() <= 2 * max(blocks.mean(), HOPPER.least_blocks)


def check_parts(request: AttentionRequest, sizes: Tiles, contexts: list[int]) -> int:
    """Each live row's blocks are covered once, partial results have an index each, and merges list these. The room
    for partial results."""
    found, found_merges = work.decode_work(request, sizes, decode_rows(*contexts))
    parts, room, keys = np.asarray(found), work.decode_room(request, sizes), sizes.decode.keys
    assert len(parts) == room.parts
    window = request.options.window
    windows_begin = [max(0, context - window) if window else 0 for context in contexts]
    partials: list[int] = []
    merged = {}
    for row, context in enumerate(contexts):
        mine = parts[(parts[:, work.Column.ROW] == row) & (parts[:, work.Column.TOKENS] > 0)]
        covered = [b for part in mine for b in range(part[work.Column.FIRST], part[work.Column.END])]
        assert covered == list(range(windows_begin[row] // keys, -(-context // keys)))
        assert set(mine[:, work.Column.PARTS]) <= {len(mine)}
        if len(mine) > 1:
            merged[row] = mine[0, work.Column.PARTIAL]
            assert mine[:, work.Column.PARTIAL].tolist() == list(range(merged[row], merged[row] + len(mine)))
            partials += mine[:, work.Column.PARTIAL].tolist()
    assert len(partials) == len(set(partials))
    assert not partials or max(partials) < room.partials
    assert (found_merges is None) == (room.merges == room.partials == 0)
    merges: Any = [] if found_merges is None else np.asarray(found_merges)
    assert len(merges) == room.merges
    listed = {each[work.Column.ROW]: each[work.Column.PARTIAL] for each in merges if each[work.Column.TOKENS]}
    assert listed == merged
    return room.partials


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [None, 300])
def test_parts_cover_every_context_once(window: int | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    contexts = [int(2 ** random.uniform(0, 13)) for _ in range(random.integers(1, 40))]
    sizes = dataclasses.replace(SMALL, programs=int(random.integers(1, 300)), split_tokens=int(random.integers(1, 999)))
    request = request_for(rows=len(contexts), width=128, tokens=len(contexts), sliding_window=window)
    check_parts(request, sizes, contexts)


def test_a_wider_table_is_no_more_work() -> None:
    contexts = (5000, 300, 2000, 1)
    narrow, wide = (
        np.asarray(work.decode_work(request_for(rows=4, width=width, tokens=4), HOPPER, decode_rows(*contexts))[0])
        for width in (64, 512)
    )
    np.testing.assert_array_equal(wide[: len(narrow)], narrow)
    assert not wide[len(narrow) :].any()
    wanted = HOPPER.programs // 8 + 1
    assert len(wide) <= len(contexts) + wanted


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
        for offset in range(min(size, each[work.Column.TOKENS] - each[work.Column.FIRST]))
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
            # 128 query heads for a kv head are 128 queries at least, and nothing else may be too much.
            assert request.group_size == 128, reason
            assert head_dim > 64, reason
            assert name not in ("H100", "H200"), reason
            continue
        sizes = tiles.choose(request, RaggedPageConfig())
        for tile in (sizes.decode, sizes.prefill):
            about = f"{tile} for {request.describe()}"
            assert tile.shared_bytes(request, card) <= card.shared_bytes, about
            assert tile.queries >= request.group_size, about
            # Products of float32 have no tile that is small enough for that many queries.
            large = request.group_size > 32 and request.compute_dtype.itemsize > 2
            assert tile.fits(request, card) or large, about


def test_shared_memory_of_one_tile() -> None:
    """By hand: two steps on their way, 64 tokens of 128 lanes in keys and in values, 2 bytes each, and 64 page ids;
    weights of 16 queries, and these; 1 KiB."""
    steps, aside = 2 * (2 * 64 * 128 * 2 + 64 * 4), 16 * 128 * 2 + 16 * 64 * 2 + 1024
    assert Tile(16, 64, 4, 3).shared_bytes(request_for(), H100) == steps + aside
    # A float8 cache: 1 byte on its way, and the step that is computed is converted in registers.
    request = request_for(cache=jnp.float8_e4m3fn)
    assert Tile(16, 64, 4, 3).shared_bytes(request, H100) == 2 * (2 * 64 * 128 + 64 * 4) + aside
    # 128 queries: Hopper multiplies from shared memory, where the converted step has a place of its own.
    aside = 128 * 128 * 2 + 128 * 64 * 2 + 1024
    steps = 2 * (2 * 64 * 128 + 64 * 4) + 2 * 64 * 128 * 2
    assert Tile(128, 64, 8, 3).shared_bytes(request, H100) == steps + aside
    # Other cards have it in registers; their float32 result is what is largest.
    assert Tile(128, 16, 8, 2).shared_bytes(request, CARDS["A100"]) == 128 * 128 * 4 + 1024


def test_stages_are_steps_in_flight() -> None:
    assert [Tile(16, 64, 4, stages).num_stages for stages in (1, 2, 3, 4)] == [1, 3, 5, 7]


def test_a_device_says_what_it_has() -> None:
    """More than its name does, where it can."""
    h20 = types.SimpleNamespace(
        device_kind="NVIDIA H20", core_count=78, compute_capability="9.0", shared_memory_per_block_optin=227 * 1024
    )
    assert tiles.card_of(h20) == ("NVIDIA H20", Card(78, 227 * 1024, (9, 0)))
    amd = types.SimpleNamespace(device_kind="AMD Instinct MI300X", core_count=None, compute_capability="gfx942")
    assert tiles.card_of(amd) == ("AMD Instinct MI300X", CARDS["MI300"])
    assert tiles.card_of(types.SimpleNamespace(device_kind="a card")) == ("a card", tiles.ANY_CARD)


def test_config_fields_set_tiles() -> None:
    request = request_for(page_size=16)
    config = RaggedPageConfig(num_kv_pages_per_block=3, num_queries_per_block=5, num_warps=3, num_stages=1)
    sizes = tiles.choose(request, config)
    assert (sizes.decode.keys, sizes.decode.warps, sizes.decode.stages) == (64, 4, 1)
    assert (sizes.prefill.keys, sizes.prefill.queries) == (64, 32)  # 5 tokens of 4 heads


def test_kernel_config_takes_the_place_of_the_table() -> None:
    request = request_for()
    assert tiles.choose(request, RaggedPageConfig(kernel_config=SMALL)) == SMALL
    # Fields that all kernels have come first.
    sizes = tiles.choose(request, RaggedPageConfig(kernel_config=SMALL, num_warps=8))
    assert sizes.decode == dataclasses.replace(SMALL.decode, warps=8)
    with pytest.raises(Unsupported, match=r"decode tiles of 16 queries do not hold the 32 query heads of a kv head"):
        tiles.choose(request_for(q_heads=32, kv_heads=1), RaggedPageConfig(kernel_config=SMALL))


def test_kernel_config_keeps_the_choice_to_this_kernel() -> None:
    request = request_for()
    config = RaggedPageConfig(kernel_config=SMALL)
    assert select.select(request, config)[1].kernel == NAME
    refusals = {each.kernel: each.reason for each in select.select(request, config)[1].refusals}
    assert refusals["xla"] == "the config holds Tiles, the knobs of another kernel"


def test_config_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"pallas_gpu: decode tiles .* 9 stages take \d+ KiB of shared memory, this"):
        tiles.choose(request_for(), RaggedPageConfig(num_stages=9))


@pytest.mark.parametrize(
    "bad", [{"queries": 8}, {"queries": 24}, {"keys": 0}, {"warps": 3}, {"stages": 0}, {"keys": True}, {"keys": 32.0}]
)
def test_impossible_tiles_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        Tile(**{"queries": 16, "keys": 16, "warps": 4, "stages": 1, **bad})


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
    monkeypatch.setattr(tiles, "card", lambda: ("a card", found))
    assert PallasGPU().refuses(request_for(cache=cache)) == refused


@pytest.mark.parametrize("platform", ["gpu", "cuda", "rocm"])
@pytest.mark.parametrize("config", [None, RaggedPageConfig(platform="triton"), RaggedPageConfig(platform="pallas")])
def test_is_the_first_choice_on_a_gpu(platform: str, config: RaggedPageConfig | None) -> None:
    batch = build_batch(case_named("mixed"), "v2")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)
    selection = explain(v2, batch.queries, batch.updated_pages, *index, platform=platform, config=config)
    assert selection.kernel == NAME
    on_cpu = explain(v2, batch.queries, batch.updated_pages, *index, platform="cpu")
    assert select.Refusal(NAME, "runs on gpu, not on cpu") in on_cpu.refusals


# Tuned tiles.


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Writes the file of tuned tiles, as seen by a process on an H100."""
    monkeypatch.setattr(tiles, "card", lambda: ("NVIDIA H100 80GB HBM3", H100))

    def write(content: Any) -> None:
        tiles.tuned_file().write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        tiles.read_tuned.cache_clear()

    return write


def test_tuned_tiles_are_between_config_and_table(tuned: Callable[[Any], None]) -> None:
    request = request_for()
    assert tiles.choose(request, RaggedPageConfig()) == HOPPER
    key = tiles.tuned_key("NVIDIA H100 80GB HBM3", request)
    tuned({"format": tiles.FORMAT, "entries": {key: {"tiles": dataclasses.asdict(SMALL)}}})
    assert tiles.choose(request, RaggedPageConfig()) == SMALL
    assert tiles.choose(request, RaggedPageConfig(num_warps=8)).decode == dataclasses.replace(SMALL.decode, warps=8)
    # Another head_dim was not tuned.
    other = request_for(head_dim=64)
    assert tiles.choose(other, RaggedPageConfig()) == tiles.default_tiles(other, H100)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ({"entries": {}}, "KeyError('format')"),
        ({"format": 1, "entries": {}}, f"format 1, this version of the package reads {tiles.FORMAT}"),
        ({"format": tiles.FORMAT}, "KeyError('entries')"),
        ({"format": tiles.FORMAT, "entries": {"a": {"tiles": {"decode": {}}}}}, "missing 4 required"),
        (
            {"format": tiles.FORMAT, "entries": {"a": {"tiles": {**dataclasses.asdict(SMALL), "programs": 0}}}},
            "programs: got 0",
        ),
        ({"format": tiles.FORMAT, "entries": {"a": {"tiles": {**dataclasses.asdict(SMALL), "speed": 1}}}}, "speed"),
    ],
)
def test_unusable_tuned_file_is_named_and_ignored(
    content: Any, reason: str, tuned: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    tuned(content)
    with caplog.at_level(logging.WARNING, logger="easydel_ragged_plugin"):
        assert tiles.choose(request_for(), RaggedPageConfig()) == HOPPER
    assert reason in caplog.text
    assert "Run 'easydel-ragged tune' to write them anew" in caplog.text
    assert str(tiles.tuned_file()) in caplog.text


# What it says of itself.


def test_facts_notes_and_fingerprint_without_a_gpu() -> None:
    kernel = PallasGPU()
    assert kernel.facts() == {"available": True, "reason": None, "card": None, "tuned": 0}
    assert kernel.notes("cpu") == ()
    assert kernel.fingerprint() == "easydel_ragged_plugin.kernels.pallas_gpu.PallasGPU"


def test_facts_notes_and_fingerprint_follow_what_was_tuned_on_this_card(tuned: Callable[[Any], None]) -> None:
    kernel, request, name = PallasGPU(), request_for(), "NVIDIA H100 80GB HBM3"

    def entries(*cards: str) -> dict[str, Any]:
        return {tiles.tuned_key(card, request): {"tiles": dataclasses.asdict(SMALL)} for card in cards}

    seen = set()
    # Another card's name begins as this one's does, or this one's as another's: neither is this card.
    for cards, count in (((), 0), ((name,), 1), (("NVIDIA H100", f"{name}e"), 0)):
        tuned({"format": tiles.FORMAT, "entries": entries(*cards)})
        assert kernel.facts() == {"available": True, "reason": None, "card": name, "tuned": count}
        assert ("'easydel-ragged tune' finds those of this GPU" in " ".join(kernel.notes("gpu"))) == (count == 0)
        seen.add(kernel.fingerprint())
    untuned, of_card = sorted(seen, key=len)
    assert untuned == f"{PallasGPU.__module__}.PallasGPU on {name}, tuned: nothing"
    assert str(SMALL) in of_card
