"""The TPU kernel's numbers without a TPU, in Pallas' TPU interpret mode: its contract."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any, ClassVar

import numpy as np
import pytest
from gpu_requests import request_for
from jax.experimental.pallas import tpu as pltpu
from jax_private import races_found, teach_interpreter_reshaped_refs
from kernel_calls import QUICK_TO_COMPILE, WRONG_STARTS, overlapping_rows

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import pallas_tpu
from easydel_ragged_plugin.kernels.pallas_tpu import PallasTPU
from easydel_ragged_plugin.kernels.pallas_tpu.blocks import Block, Blocks, choose
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, Batch, Case, Row, build_batch, case_named, one_of_each
from easydel_ragged_plugin.testing.compare import assert_close, assert_lse_close, assert_same_pages
from easydel_ragged_plugin.testing.kernel_contract import KernelResults
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver

teach_interpreter_reshaped_refs()

INTERPRETED: Any = PallasTPU(interpret=True)


FEW = tuple(case_named(name) for name in ("mixed", "all-options", "bfloat16-head-dim-64", "float8-e4m3"))


class TestPallasTPU(KernelContract):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v3",)
    cases: ClassVar = FEW


class TestPallasTPUV2(KernelResults):
    """Of v2's pages the kernel reads those whose heads fill registers."""

    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v2",)
    cases: ClassVar = tuple(dataclasses.replace(case, head_dim=128) for case in FEW)


class TestPallasTPUInBrief(KernelResults):
    """For other versions of JAX; in one version the two classes above have it."""

    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    cases: ClassVar = tuple(dataclasses.replace(case, head_dim=128) for case in FEW[:2])


@pytest.mark.long
class TestPallasTPUInEveryCase(KernelResults):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v3",)
    cases: ClassVar = tuple(case for case in CASES if case not in FEW)


@pytest.mark.long
class TestPallasTPUV2InEveryCase(KernelContract):
    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v2",)
    cases: ClassVar = tuple(
        dataclasses.replace(case, head_dim=128) for case in one_of_each(CASES) if "v2" in case.versions
    )
    law_case: ClassVar = dataclasses.replace(case_named("mixed"), head_dim=128)


@pytest.mark.parametrize("number", [np.inf, np.nan])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_what_is_not_finite_stays_in_its_kv_head(case: str, what: str, number: float) -> None:
    """Decode multiplies the queries of two kv heads by the keys of both."""
    driver = KernelDriver(INTERPRETED, "v3", compiler_options=QUICK_TO_COMPILE)
    batch = build_batch(case_named(case), "v3")
    array = getattr(batch, what).copy()
    array[0, 1, 3] = number  # of a row with one new token
    batch = dataclasses.replace(batch, **{what: array})
    outcome = driver.call(batch)
    expected, _ = driver.expected(batch, outcome)
    np.testing.assert_array_equal(np.isfinite(outcome.output), np.isfinite(expected))
    assert np.isfinite(expected[0]).any()
    finite = np.isfinite(expected)
    assert_close(np.where(finite, outcome.output, 0), np.where(finite, expected, 0), batch.case)


SMALL = Blocks(Block(1, 128, 2), Block(4, 128, 2))
LONG = Case(
    "long-rows",
    (Row(700, 1), Row(3, 1), Row(400, 30), Row(260, 9), Row(550, 1), Row(129, 129)),
    page_size=16,
    pages_per_row=48,
    num_tokens=180,
    num_pages=None,
    sinks="heads",
    decode_first=False,
    table="garbage",
)


def check(batch: Batch, kernel: PallasTPU, blocks: Blocks | None = None) -> None:
    """The kernel's output, logsumexp and pages are the oracle's."""
    driver = KernelDriver(kernel, batch.version, RaggedPageConfig(kernel_config=blocks), QUICK_TO_COMPILE)
    outcome = driver.call(batch, return_lse=True)
    expected, pages, lse = driver.expected_with_lse(batch, outcome)
    assert_close(outcome.output, expected, batch.case)
    assert_same_pages(outcome.pages, pages)
    assert outcome.lse is not None
    assert_lse_close(outcome.lse, lse, batch.case)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_copies_may_run_early_or_late_and_nothing_races(mode: Any) -> None:
    parameters = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True)
    check(build_batch(dataclasses.replace(LONG, name=f"long-{mode}"), "v3"), PallasTPU(interpret=parameters), SMALL)
    assert not races_found()


@pytest.mark.parametrize(
    ("buffers", "tokens", "window"),
    [
        pytest.param(*each, marks=[] if each in {(2, 7, 100), (4, 1, None)} else [pytest.mark.long])
        for each in itertools.product((2, 3, 4), (1, 7, 64), (None, 100))
    ],
)
def test_blocks_do_not_change_results(buffers: int, tokens: int, window: int | None) -> None:
    blocks = Blocks(Block(1, 128 * (buffers - 1), buffers), Block(tokens, 256, buffers))
    check(build_batch(LONG.with_options(sliding_window=window), "v3"), INTERPRETED, blocks)


@pytest.mark.parametrize(("wrong", "start"), WRONG_STARTS)
def test_good_rows_keep_tokens_that_a_wrong_start_gives_to_others(wrong: int, start: int) -> None:
    batch, claimed_once = overlapping_rows(wrong, start)
    driver = KernelDriver(INTERPRETED, "v3", RaggedPageConfig(kernel_config=SMALL), QUICK_TO_COMPILE)
    outcome = driver.call(batch)
    expected, pages = driver.expected(batch, outcome)
    assert_same_pages(outcome.pages, pages)
    np.testing.assert_allclose(outcome.output[claimed_once], expected[claimed_once], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"head_dim": 320}, "head_dim 320, more than 256"),
        ({"page_size": 7}, None),
        ({"page_size": 129}, "pages of 129 tokens: blocks of 258, no multiple of 32"),
        ({"page_size": 2**14, "pages_per_row": 1}, r"blocks of 16384 tokens take [\d.]+ MiB of VMEM, more than the 12"),
        ({"options": Options(vmem_limit_bytes=2**16)}, "more than the 0.1 MiB of this TPU or of vmem_limit_bytes"),
        ({"version": "v2"}, "v2 with head_dim 32, no multiple of 128"),
        ({"version": "v2", "head_dim": 128, "kv_heads": 3, "q_heads": 3}, "v2 with 3 kv heads in float32"),
        ({"dtype": "float16"}, "cache: float16; takes float32"),
    ],
)
def test_what_it_refuses(case: dict[str, Any], reason: str | None) -> None:
    version = case.get("version", "v3")
    case = {name: value for name, value in case.items() if name != "version"}
    found = KernelDriver(INTERPRETED, version).missing(Case("refused", (Row(2, 1),), num_pages=None, **case))
    assert found is None if reason is None else re.search(reason, found or "")


def test_fields_of_the_config_set_blocks() -> None:
    request = request_for(platform="tpu", page_size=16)
    default = choose(request, RaggedPageConfig())
    assert choose(request, RaggedPageConfig(num_kv_pages_per_block=16)) == Blocks(
        dataclasses.replace(default.decode, keys=256), dataclasses.replace(default.prefill, keys=256)
    )
    assert choose(request, RaggedPageConfig(num_queries_per_block=3)) == Blocks(
        default.decode, dataclasses.replace(default.prefill, tokens=3)
    )
    with_both = choose(request, RaggedPageConfig(kernel_config=SMALL, num_queries_per_block=3))
    assert with_both == Blocks(SMALL.decode, dataclasses.replace(SMALL.prefill, tokens=3))


@pytest.mark.parametrize(
    "config",
    [
        RaggedPageConfig(num_kv_pages_per_block=2**12),
        RaggedPageConfig(kernel_config=Blocks(Block(1, 2**16, 2), Block(4, 128, 2))),
    ],
)
def test_blocks_of_the_config_that_do_not_fit_are_refused(config: RaggedPageConfig) -> None:
    with pytest.raises(
        Unsupported, match=r"pallas_tpu: blocks of \d+ tokens take .* Make the blocks of the config smaller"
    ):
        choose(request_for(platform="tpu"), config)


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="got decode tiles of 2 tokens, wanted 1"):
        Blocks(Block(2, 128, 2), Block(4, 128, 2))
    with pytest.raises(ValueError, match="at least 2 buffers"):
        Block(1, 128, 1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("absl", r"absl-py is not installed, which Pallas for TPUs of JAX [\d.]+ imports \(pip install absl-py\)"),
        ("jax.experimental.pallas.tpu", r"JAX [\d.]+ has no Pallas for TPUs: No module named 'jax.experimental"),
    ],
)
def test_modules_that_are_not_there_are_named(module: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(pallas_tpu, "import_module", missing)
    assert re.match(reason, KernelDriver(INTERPRETED, "v3").missing(case_named("mixed")) or "")
