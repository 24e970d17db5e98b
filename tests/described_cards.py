"""Compiling for a GPU that is described and not there: what XLA, Triton and ptxas make of a call.

JAX's CUDA plugin holds the whole compiler. Given a description of a card it compiles without one, without a driver
even, up to the machine code. What a kernel takes is read where the compilers leave it: shared memory in XLA's file of
compiled kernels, registers in what ptxas says of the same PTX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

# The plugin compares the versions of NVIDIA's libraries with those of the driver, which is not here.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Description:
    """A card as XLA describes it (``GpuTargetConfigProto``). Rates only steer XLA's own fusions."""

    kind: str
    architecture: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    memory_bytes: int
    bytes_per_s: int
    l2_bytes: int

    def text(self) -> str:
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
              shared_memory_per_block: {48 * KIB}  shared_memory_per_block_optin: {self.shared_bytes}
              shared_memory_per_core: {self.shared_bytes + KIB}
              core_count: {self.multiprocessors}  fpus_per_core: 128  clock_rate_ghz: 1.8
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              memory_bandwidth: {self.bytes_per_s}  l2_cache_size: {self.l2_bytes}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 7 }}
            runtime_version {{ major: 12 minor: 9 patch: 0 }}
            device_description_str: "{self.kind}"
        """


G = 10**9
CARDS = {
    "H100": Description("NVIDIA H100 80GB HBM3", "sm_90a", (9, 0), 132, 227 * KIB, 80 * G, 3352 * G, 52_428_800),
    "A100": Description("NVIDIA A100-SXM4-80GB", "sm_80", (8, 0), 108, 163 * KIB, 80 * G, 2039 * G, 41_943_040),
    "B200": Description("NVIDIA B200", "sm_100a", (10, 0), 148, 227 * KIB, 180 * G, 8000 * G, 132_644_864),
    "L4": Description("NVIDIA L4", "sm_89", (8, 9), 58, 99 * KIB, 24 * G, 300 * G, 50_331_648),
}


@contextlib.contextmanager
def described_gpu(kind: str = CARDS["H100"].kind) -> Iterator[None]:
    """From JAX 0.11 on lowering asks which GPU it is for; before, it does not. The mesh has one axis, ``"x"``."""
    from jax_private import described_device

    device = described_device(kind, 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not any(found for folder in folders for found in Path(folder).glob("xla_cuda*")):
        return "JAX's CUDA plugin is not installed; pip install jax-cuda12-plugin nvidia-cuda-nvcc-cu12"
    if jax.__version_info__ < (0, 9):
        return f"JAX {jax.__version__} can't hold a program for a device that is not there; 0.9 can"
    if ptxas() is None:
        return "there is no ptxas beside JAX's CUDA plugin; pip install nvidia-cuda-nvcc-cu12"
    return None


def compiles_mosaic() -> str | None:
    """Why Mosaic GPU compiles nothing here, or None."""
    if importlib.util.find_spec("absl") is None:
        return "Mosaic GPU imports absl-py and does not declare it; pip install absl-py"
    return missing()


OPTIONS: dict[str, Any] = (
    {"xla_dump_emitter_re": "ptx"}  # else nothing of what the emitters make is dumped; all of it would be 70 MB
    if jax.__version_info__ >= (0, 11)
    else {"xla_gpu_enable_llvm_module_compilation_parallelism": True}  # each kernel by itself
)
"""What has PTX dumped for each kernel, with this JAX."""


@functools.cache
def ptxas() -> Path | None:
    """NVIDIA's assembler, from the package that the plugin brings with it."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((found for folder in folders for found in sorted(Path(folder).glob("*/bin/ptxas"))), None)


if ptxas() is not None:  # XLA would take one that the machine has in its PATH
    os.environ["PATH"] = os.pathsep.join((str(Path(str(ptxas())).parent), os.environ.get("PATH", "")))


@functools.cache
def device(card: str) -> Any:
    return topologies.get_topology_desc(
        platform="cuda", topology_name="described", target_config=CARDS[card].text(), topology="1x1x1"
    ).devices[0]


def on(card: str) -> NamedSharding:
    """Where arguments lie that a function is to be compiled for ``card`` with."""
    mesh = jax.sharding.Mesh([device(card)], ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Code:
    """PTX of a kernel or of one of its loops: what a thread does, where no loop is inside of it."""

    ptx: str

    @property
    def has_softmax(self) -> bool:
        return "ex2.approx" in self.ptx

    @property
    def tensor_core_products(self) -> int:
        return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", self.ptx))

    @property
    def multiply_adds(self) -> int:
        """float32 multiplications with an addition, on no tensor core."""
        return len(re.findall(r"\bfma\.rn\.f32\b", self.ptx))

    @property
    def loads(self) -> int:
        """Loads from the card's memory into registers."""
        return len(re.findall(r"\bld\.global\b", self.ptx))

    @property
    def copied_bytes(self) -> int:
        """Bytes that a thread copies to shared memory asynchronously."""
        copies = re.findall(r"\bcp\.async\.c[ag]\..*\], (\w+)", self.ptx)
        assert len(copies) == len(re.findall(r"\bcp\.async\.c[ag]\b", self.ptx)), "a copy whose size can't be read"
        return sum(int(size, 0) for size in copies)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program. ``spilled_bytes`` of each thread, ``shared_bytes`` of each program."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    code: Code

    @functools.cached_property
    def softmax_loops(self) -> list[Code]:
        """Its loops over keys: no others have a softmax."""
        return [loop for loop in loops_of(self.code.ptx) if loop.has_softmax]

    @property
    def key_loops(self) -> list[Code]:
        """Those over blocks of keys."""
        return self.softmax_loops[:-1]

    @property
    def single_query_loop(self) -> Code:
        """The last one, over the queries of a tile whose sums hold a NaN."""
        return self.softmax_loops[-1]


def loops_of(ptx: str) -> list[Code]:
    """The outermost loops of a kernel, in the order in which they run: blocks that can be reached from one another.

    LLVM's labels begin with ``$L__``. Others belong to inline assembly, which loops within a block.
    """
    blocks: list[list[str]] = [[]]
    position: dict[str, int] = {}
    for line in map(str.strip, ptx.splitlines()):
        label = re.match(r"(\$L__\w+):", line)
        if label is not None:
            position[label[1]] = len(blocks)
            blocks.append([])
        elif line and not line.startswith("//"):
            blocks[-1].append(line)
            if re.search(r"\bbra\b.*\$L__", line):
                blocks.append([])

    following: list[set[int]] = []
    for index, lines in enumerate(blocks):
        last = lines[-1] if lines else ""
        branch = re.fullmatch(r"(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$L__\w+);", last)
        assert branch is not None or not re.search(r"\bbra\b.*\$L__|\bbrx\b", last), f"can't read: {last}"
        falls_through = last != "ret;" and (branch is None or branch[1] is not None)
        following.append({index + 1} if falls_through and index + 1 < len(blocks) else set())
        if branch is not None:
            following[-1].add(position[branch[2]])

    reached: list[set[int]] = []
    for first in following:
        found, open_blocks = set(first), list(first)
        while open_blocks:
            new = following[open_blocks.pop()] - found
            found |= new
            open_blocks += new
        reached.append(found)
    loops = {
        tuple(sorted(other for other in reached[block] if block in reached[other]))
        for block in range(len(blocks))
        if block in reached[block]
    }
    # What comes earlier reaches more.
    ordered = sorted(loops, key=lambda loop: -len(reached[loop[0]]))
    return [Code("\n".join(line for block in loop for line in blocks[block])) for loop in ordered]


def compile_for(card: str, lowered: Any) -> tuple[Any, dict[str, Kernel]]:
    """The compiled program, and those of its kernels that are this package's."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "kernels.pb")
        compiled = lowered.compile(
            {
                "xla_dump_to": folder,
                # Where it is noted with which shared memory each kernel is started.
                "xla_gpu_kernel_cache_file": str(cache),
                **OPTIONS,
            }
        )
        shared = dict(_shared_bytes(cache.read_bytes()))
        kernels = {}
        for file in sorted(Path(folder).glob("*.ptx")):
            bodies = dict(
                re.findall(r"(?s)\.visible \.entry (ragged_\w+)\((.*?)(?=\.visible \.entry|\Z)", file.read_text())
            )
            taken = _assemble(file, CARDS[card].architecture) if bodies else {}
            for name, body in bodies.items():
                threads = re.search(r"\.reqntid (\d+)", body)
                assert threads is not None
                kernels[name] = Kernel(*taken[name], shared[name], int(threads[1]), Code(body))
    return compiled, kernels


def _assemble(file: Path, architecture: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes spilled) of each kernel, as ptxas says."""
    command = [str(ptxas()), "--verbose", f"--gpu-name={architecture}", "--output-file=/dev/null", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    pattern = r"(?s)entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {
        name: (int(registers), max(int(stored), int(loaded)))
        for name, stored, loaded, registers in re.findall(pattern, said.stderr)
    }


def _shared_bytes(content: bytes) -> Iterator[tuple[str, int]]:
    """(kernel, bytes) of XLA's ``CompilationCacheProto``: a map of names to entries, whose field 4 is that number."""
    for number, entry in _fields(content):
        if number == 1:  # others are not of kernels: a version, in later XLA
            pair = dict(_fields(entry))
            yield pair[1].decode(), dict(_fields(pair[2])).get(4, 0)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields; all of these are varints or byte strings."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        value: Any = varint()
        if key & 7 == 2:
            value, position = message[position : position + value], position + value
        yield key >> 3, value
