"""The contract kit on this package's operations when they run the GPU kernel, in Pallas' interpreter.

The kernel's numbers on every case, and the laws that they obey, are in test_pallas_gpu.py. Here are the host's cache
views, metadata and pages, with a few cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from easydel_ragged_plugin import hookimpl, hooks, select
from easydel_ragged_plugin.config import KERNEL_VARIABLE
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU
from easydel_ragged_plugin.testing import Capabilities, case_named
from easydel_ragged_plugin.testing.capabilities import PASSED_OPTIONS
from easydel_ragged_plugin.testing.contract_calls import CallTests

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("quick_to_compile")]

CASES = tuple(map(case_named, ("mixed", "empty-rows", "window-freed-stale", "sinks", "float8-e4m3", "nothing-live")))
_OURS = Capabilities(
    options=PASSED_OPTIONS | {"q_scale", "k_scale", "v_scale", "attention_chunk_size", "update_pages"},
    forward_methods=("native", "gpu", "cuda", "rocm"),
)

INTERPRETED = PallasGPU(interpret=True)


@pytest.fixture(autouse=True)
def on_the_gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Selection takes the kernel, interpreted, and no other: the names that it chose while a call was traced."""
    chosen: list[str] = []

    class Watch:
        @hookimpl
        def ragged_selected(self, selection: select.Selection) -> None:
            chosen.append(selection.kernel)

    monkeypatch.setitem(select.BUILT_IN, INTERPRETED.name, INTERPRETED)
    monkeypatch.setenv(KERNEL_VARIABLE, INTERPRETED.name)
    hooks.register(Watch(), "watch")
    yield chosen
    hooks.unregister("watch")
    assert set(chosen) <= {INTERPRETED.name}


class OperationOnTheGpuKernel(CallTests):
    capabilities: ClassVar = _OURS
    cases: ClassVar = CASES

    def test_calls_select_the_kernel(self, driver: Any, on_the_gpu_kernel: list[str]) -> None:
        # Of a shape that no other test has, so that it is traced here.
        case = dataclasses.replace(CASES[0], name="selected", num_tokens=CASES[0].num_tokens + 3)
        self._call(driver, self._build(driver, case))
        assert set(on_the_gpu_kernel) == {INTERPRETED.name}


class TestGpuKernelV2(OperationOnTheGpuKernel):
    @pytest.fixture
    def operation(self) -> type:
        from easydel_ragged_plugin.operations import RaggedPageAttnV2

        return RaggedPageAttnV2


class TestGpuKernelV3(OperationOnTheGpuKernel):
    @pytest.fixture
    def operation(self) -> type:
        from easydel_ragged_plugin.operations import RaggedPageAttnV3

        return RaggedPageAttnV3
