"""The GPU kernels through the whole compiler, for cards that are described and not there.

XLA, Triton and ptxas take the programs: what registers and shared memory they need, that 16-bit products run on tensor
cores, that loads are pipelined, and that the pages are in place. No GPU has run anything here, and nothing here is
about time or numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_cards import CARDS, Kernel, compile_for, device, missing, on

from easydel_ragged_plugin import (
    RaggedPageConfig,
    explain,
    page_shape,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
)
from easydel_ragged_plugin.kernels import pallas_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Tile
from easydel_ragged_plugin.types import AttentionRequest

REASON = missing()
if REASON is not None and os.environ.get("EASYDEL_RAGGED_TEST_GPU_COMPILER") == "require":
    raise RuntimeError(REASON)  # where this is the purpose, skipping would look like passing
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = {
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "float16": (jnp.float16, jnp.float16),
    "float8-e4m3": (jnp.bfloat16, jnp.float8_e4m3fn),
    "float8-e5m2": (jnp.float16, jnp.float8_e5m2),
    "float32": (jnp.float32, jnp.float32),
    "float8-on-float32": (jnp.float32, jnp.float8_e5m2),
    "float32-on-bfloat16": (jnp.float32, jnp.bfloat16),
    "bfloat16-on-float32": (jnp.bfloat16, jnp.float32),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 300},
    "cap": {"logits_soft_cap": 30.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 300, "logits_soft_cap": 30.0, "sinks": True, "q_scale": 0.5, "v_scale": 3.0},
}
HEADS = ((32, 8), (8, 1), (9, 3), (64, 1))
KERNELS = {"ragged_decode", "ragged_merge", "ragged_prefill"}
ATTENTION = {"ragged_decode": "decode", "ragged_prefill": "prefill"}

FEW_BYTES = 64
"""16 registers. ptxas gives up some where one more program fits on a multiprocessor for that, and 128 rows of a
head_dim above 128 take all of them."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A call that was compiled, and what it was."""

    compiled: Any
    kernels: dict[str, Kernel]
    request: AttentionRequest
    card: tiles.Card
    sizes: tiles.Tiles
    pages_bytes: int

    def tile(self, kernel: str) -> Tile:
        return getattr(self.sizes, ATTENTION[kernel])


@pytest.fixture(autouse=True)
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``use(card)``: the kernel finds that card, as it would on a machine that has one."""

    def use(card: str) -> tiles.Card:
        found = tiles.card_of(device(card))
        monkeypatch.setattr(tiles, "card", lambda: found)
        monkeypatch.setattr(pallas_gpu, "card", lambda: found)
        jax.clear_caches()
        return found[1]

    monkeypatch.setattr(tiles, "read_tuned", dict)
    return use


def build(
    use: Any,
    card: str,
    version: str = "v3",
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    rows: int = 8,
    width: int = 64,
    pages: int = 256,
    tokens: int = 256,
    sinks: bool = False,
    config: RaggedPageConfig | None = None,
    **options: Any,
) -> Program:
    """A call with its pages donated, compiled for ``card``."""
    found = use(card)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=on(card))
    index = functools.partial(array, dtype=jnp.int32)
    cache = np.dtype(cache or dtype)
    stored = array(page_shape(version, pages, 128, kv_heads, head_dim, cache), cache)  # type: ignore[arg-type]
    queries, new = array((tokens, q_heads, head_dim), dtype), array((tokens, kv_heads, head_dim), dtype)
    lengths = [index((rows,)), index((rows, width)), index((rows + 1,))]
    aux = [array((q_heads,), jnp.float32)] if sinks else []
    if version == "v2":
        function, arguments, donated = ragged_page_attention_v2, [queries, stored, *lengths, index((1,)), *aux], 1
    else:
        function, arguments = ragged_page_attention_v3, [queries, new, new, stored, *lengths, index((3,)), *aux]
        donated = 3
    options = {**options, "platform": "gpu", "config": config}
    selection = explain(function, *arguments, **options)
    assert selection.kernel == "pallas_gpu", str(selection)

    def call(*arrays: Any) -> Any:
        # v2 gives no pages; a caller that donates them has them passed through.
        output = function(*arrays, **options)
        return (output, arrays[1]) if version == "v2" else output

    with jax.set_mesh(on(card).mesh):  # where JAX looks, from 0.11 on, for the GPU that it lowers for
        lowered = jax.jit(call, donate_argnums=donated).trace(*arguments).lower()
    compiled, kernels = compile_for(card, lowered)
    sizes = tiles.choose(selection.request, selection.config)
    return Program(compiled, kernels, selection.request, found, sizes, int(np.prod(stored.shape)) * cache.itemsize)


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations, among which each value of each axis meets each value of each other axis."""
    choose = random.Random(0)
    positions = list(itertools.combinations(range(len(axes)), 2))
    open_pairs = {(a, x, b, y) for a, b in positions for x in axes[a] for y in axes[b]}
    found = []
    while open_pairs:
        candidates = []
        for a, x, b, y in choose.sample(sorted(open_pairs, key=repr), min(60, len(open_pairs))):
            row = [choose.choice(axis) for axis in axes]
            row[a], row[b] = x, y
            met = {(i, row[i], j, row[j]) for i, j in positions} & open_pairs
            candidates.append((len(met), row, met))
        _, row, met = max(candidates, key=lambda each: each[0])
        open_pairs -= met
        found.append(tuple(row))
    return found


def check(program: Program, spilled: int = FEW_BYTES) -> None:
    updates = {"ragged_update"} if program.request.version == "v3" else set()
    assert set(program.kernels) == KERNELS | updates
    for name, kernel in program.kernels.items():
        assert kernel.spilled_bytes <= spilled, f"{name}: {kernel.spilled_bytes} bytes spilled"
        if name not in ATTENTION:
            assert not kernel.tensor_core_products
            continue
        tile = program.tile(name)
        about = f"{name} {tile}"
        # An upper bound, and a close one: what it refuses would not have run, and what it gives up was too large.
        bound = tile.shared_bytes(program.request, program.card)
        assert kernel.shared_bytes <= bound <= program.card.shared_bytes, about
        assert kernel.threads == 32 * tile.warps, about
        assert bool(kernel.asynchronous_copies) == (tile.stages > 1), about
        assert bool(kernel.tensor_core_products) == (program.request.compute_dtype.itemsize == 2), about
    # The pages are the caller's memory; what else there is is made of partial results and of work lists.
    memory = program.compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= program.pages_bytes
    assert memory.temp_size_in_bytes < temporary_bytes(program), memory


def temporary_bytes(program: Program) -> int:
    """Bound on what a call needs beside its arguments and results: partial results in float32, the output before it is
    whole, new keys and values in the cache's dtype, work lists. Neither the cache nor the table's width is in it."""
    request, sizes = program.request, program.sizes
    wanted = -(-sizes.programs // request.num_kv_heads)
    tokens = sizes.decode.rows // request.group_size
    lanes = tiles.power_of_two(request.head_dim) + 2
    partial = 4 * request.num_q_heads * tokens * 2 * wanted * lanes
    heads = request.num_q_heads + 2 * request.num_kv_heads
    return partial + 2 * request.num_tokens * heads * request.head_dim * 4 + 2**20


@pytest.mark.parametrize(
    ("dtypes", "head_dim", "options", "card", "heads", "version"),
    pairwise(list(DTYPES)[:4], (64, 80, 128, 256), list(OPTIONS), list(CARDS), HEADS, ("v2", "v3")),
)
def test_compiles_for_tensor_cores(
    dtypes: str, head_dim: int, options: str, card: str, heads: tuple[int, int], version: str, described: Any
) -> None:
    dtype, cache = DTYPES[dtypes]
    if dtypes == "float8-e4m3" and CARDS[card].capability < (8, 9):  # refused by name there
        cache = jnp.float8_e5m2
    fields = {"q_heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim, "dtype": dtype, "cache": cache}
    check(build(described, card, version, **fields, **OPTIONS[options]))


@pytest.mark.parametrize(
    ("dtypes", "head_dim", "options", "card"),
    [
        ("float32", 64, "all", "H100"),
        ("float32", 80, "sinks", "A100"),
        ("float32", 128, "window", "L4"),
        ("float32", 256, "cap", "B200"),
        ("float8-on-float32", 192, "all", "A100"),
        ("float8-on-float32", 64, "plain", "L4"),
        ("float32-on-bfloat16", 128, "all", "H100"),
        ("bfloat16-on-float32", 128, "plain", "L4"),
        ("bfloat16-on-float32", 256, "cap", "H100"),
    ],
)
def test_compiles_for_float32(dtypes: str, head_dim: int, options: str, card: str, described: Any) -> None:
    dtype, cache = DTYPES[dtypes]
    check(build(described, card, head_dim=head_dim, dtype=dtype, cache=cache, **OPTIONS[options]))


@pytest.mark.parametrize(
    ("card", "head_dim", "spilled"), [("H100", 256, FEW_BYTES), ("A100", 128, 128), ("A100", 256, 256)]
)
def test_the_largest_groups_compile(card: str, head_dim: int, spilled: int, described: Any) -> None:
    """128 query heads for a kv head are more than a thread of an A100 has the registers for."""
    check(build(described, card, q_heads=128, kv_heads=1, head_dim=head_dim), spilled)


def test_what_has_no_room_is_refused_by_name(described: Any) -> None:
    with pytest.raises(AssertionError, match=r"takes 129 KiB of shared memory, this card has 99"):
        build(described, "L4", q_heads=128, kv_heads=1, head_dim=256)


def test_a_step_more_in_flight_is_a_buffer_more(described: Any) -> None:
    """Triton divides its stages among the loads of a chain, so its number and ``Tile.stages`` are not the same."""
    shared = {}
    for stages in (2, 4):
        program = build(described, "H100", config=RaggedPageConfig(num_stages=stages))
        for name in ATTENTION:
            assert program.tile(name).stages == stages
            shared[name, stages] = program.kernels[name].shared_bytes
    for name in ATTENTION:
        # Keys, values and page ids.
        step = program.tile(name).keys * (2 * 128 * 2 + 4)
        assert shared[name, 4] - shared[name, 2] == 2 * step


def test_neither_the_cache_nor_the_table_costs_memory(described: Any) -> None:
    """The cache is 64 times and the table 16 times as large."""
    small, large = (build(described, "H100", pages=pages, width=width) for pages, width in ((256, 64), (16384, 1024)))
    before, after = (each.compiled.memory_analysis() for each in (small, large))
    assert large.pages_bytes == 64 * small.pages_bytes
    assert after.alias_size_in_bytes - before.alias_size_in_bytes == large.pages_bytes - small.pages_bytes
    assert after.temp_size_in_bytes <= 1.1 * before.temp_size_in_bytes


@pytest.mark.parametrize(("card", "instruction"), [("H100", "wgmma"), ("B200", "tcgen05"), ("A100", "mma.sync")])
def test_prompts_run_on_the_tensor_cores_of_the_generation(card: str, instruction: str, described: Any) -> None:
    program = build(described, card)
    assert f"{instruction}." in program.kernels["ragged_prefill"].ptx
    # 16 rows are too few for groups of four warps.
    assert "mma.sync." in program.kernels["ragged_decode"].ptx


def test_float8_is_converted_by_an_instruction(described: Any) -> None:
    program = build(described, "H100", cache=jnp.float8_e4m3fn)
    for name in ATTENTION:
        assert "cvt.rn.f16x2.e4m3x2" in program.kernels[name].ptx
