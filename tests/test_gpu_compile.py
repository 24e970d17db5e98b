"""The GPU kernels through the whole compiler, for cards that are described and not there.

XLA, Triton and ptxas take the programs: what registers and shared memory they need, that 16-bit products run on tensor
cores, which loops over keys are pipelined, and that the pages are in place. No GPU has run anything here, and nothing
here is about time or numbers.

``check`` holds a program against all of it. What it must not let pass is at the end of the file.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_cards import CARDS, Kernel, compile_for, device, loops_of, missing, on
from gpu_requests import in_two_loops
from pairwise import pairwise

from easydel_ragged_plugin import (
    RaggedPageConfig,
    explain,
    page_shape,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
)
from easydel_ragged_plugin.kernels.pallas_gpu import attend, tiles
from easydel_ragged_plugin.kernels.pallas_gpu.softmax import exp2
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Tile
from easydel_ragged_plugin.layout import Version
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
    "all": {
        "sliding_window": 300,
        "logits_soft_cap": 30.0,
        "sinks": True,
        "q_scale": 0.5,
        "v_scale": 3.0,
        "return_lse": True,
    },
}
HEADS = ((32, 8), (8, 1), (9, 3), (64, 1))
KERNELS = {"ragged_decode", "ragged_merge", "ragged_prefill"}
ATTENTION = {"ragged_decode": "decode", "ragged_prefill": "prefill"}

FEW_BYTES = 64
"""16 registers. ptxas gives up some where one more program fits on a multiprocessor for that, and 128 queries
of a head_dim above 128 take all of them."""


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
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tiles.Card]:
    """``use(card)``: the kernel finds that card, as it would on a machine that has one."""

    def use(card: str) -> tiles.Card:
        found = tiles.card_of(device(card))
        monkeypatch.setattr(tiles, "card", lambda: found)
        jax.clear_caches()
        return found[1]

    monkeypatch.setattr(tiles, "read_tuned", dict)
    return use


def build(
    use: Any,
    card: str,
    version: Version = "v3",
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
    donate: bool = True,
    prepare: Callable[[jax.Array], jax.Array] = lambda pages: pages,
    **options: Any,
) -> Program:
    """A call with its pages donated, compiled for ``card``. It attends to ``prepare(pages)``."""
    found = use(card)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=on(card))
    index = functools.partial(array, dtype=jnp.int32)
    cache = np.dtype(cache or dtype)
    stored = array(page_shape(version, pages, 128, kv_heads, head_dim, cache), cache)
    queries, new = array((tokens, q_heads, head_dim), dtype), array((tokens, kv_heads, head_dim), dtype)
    lengths = [index((rows,)), index((rows, width)), index((rows + 1,))]
    aux = [array((q_heads,), jnp.float32)] if sinks else []
    function: Any = ragged_page_attention_v2 if version == "v2" else ragged_page_attention_v3
    before = [queries] if version == "v2" else [queries, new, new]
    at, last = len(before), index((1 if version == "v2" else 3,))
    arguments = [*before, stored, *lengths, last, *aux]
    options = {**options, "platform": "gpu", "config": config}
    selection = explain(function, *arguments, **options)
    assert selection.kernel == "pallas_gpu", str(selection)

    def call(*arrays: Any) -> Any:
        # v2 gives no pages; a caller that donates them has them passed through.
        output = function(*arrays[:at], prepare(arrays[at]), *arrays[at + 1 :], **options)
        return (output, arrays[at]) if version == "v2" else output

    mesh = on(card).mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    with jax.set_mesh(mesh):  # where JAX looks, from 0.11 on, for the GPU that it lowers for
        lowered = jax.jit(call, donate_argnums=at if donate else ()).trace(*arguments).lower()
    compiled, kernels = compile_for(card, lowered)
    sizes = tiles.choose(selection.request, selection.config)
    return Program(compiled, kernels, selection.request, found, sizes, int(np.prod(stored.shape)) * cache.itemsize)


def check(program: Program, spilled: int = FEW_BYTES) -> None:
    updates = {"ragged_update"} if program.request.version == "v3" else set()
    assert set(program.kernels) == KERNELS | updates
    for name, kernel in program.kernels.items():
        assert kernel.spilled_bytes <= spilled, f"{name}: {kernel.spilled_bytes} bytes spilled"
        if name not in ATTENTION:
            assert not kernel.code.tensor_core_products, name
            continue
        tile = program.tile(name)
        about = f"{name} {tile}"
        # An upper bound, and a close one: what it refuses would not have run, and what it gives up was too large.
        bound = tile.shared_bytes(program.request, program.card)
        assert kernel.shared_bytes <= bound <= program.card.shared_bytes, f"shared memory of {about}"
        assert kernel.threads == 32 * tile.warps, f"threads of {about}"
        check_loops(program, name)
    # The pages are the caller's memory; what else there is is made of partial results and of work lists.
    memory = program.compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= program.pages_bytes, "the pages are not in place"
    assert memory.temp_size_in_bytes < temporary_bytes(program), f"temporary memory: {memory}"


def check_loops(program: Program, name: str) -> None:
    """There is one loop over keys. It has its products, on the units that they are meant for, and copies the keys,
    values and page ids of one step asynchronously while an earlier one is computed. The loop over single queries copies
    nothing ahead."""
    kernel, tile, request = program.kernels[name], program.tile(name), program.request
    about = f"{name} {tile} for {request.describe()}"
    lanes = tiles.power_of_two(request.head_dim)
    single = kernel.single_query_loop
    assert single.tensor_core_products == single.copied_bytes == 0, f"the loop over single queries of {about}"
    for loop in kernel.key_loops:
        assert bool(loop.tensor_core_products) == (request.compute_dtype.itemsize == 2), f"tensor cores in {about}"
        if request.compute_dtype.itemsize > 2:
            assert loop.multiply_adds * kernel.threads >= 2 * tile.queries * tile.keys * lanes, f"products of {about}"
    # Keys, values and page ids. A thread copies an id at least; those past the step's end are predicated off.
    step = 2 * tile.keys * lanes * request.cache_dtype.itemsize + 4 * max(tile.keys, kernel.threads)
    for loop in kernel.key_loops:
        copied = loop.copied_bytes * kernel.threads
        assert copied == (step if tile.stages > 1 else 0), f"copies of {about}: {copied} bytes"
        assert tile.stages == 1 or not loop.loads, f"{loop.loads} loads that the loop waits for in {about}"
    assert len(kernel.key_loops) == 1, f"{len(kernel.key_loops)} loops over keys in {about}"


def temporary_bytes(program: Program) -> int:
    """Bound on what a call needs beside its arguments and results: partial results in float32, the output before it is
    whole, new keys and values in the cache's dtype, work lists. Neither the cache nor the table's width is in it."""
    request, sizes = program.request, program.sizes
    wanted = -(-sizes.programs // request.num_kv_heads)
    tokens = sizes.decode.queries // request.group_size
    lanes = tiles.power_of_two(request.head_dim) + 2
    partial = 4 * request.num_q_heads * tokens * 2 * wanted * lanes
    heads = request.num_q_heads + 2 * request.num_kv_heads
    return partial + 2 * request.num_tokens * heads * request.head_dim * 4 + 2**20


@pytest.mark.parametrize(
    ("dtypes", "head_dim", "options", "card", "heads", "version"),
    pairwise(list(DTYPES)[:4], (64, 80, 128, 256), list(OPTIONS), list(CARDS), HEADS, ("v2", "v3")),
)
def test_compiles_for_tensor_cores(
    dtypes: str, head_dim: int, options: str, card: str, heads: tuple[int, int], version: Version, described: Any
) -> None:
    dtype, cache = DTYPES[dtypes]
    if dtypes == "float8-e4m3" and CARDS[card].capability < (8, 9):  # refused by name there
        cache = jnp.float8_e5m2
    q_heads, kv_heads = heads
    fields: dict[str, Any] = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "cache": cache}
    check(build(described, card, version, dtype=dtype, **fields, **OPTIONS[options]))


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
    ("card", "head_dim", "spilled"), [("H100", 256, FEW_BYTES), ("A100", 128, FEW_BYTES), ("A100", 256, 256)]
)
def test_the_largest_groups_compile(card: str, head_dim: int, spilled: int, described: Any) -> None:
    """With 128 query heads for a kv head, the widest heads are more than a thread of an A100 has the registers for."""
    program = build(described, card, q_heads=128, kv_heads=1, head_dim=head_dim)
    check(program, spilled)
    if spilled > FEW_BYTES:
        with pytest.raises(AssertionError, match="bytes spilled"):
            check(program)


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


INSTRUCTIONS = {"H100": "wgmma.mma_async", "B200": "tcgen05.mma", "A100": "mma.sync"}


@pytest.mark.parametrize("card", INSTRUCTIONS)
def test_prompts_run_on_the_tensor_cores_of_the_generation(card: str, described: Any) -> None:
    program = build(described, card)
    prefill, decode = (program.kernels[name].key_loops for name in ("ragged_prefill", "ragged_decode"))
    assert (len(prefill), len(decode)) == (1, 1)
    for loop in prefill:
        assert [name for name in INSTRUCTIONS.values() if f"{name}." in loop.ptx] == [INSTRUCTIONS[card]]
    for loop in decode:  # 16 queries are too few for groups of four warps
        assert [name for name in INSTRUCTIONS.values() if f"{name}." in loop.ptx] == ["mma.sync"]


@pytest.mark.parametrize(("cache", "converted"), [(jnp.float8_e4m3fn, True), (jnp.bfloat16, False)])
def test_float8_is_converted_by_an_instruction(cache: Any, converted: bool, described: Any) -> None:
    program = build(described, "H100", cache=cache)
    for name in ATTENTION:
        found = ["cvt.rn.f16x2.e4m3x2" in loop.ptx for loop in program.kernels[name].key_loops]
        assert found == [converted], name


# What must not pass.


def test_loops_of_ptx_are_found() -> None:
    """A loop in a loop counts with the outer one, and what a branch jumps over counts with none."""
    found = loops_of("""
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        @%p1 bra 	$L__BB0_4;
    $L__BB0_1:                              // =>This Loop Header: Depth=1
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    $L__BB0_2:
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 };
        {
        waitLoop:
        @!complete bra.uni waitLoop;
        }
        @%p2 bra 	$L__BB0_2;
        @!%p3 bra 	$L__BB0_1;
        bra.uni 	$L__BB0_4;
    $L__BB0_3:
        fma.rn.f32 	%r1, %r2, %r3, %r4;
        ex2.approx.ftz.f32 	%r1, %r2;
        @%p4 bra 	$L__BB0_3;
        ret;
    $L__BB0_4:
        @%p5 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        bra.uni 	$L__BB0_3;
    """)
    assert [loop.copied_bytes for loop in found] == [4, 0]
    assert [loop.tensor_core_products for loop in found] == [1, 0]
    assert [loop.multiply_adds for loop in found] == [0, 1]
    assert [loop.has_softmax for loop in found] == [False, True]


@pytest.mark.parametrize("card", CARDS)
def test_one_stage_is_not_taken_for_a_pipeline(card: str, described: Any) -> None:
    program = build(described, card, config=RaggedPageConfig(num_stages=1))
    check(program)
    staged = {name: dataclasses.replace(program.tile(name), stages=2) for name in ATTENTION}
    claimed = dataclasses.replace(
        program,
        sizes=dataclasses.replace(program.sizes, decode=staged["ragged_decode"], prefill=staged["ragged_prefill"]),
    )
    for name in ATTENTION:
        with pytest.raises(AssertionError, match="copies of"):
            check_loops(claimed, name)


@pytest.mark.parametrize("options", ["plain", "window"])
def test_a_loop_that_is_not_pipelined_is_seen(options: str, described: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton pipelines the first of two loops over keys alone, also where they do the same."""
    monkeypatch.setattr(attend, "walk", in_two_loops(attend.walk))
    program = build(described, "H100", **OPTIONS[options])
    for name in ATTENTION:
        first, second = program.kernels[name].key_loops
        assert first.copied_bytes > second.copied_bytes == 0
        with pytest.raises(AssertionError, match=r"copies of .*: 0 bytes"):
            check_loops(program, name)


def test_a_weight_is_two_instructions(described: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def powers(program: Program, name: str) -> tuple[int, int]:
        """How many there are in the loop over keys, and how many are of an instruction without more ado."""
        (loop,) = program.kernels[name].key_loops
        every, direct = r"ex2\.approx", r"fma\.rn\.f32 power.*ex2\.approx\.ftz"
        return len(re.findall(every, loop.ptx)), len(re.findall(direct, loop.ptx))

    program = build(described, "H100")
    for name in ATTENTION:
        tile = program.tile(name)
        every, direct = powers(program, name)
        assert every == direct >= tile.queries * tile.keys // (32 * tile.warps)
    monkeypatch.setattr(attend, "exp2_of_nvidia", exp2)
    program = build(described, "H100")
    for name in ATTENTION:
        every, direct = powers(program, name)
        assert every > direct == 0


def test_a_short_window_has_neither_merges_nor_partials(described: Any) -> None:
    oss: dict[str, Any] = {"q_heads": 64, "kv_heads": 8, "head_dim": 64, "rows": 64, "tokens": 64, "sinks": True}
    program = build(described, "H100", sliding_window=128, **oss)
    assert set(program.kernels) == {"ragged_update", "ragged_decode", "ragged_prefill"}
    assert program.compiled.memory_analysis().temp_size_in_bytes < 2**16
    whole = build(described, "H100", **oss)
    assert whole.compiled.memory_analysis().temp_size_in_bytes > 2**22


def test_a_missing_product_is_seen(described: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the dtypes is what the other's program must not be taken for, and so is a kernel that multiplies less."""
    program, other = build(described, "H100"), build(described, "H100", dtype=jnp.float32)
    check(program)
    check(other)
    for name in ATTENTION:
        for one, wrong in ((program, other), (other, program)):
            with pytest.raises(AssertionError, match="tensor cores in"):
                check_loops(dataclasses.replace(one, request=wrong.request, sizes=wrong.sizes), name)
    monkeypatch.setattr(
        attend, "product", lambda left, right, contracted: jnp.zeros((left.shape[0], right.shape[1 - contracted]))
    )
    for dtype, reason in ((jnp.bfloat16, "tensor cores in"), (jnp.float32, "products of")):
        with pytest.raises(AssertionError, match=reason):
            check(build(described, "H100", dtype=dtype))


def test_other_tiles_than_those_compiled_are_seen(described: Any) -> None:
    program = build(described, "H100")
    for fields, reason in (({"keys": 32}, "shared memory of"), ({"warps": 8}, "threads of")):
        wrong = dataclasses.replace(program.sizes, decode=dataclasses.replace(program.sizes.decode, **fields))
        with pytest.raises(AssertionError, match=reason):
            check(dataclasses.replace(program, sizes=wrong))


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_pages_that_are_not_in_place_are_seen(version: Version, described: Any) -> None:
    with pytest.raises(AssertionError, match="the pages are not in place"):
        check(build(described, "H100", version, donate=False))


def test_a_copy_of_the_pages_is_seen(described: Any) -> None:
    with pytest.raises(AssertionError, match="temporary memory"):
        check(build(described, "H100", "v2", prepare=lambda pages: 2 * pages))
