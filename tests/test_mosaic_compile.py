"""The Mosaic kernel through the whole compiler, for an H100 that is described and not there.

Mosaic GPU makes PTX of the kernel and ptxas machine code: what registers it needs, that both products run on tensor
cores in each loop over keys, and that pages come by the tensor memory accelerator from where they lie. No GPU has run
anything here.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_cards import CARDS, Code, compiles_mosaic, loops_of, on

from easydel_ragged_plugin import RaggedPageConfig, Unsupported, page_shape, ragged_page_attention_v3
from easydel_ragged_plugin.kernels import pallas_mosaic_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.kernels.pallas_gpu.work import Column
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import KERNEL, assembler, sizes
from easydel_ragged_plugin.layout import PageLayout
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.types import AttentionRequest, Operands

REASON = compiles_mosaic()
if REASON is not None and os.environ.get("EASYDEL_RAGGED_TEST_GPU_COMPILER") == "require":
    raise RuntimeError(REASON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FEW_BYTES = 64
"""Of a thread, that may be spilled with head_dim 256, outside of the loops. Nothing is with a smaller one."""
PLAIN_COPY = re.compile(r"\b(?:ld|st)\.(?:\w+\.)*(?:global|local)\b")
"""A load or store of a thread from or to the card's memory."""


def request(
    version: Any, heads: tuple[int, int], head_dim: int, page_size: int = 128, **options: Any
) -> AttentionRequest:
    """A call with 8 rows of up to 64 pages and 512 new tokens, in bfloat16."""
    dtype = np.dtype(jnp.bfloat16)
    shape = page_shape(version, 256, page_size, heads[1], head_dim, dtype)
    layout = PageLayout.of(version, shape, heads[1], head_dim, dtype)
    return AttentionRequest(
        version, "gpu", 512, *heads, head_dim, 8, 64, 256, dtype, dtype, layout, options=Options(**options)
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled call; of the Mosaic kernel its PTX, and what ptxas says of it."""

    compiled: Any
    ptx: str
    said: str

    @property
    def key_loops(self) -> list[Code]:
        return [loop for loop in loops_of(self.ptx) if loop.tensor_core_products]


def compile_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: Any, *arguments: Any, donated: tuple[int, ...] = ()
) -> Program:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    mesh = on("H100").mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=donated).trace(*arguments).lower().compile()
    ptx, said = (next(folder.glob(f"*.{kind}")).read_text() for kind in ("ptx", "ptxas"))
    return Program(compiled, ptx, said)


def attended(request: AttentionRequest, folder: Path, monkeypatch: pytest.MonkeyPatch, prepare: Any = None) -> Program:
    """The kernel of long rows, of pages that ``prepare`` may have changed."""
    from easydel_ragged_plugin.kernels.pallas_mosaic_gpu.attend import attend_long_rows

    array = functools.partial(jax.ShapeDtypeStruct, sharding=on("H100"))
    pages = page_shape(
        request.version, 256, request.page_size, request.num_kv_heads, request.head_dim, request.cache_dtype
    )
    arguments = [
        array((40, len(Column)), jnp.int32),
        array((512, request.num_q_heads, request.head_dim), request.query_dtype),
        array(pages, request.cache_dtype),
        array((8, 64), jnp.int32),
        *([array((request.num_q_heads,), jnp.float32)] if request.options.sinks else []),
    ]
    own = sizes.choose(request)
    assert own is not None

    def call(work: Any, queries: Any, pages: Any, tables: Any, sinks: Any = None) -> Any:
        pages = pages if prepare is None else prepare(pages)
        return attend_long_rows(request, own, work, queries, pages, tables, sinks, False)

    return compile_program(folder, monkeypatch, call, *arguments)


def check_in_place(program: Program) -> None:
    """Beside arguments and results there is next to nothing: the pages are read from where they lie."""
    assert program.compiled.memory_analysis().temp_size_in_bytes < 2**16, "something has been copied for the kernel"


@pytest.mark.parametrize(
    ("version", "heads", "head_dim", "options"),
    [
        ("v3", (32, 8), 128, {}),
        ("v3", (64, 8), 64, {"sliding_window": 128, "sinks": True}),
        ("v2", (16, 8), 256, {"sliding_window": 1024, "logits_soft_cap": 50.0}),
        ("v2", (32, 8), 128, {"attention_chunk_size": 512}),
        ("v3", (16, 1), 128, {"logits_soft_cap": 30.0}),
    ],
    ids=lambda value: str(value),
)
def test_compiles_for_hopper(
    version: Any, heads: tuple[int, int], head_dim: int, options: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    made = request(version, heads, head_dim, **options)
    own = sizes.choose(made)
    assert own is not None
    program = attended(made, tmp_path, monkeypatch)
    check_in_place(program)
    spilled = [int(each) for each in re.findall(r"(\d+) bytes spill", program.said)]
    registers = re.search(r"Used (\d+) registers", program.said)
    assert spilled
    assert registers is not None
    assert max(spilled) <= (FEW_BYTES if head_dim == 256 else 0), program.said
    check_registers(program.ptx, int(registers[1]))
    # Blocks at the window's edge, those that all queries see whole, the last ones: both products in each, by wgmma.
    loops = program.key_loops
    assert len(loops) == 2 + made.options.is_local
    for loop in loops:
        products = re.findall(r"\bwgmma\.mma_async[^;]*;", loop.ptx)
        weighted = [each for each in products if re.search(r"\},\s*\{", each)]  # weights are in registers
        assert (len(products), len(weighted)) == (head_dim // 16 + own.keys // 16, own.keys // 16)
        assert "ex2.approx.ftz.f32" in loop.ptx
        assert not PLAIN_COPY.search(loop.ptx), "the loop leaves registers and shared memory"
    # What copies reads page ids from global memory: such loads are found.
    assert any(PLAIN_COPY.search(loop.ptx) for loop in loops_of(program.ptx) if not loop.tensor_core_products)


def check_registers(ptx: str, at_launch: int) -> None:
    """Each warpgroup has what it is meant to have, and together they have no more than at launch, which there is."""
    found = re.findall(r"\bsetmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+);", ptx)
    wanted = {("dec", str(sizes.MEMORY_REGISTERS)), ("inc", str(sizes.COMPUTE_REGISTERS))}
    assert len(found) == 2, f"setmaxnreg: {found}"
    assert set(found) == wanted, f"setmaxnreg: {found}"
    later = sizes.MEMORY_REGISTERS + sizes.COMPUTE_WARPGROUPS * sizes.COMPUTE_REGISTERS
    assert later <= (sizes.COMPUTE_WARPGROUPS + 1) * at_launch, f"{later} registers, {at_launch} at launch"
    assert 128 * (sizes.COMPUTE_WARPGROUPS + 1) * at_launch <= 65536, f"{at_launch} registers of a thread at launch"


@pytest.mark.parametrize(
    ("ptx", "at_launch", "reason"),
    [
        ("setmaxnreg.dec.sync.aligned.u32 \t56; setmaxnreg.inc.sync.aligned.u32 224;", 168, None),
        ("setmaxnreg.dec.sync.aligned.u32 \t56; setmaxnreg.inc.sync.aligned.u32 224;", 160, "504 registers, 160 at"),
        ("setmaxnreg.dec.sync.aligned.u32 \t56; setmaxnreg.inc.sync.aligned.u32 224;", 176, "176 registers of"),
        ("setmaxnreg.dec.sync.aligned.u32 \t56; setmaxnreg.inc.sync.aligned.u32 232;", 168, "setmaxnreg: "),
        ("setmaxnreg.dec.sync.aligned.u32 \t56;", 168, "setmaxnreg: "),
    ],
)
def test_registers_that_a_program_can_not_have_are_seen(ptx: str, at_launch: int, reason: str | None) -> None:
    if reason is None:
        check_registers(ptx, at_launch)
        return
    with pytest.raises(AssertionError, match=reason):
        check_registers(ptx, at_launch)


@pytest.mark.parametrize(
    ("instruction", "plain"),
    [
        ("ld.global.u32 %r1, [%rd1];", True),
        ("@%p1 st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};", True),
        ("ld.volatile.global.nc.u32 %r1, [%rd1];", True),
        ("st.local.b64 [%rd1], %rd2;", True),
        ("ld.shared.b32 %r1, [%r2];", False),
        ("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier [%r1], [%rd1, {%r2, %r3, %r4}], [%r5];", False),
    ],
)
def test_plain_copies_are_told_apart(instruction: str, plain: bool) -> None:
    assert bool(PLAIN_COPY.search(instruction)) == plain


def test_a_copy_of_the_pages_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = attended(request("v2", (32, 8), 128), tmp_path, monkeypatch, prepare=lambda pages: pages[::-1])
    with pytest.raises(AssertionError, match="something has been copied"):
        check_in_place(program)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on the H100 that is described, with an assembler that is trusted."""
    found = CARDS["H100"]
    card = tiles.Card(found.multiprocessors, found.shared_bytes, found.capability)
    monkeypatch.setattr(tiles, "card", lambda: (found.kind, card))
    monkeypatch.setattr(assembler, "miscompiles", lambda: None)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("check_vma", [True, False])
def test_lowers_inside_of_shard_map(check_vma: bool) -> None:
    """Or refuses by name, where JAX can't trace it there."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=on("H100"))
    index = functools.partial(array, dtype=jnp.int32)
    pages = array(page_shape("v3", 256, 128, 8, 128, np.dtype(jnp.bfloat16)), jnp.bfloat16)
    new = array((512, 8, 128), jnp.bfloat16)
    call = [array((512, 32, 128), jnp.bfloat16), new, new, pages, index((8,)), index((8, 64)), index((9,)), index((3,))]
    function = functools.partial(ragged_page_attention_v3, config=KERNEL.name, platform="gpu", return_lse=True)
    spec = jax.sharding.PartitionSpec("x")

    def lower() -> Any:
        around = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=check_vma)
        return jax.jit(around).trace(*call).lower()

    mesh = on("H100").mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    with jax.set_mesh(mesh):
        if check_vma and jax.__version_info__ < pallas_mosaic_gpu.FOLLOWS_AXES_JAX:
            with pytest.raises(Unsupported, match=r"inside of jax\.shard_map, unless with check_vma=False"):
                lower()
        else:
            assert "mosaic_gpu" in lower().as_text()


@pytest.mark.usefixtures("hopper")
def test_whole_call_leaves_the_cache_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update, the kernel of long rows, what follows it and decode: one program, with the pages in their memory."""
    # Another geometry than above: a kernel that the process has compiled is not compiled again, and leaves no file.
    made = dataclasses.replace(request("v3", (40, 8), 128), return_lse=True)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=on("H100"))
    index = functools.partial(array, dtype=jnp.int32)
    pages = array(page_shape("v3", 256, 128, 8, 128, made.cache_dtype), made.cache_dtype)
    new = array((512, 8, 128), jnp.bfloat16)
    others = [array((512, 40, 128), jnp.bfloat16), new, new, index((8,)), index((8, 64)), index((9,)), index((3,))]

    def call(pages: Any, queries: Any, keys: Any, values: Any, lens: Any, tables: Any, starts: Any, last: Any) -> Any:
        operands = Operands(queries, keys, values, pages, lens, tables, starts, last, None)
        return KERNEL.forward(made, RaggedPageConfig(), operands)

    program = compile_program(tmp_path, monkeypatch, call, pages, *others, donated=(0,))
    memory = program.compiled.memory_analysis()
    pages_bytes = int(np.prod(pages.shape)) * 2
    assert memory.alias_size_in_bytes >= pages_bytes
    assert memory.temp_size_in_bytes < pages_bytes // 4, str(memory)
