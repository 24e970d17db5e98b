"""The contract of a kernel, as one pytest class. Needs no EasyDeL."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, ClassVar

import numpy as np
import pytest

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.options import NO_OPTIONS
from easydel_ragged_plugin.request import FORMATS
from easydel_ragged_plugin.types import Kernel

from .batches import FAULTS, Batch, Case, Fault, Row, Version, spoil_row
from .compare import assert_close, assert_lse_close, slot_bytes
from .contract_base import LAW_CASE, ContractBase
from .contract_laws import LawTests
from .kernel_driver import KernelDriver, KernelOutcome

__all__ = ["KernelContract"]


@functools.lru_cache(maxsize=2)
def _driver_for(contract: Any, version: Version) -> KernelDriver:
    """The drivers of one class at a time: pytest runs class by class, and outcomes hold whole caches."""
    driver: KernelDriver = contract.driver_class(contract.kernel, version, contract.config, contract.compiler_options)
    return driver


class KernelBase(ContractBase):
    """A kernel is under test."""

    kernel: ClassVar[Kernel]
    config: ClassVar[RaggedPageConfig] = RaggedPageConfig()
    versions: ClassVar[tuple[Version, ...]] = ("v2", "v3")
    driver_class: ClassVar[type[KernelDriver]] = KernelDriver
    compiler_options: ClassVar[dict[str, Any] | None] = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize tests with the class's own cases and versions."""
        super().pytest_generate_tests(metafunc)
        if "driver" in metafunc.fixturenames:
            metafunc.parametrize("driver", self.versions, indirect=True)

    @pytest.fixture
    def driver(self, request: pytest.FixtureRequest) -> KernelDriver:
        """Calls the kernel. Tests of one class share it, with its programs and outcomes."""
        if not isinstance(getattr(self, "kernel", None), Kernel):
            raise NotImplementedError(
                f"{type(self).__name__} must set `kernel` to an object of a class derived from "
                "easydel_ragged_plugin.types.Kernel"
            )
        contract: Any = type(self)
        return _driver_for(contract, request.param)

    def _missing(self, driver: KernelDriver, case: Case) -> str | None:
        missing = driver.missing(case)
        return None if missing is None else f"{self.kernel.name}: {missing}"

    def _run_with_lse(self, driver: KernelDriver, case: Case) -> tuple[Batch, np.ndarray, np.ndarray, KernelOutcome]:
        """As ``_run``, with the logsumexp asked for and expected in place of the pages."""
        if "lse" not in self.kernel.features.results:
            pytest.skip(f"{self.kernel.name}: gives no logsumexp (return_lse)")
        batch = self._build(driver, case)
        outcome = driver.call(batch, return_lse=True)
        return batch, driver.expected(batch, outcome)[0], driver.expected_lse(batch, outcome), outcome


class KernelTests(KernelBase):
    """Tests of the contract that look at one call, or at none."""

    def test_values(self, driver: KernelDriver, case: Case) -> None:
        """Live tokens hold what the oracle computes, in the queries' dtype."""
        batch, expected, _, outcome = self._run(driver, case)
        assert outcome.output.dtype == batch.queries.dtype
        assert_close(outcome.output[batch.live_tokens], expected[batch.live_tokens], case)

    def test_padding_tokens_are_zero(self, driver: KernelDriver, case: Case) -> None:
        """Tokens of no live row hold exact zeros."""
        batch, _, _, outcome = self._run(driver, case)
        padding = outcome.output[~batch.live_tokens].astype(np.float32)
        assert not padding.any(), f"padding tokens: got values up to {np.abs(padding).max()}, wanted zeros"

    def test_pages(self, driver: KernelDriver, case: Case) -> None:
        """v3: new tokens are in their slots, in the cache's dtype. Every other slot keeps its bits; for v2 all do."""
        batch, _, pages, outcome = self._run(driver, case)
        wrong = (slot_bytes(outcome.pages) != slot_bytes(pages)).any(axis=-1)
        lost = np.argwhere(wrong & batch.written_slots)[:8].tolist()
        assert not lost, f"wrong bytes in written (page, slot): {lost}"
        assert not wrong.any(), f"changed (page, slot): {np.argwhere(wrong)[:8].tolist()}"

    def test_logsumexp(self, driver: KernelDriver, case: Case) -> None:
        """With the logsumexp asked for it is the oracle's, -inf for tokens of no live row, and the output is right."""
        batch, expected, expected_lse, outcome = self._run_with_lse(driver, case)
        assert_close(outcome.output, expected, case)
        assert outcome.lse is not None, "return_lse: got no logsumexp"
        assert outcome.lse.dtype == np.float32
        assert outcome.lse.shape == batch.queries.shape[:2]
        assert_lse_close(outcome.lse, expected_lse, case)

    def test_no_logsumexp_unless_requested(self, driver: KernelDriver) -> None:
        """It costs time and memory."""
        assert self._run(driver, LAW_CASE)[3].lse is None

    @pytest.mark.parametrize("fault", list(FAULTS))
    @pytest.mark.parametrize("window", [None, 3])
    def test_invalid_row(self, driver: KernelDriver, fault: Fault, window: int | None) -> None:
        """A row that makes no sense gives zeros, writes nothing, and leaves its neighbors alone."""
        case = LAW_CASE.with_options(sliding_window=window)
        self._require(driver, case)
        batch = spoil_row(self._build(driver, case), fault)
        outcome = self._call(driver, batch)
        expected, pages = driver.expected(batch, outcome)
        assert_close(outcome.output, expected, case)
        assert not outcome.output[~batch.live_tokens].any()
        assert (slot_bytes(outcome.pages) == slot_bytes(pages)).all()

    def test_context_in_two_parts_merges_to_the_whole(self, driver: KernelDriver) -> None:
        """Attention over each part of a context, merged by the logsumexp, is attention over all of it."""
        case = dataclasses.replace(LAW_CASE, rows=(Row(30, 1), Row(17, 1), Row(25, 1)), name="two-parts")
        if driver.version == "v3":
            pytest.skip("v3 writes the new token to the end of each part: v2 has this test")
        _, whole, whole_lse, _ = self._run_with_lse(driver, case)
        batch, cut = self._build(driver, case), 2 * case.page_size
        first = dataclasses.replace(batch, context_lens=np.minimum(batch.context_lens, cut))
        tables = np.concatenate([batch.block_tables[:, 2:], np.zeros_like(batch.block_tables[:, :2])], axis=1)
        lens = np.where(np.arange(len(batch.context_lens)) < len(case.rows), batch.context_lens - cut, 0)
        second = dataclasses.replace(batch, context_lens=lens.astype(np.int32), block_tables=tables)
        parts = [driver.call(part, return_lse=True) for part in (first, second)]
        live = batch.live_tokens
        lse = np.stack([part.lse[live].astype(np.float64) for part in parts if part.lse is not None])
        merged_lse = np.logaddexp(*lse)
        weights = np.exp(lse - merged_lse)[..., None]
        merged = weights[0] * parts[0].output[live] + weights[1] * parts[1].output[live]
        assert_close(merged, whole[live], case)
        assert_lse_close(merged_lse, whole_lse[live], case)

    def test_description(self) -> None:
        """What selection, doctor, fingerprints and figures read of it."""
        kernel = self.kernel
        known = {each.name for each in dataclasses.fields(NO_OPTIONS)}
        assert kernel.features.options <= known, f"unknown options: {sorted(kernel.features.options - known)}"
        assert kernel.features.cache_formats <= {each.name for each in FORMATS}
        assert kernel.features.results <= {"lse"}
        assert kernel.name
        assert kernel.platforms
        facts = kernel.facts()
        assert isinstance(facts["available"], bool)
        assert (facts["reason"] is None) == facts["available"]
        json.dumps(facts)
        assert kernel.fingerprint()
        assert all(isinstance(note, str) for note in kernel.notes("cpu"))
        assert kernel.config_type is None or dataclasses.is_dataclass(kernel.config_type)
        assert hash(kernel) == hash(kernel)


class KernelContract(LawTests, KernelTests):
    """Inherit this class, name the kernel, and pytest holds it to the oracle::

        from easydel_ragged_plugin.testing import KernelContract

        class TestMyKernel(KernelContract):
            kernel = MyKernel()             # an object of a class derived from easydel_ragged_plugin.types.Kernel
            known_failures = {"test_values[sinks-v3]": "https://example.org/issues/7"}

    The kernel runs alone, on hostile batches (see ``batches``), for v2 and for v3. Output, logsumexp and cache are
    compared with the float64 oracle (``reference``). What ``features`` does not declare, and what ``refuses`` refuses,
    is skipped with the reason. Narrow it with:

    ``known_failures``
        test name (``test_values[sinks-v3]``, or ``test_values`` for all of them, or a case's name for all tests of
        that case) to a reason. A strict xfail: the test must fail, and says so once it passes.
    ``cases``, ``versions``
        what to run: :data:`~easydel_ragged_plugin.testing.cases.CASES` and both versions unless set.
    ``config``
        the :class:`~easydel_ragged_plugin.config.RaggedPageConfig` that the kernel is given.
    ``driver_class``
        a subclass of :class:`~easydel_ragged_plugin.testing.kernel_driver.KernelDriver`, for caches of other formats.
    ``compiler_options``
        of ``jax.jit``, for kernels in an interpreter.

    Needs pytest and hypothesis.
    """
