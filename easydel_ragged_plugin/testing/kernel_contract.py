"""The contract of a kernel, as one pytest class. Needs no EasyDeL."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.request import FORMATS
from easydel_ragged_plugin.types import Kernel

from .batches import FAULTS, Batch, Case, Fault, Version, spoil_row
from .compare import assert_close, assert_lse_close, assert_same_pages, slot_bytes
from .contract_base import ContractBase
from .contract_laws import LawTests
from .kernel_driver import KernelDriver, KernelOutcome

__all__ = ["KernelContract"]


_SETTINGS = {
    "rank": functools.partial(jax.numpy_rank_promotion, "raise"),
    "dtype": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "x64": functools.partial(jax.enable_x64, True),
}
"""Settings of JAX under which a kernel must work."""


@contextlib.contextmanager
def _strict(*settings: str) -> Iterator[None]:
    """These settings, together."""
    with contextlib.ExitStack() as stack:
        for name in settings:
            stack.enter_context(_SETTINGS[name]())
        yield


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

    @pytest.fixture(autouse=True)
    def _named(self) -> None:
        kernel = getattr(self, "kernel", None)
        if not isinstance(kernel, Kernel):
            raise ValueError(
                f"{type(self).__name__}.kernel: got {kernel!r}, wanted an object of a class derived from "
                "easydel_ragged_plugin.types.Kernel."
            )

    @pytest.fixture
    def driver(self, request: pytest.FixtureRequest, _named: None) -> KernelDriver:
        """Calls the kernel. Tests of one class share it, with its programs and outcomes."""
        contract: Any = type(self)
        return _driver_for(contract, request.param)

    def _missing(self, driver: KernelDriver, case: Case) -> str | None:
        missing = driver.missing(case)
        if missing is None and not case.decode_first and not self.any_row_order:
            missing = "takes rows with one new token first (any_row_order)"
        return None if missing is None else f"{self.kernel.name}: {missing}"

    def _call_with_lse(self, driver: KernelDriver, batch: Batch) -> tuple[KernelOutcome, np.ndarray]:
        """Outcome and logsumexp of a call that requests it."""
        if "lse" not in self.kernel.features.results:
            pytest.skip(f"{self.kernel.name}: gives no logsumexp (return_lse)")
        outcome = self._call(driver, batch, return_lse=True)
        assert outcome.lse is not None, "return_lse: got no logsumexp"
        return outcome, outcome.lse

    def _check_results(self, driver: KernelDriver, case: Case) -> None:
        """All that one call gives, the logsumexp with it, is the oracle's."""
        batch = self._build(driver, case)
        outcome, lse = self._call_with_lse(driver, batch)
        expected, pages, expected_lse = driver.expected_with_lse(batch, outcome)
        assert_close(outcome.output, expected, case)
        assert_same_pages(outcome.pages, pages)
        assert lse.dtype == np.float32
        assert_lse_close(lse, expected_lse, case)


class KernelTraces(KernelBase):
    """The test of the contract that traces calls, and runs none."""

    def test_strict_settings(self, driver: KernelDriver) -> None:
        """JAX may be told to refuse what promotes ranks or dtypes, and to have 64 bits: every call traces in any case.

        The first case of each set of options and dtypes stands for all of them.
        """
        distinct: dict[Any, Case] = {}
        for case in self.cases:
            key = (frozenset(case.options.given()), case.sinks, case.dtype, case.cache_dtype)
            if key not in distinct and driver.version in case.versions and self._missing(driver, case) is None:
                distinct[key] = case
        return_lse = "lse" in self.kernel.features.results
        for case in distinct.values():
            batch = self._build(driver, case)
            try:
                with _strict("rank", "dtype", "x64"):
                    found = driver.types(batch, return_lse=return_lse)
            except Exception as error:
                error.add_note(f"In the case {case.name}.")
                raise
            assert (found.output.shape, found.output.dtype) == (batch.queries.shape, batch.queries.dtype), case.name
            assert not return_lse or (found.lse is not None and found.lse.dtype == np.float32), case.name


class KernelResults(KernelTraces):
    """One test for each case, and one program: in place of the contract where a program takes long to compile."""

    def test_results(self, driver: KernelDriver, case: Case) -> None:
        """Output, pages and logsumexp of a call are the oracle's."""
        self._check_results(driver, case)


class KernelTests(KernelTraces):
    """Tests of the contract that look at one call, or at none."""

    def test_values(self, driver: KernelDriver, case: Case) -> None:
        """Live tokens hold what the oracle computes, in the shape and dtype of the queries."""
        batch, expected, _, outcome = self._run(driver, case)
        assert outcome.output.shape == batch.queries.shape
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
        assert outcome.pages.shape == pages.shape
        assert outcome.pages.dtype == pages.dtype
        wrong = (slot_bytes(outcome.pages) != slot_bytes(pages)).any(axis=-1)
        lost = np.argwhere(wrong & batch.written_slots)[:8].tolist()
        assert not lost, f"wrong bytes in written (page, slot): {lost}"
        assert not wrong.any(), f"changed (page, slot): {np.argwhere(wrong)[:8].tolist()}"

    def test_logsumexp(self, driver: KernelDriver, case: Case) -> None:
        """The logsumexp, once requested, is the oracle's, -inf for tokens of no live row; output and pages are, too."""
        self._check_results(driver, case)

    def test_no_logsumexp_unless_requested(self, driver: KernelDriver) -> None:
        """It costs time and memory."""
        assert self._run(driver, self.law_case)[3].lse is None, "got a logsumexp that was not requested"

    @pytest.mark.parametrize("settings", [("rank", "dtype"), ("rank", "dtype", "x64")], ids="-".join)
    def test_strict_settings_change_no_number(self, driver: KernelDriver, settings: tuple[str, ...]) -> None:
        """With these settings the numbers are the oracle's, too."""
        batch = self._build(driver, self.law_case)
        with _strict(*settings):
            outcome = self._call(driver, batch)
        expected, pages = driver.expected(batch, outcome)
        assert_close(outcome.output, expected, batch.case)
        assert_same_pages(outcome.pages, pages)

    def test_inside_of_shard_map(self, driver: KernelDriver) -> None:
        """``jax.shard_map`` follows what varies over its mesh: operands that do give results that do, and the numbers.

        Every loop has to carry it, and every call into other code has to state it: see
        :mod:`easydel_ragged_plugin.varying`.
        """
        batch = self._build(driver, self.law_case)
        return_lse = "lse" in self.kernel.features.results
        outcome = self._call(driver, batch, in_shard_map=True, return_lse=return_lse)
        expected, pages = driver.expected(batch, outcome)
        assert_close(outcome.output, expected, batch.case)
        assert_same_pages(outcome.pages, pages)

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("window", [None, 3])
    def test_invalid_row(self, driver: KernelDriver, fault: Fault, window: int | None) -> None:
        """A row that makes no sense gives zeros, writes nothing, and leaves its neighbors alone."""
        batch = spoil_row(self._build(driver, self.law_case.with_options(sliding_window=window)), fault)
        outcome = self._call(driver, batch)
        expected, pages = driver.expected(batch, outcome)
        assert_close(outcome.output, expected, batch.case)
        assert not outcome.output[~batch.live_tokens].any(), "an invalid row's tokens are not zeros"
        assert_same_pages(outcome.pages, pages)

    @pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
    @pytest.mark.parametrize("what", ["keys", "values"])
    @pytest.mark.parametrize("window", [None, 3])
    def test_what_is_not_finite_reaches_only_queries_that_see_it(
        self, driver: KernelDriver, number: float, what: str, window: int | None
    ) -> None:
        """A weight of 0 times an infinite value is NaN: no sum may run over keys that a query does not see."""
        batch = self._build(driver, self._rows((30, 1), (20, 6), (25, 9)).with_options(sliding_window=window))
        if np.issubdtype(batch.pages.dtype, np.integer):
            pytest.skip("a cache of integers holds finite numbers alone")
        array = getattr(batch, what).copy()
        array[3, 0, 1] = number  # the third of six new tokens
        batch = dataclasses.replace(batch, **{what: array})
        if driver.version == "v2":
            batch = dataclasses.replace(batch, updated_pages=driver.with_new_tokens(batch, batch.pages))
        outcome = self._call(driver, batch)
        expected, _ = driver.expected(batch, outcome)
        finite = np.isfinite(expected)
        assert finite[:3].all(), "the test itself: queries before the token see it"
        wrong = np.unique(np.argwhere(np.isfinite(outcome.output.astype(np.float64)) != finite)[:, 0])
        assert not wrong.size, f"finite where it must not be, or the other way around, in tokens {wrong.tolist()}"
        assert_close(np.where(finite, outcome.output, 0), np.where(finite, expected, 0), batch.case)

    def test_context_in_two_parts_merges_to_the_whole(self, driver: KernelDriver) -> None:
        """Attention over each part of a context, merged by the logsumexp, is attention over all of it."""
        if driver.version == "v3":
            pytest.skip("v3 writes the new token to the end of each part: v2 has this test")
        batch = self._build(driver, self._rows((30, 1), (17, 1), (25, 1)))
        cut, live = 2 * batch.case.page_size, batch.live_tokens
        first = dataclasses.replace(batch, context_lens=np.minimum(batch.context_lens, cut))
        rest = np.maximum(batch.context_lens - cut, 0)
        second = dataclasses.replace(batch, context_lens=rest, block_tables=np.roll(batch.block_tables, -2, axis=1))
        (whole, whole_lse), *parts = (self._call_with_lse(driver, each) for each in (batch, first, second))
        lse = np.stack([each[live].astype(np.float64) for _, each in parts])
        merged_lse = np.logaddexp(*lse)
        weights = np.exp(lse - merged_lse)[..., None]
        outputs = np.stack([outcome.output[live].astype(np.float64) for outcome, _ in parts])
        assert_close((weights * outputs).sum(axis=0), whole.output[live].astype(np.float64), batch.case)
        assert_lse_close(merged_lse, whole_lse[live].astype(np.float64), batch.case)

    def test_description(self) -> None:
        """What selection, doctor, fingerprints and figures read of it."""
        kernel = self.kernel
        known = {each.name for each in dataclasses.fields(Options)}
        formats = {each.name for each in FORMATS}
        for what, declared, names in (
            ("options", kernel.features.options, known),
            ("cache_formats", kernel.features.cache_formats, formats),
            ("results", kernel.features.results, {"lse"}),
        ):
            unknown = sorted(declared - names)
            assert not unknown, f"features.{what}: got {', '.join(unknown)}, wanted some of {', '.join(sorted(names))}"
        assert kernel.name, "name: got none"
        assert kernel.platforms, "platforms: got none, so it never runs"
        facts = kernel.facts()
        assert isinstance(facts["available"], bool)
        assert (facts["reason"] is None) == facts["available"]
        json.dumps(facts)
        assert kernel.fingerprint()
        for platform in kernel.platforms:
            assert all(isinstance(note, str) for note in kernel.notes(platform))
        assert kernel.config_type is None or dataclasses.is_dataclass(kernel.config_type)
        assert hash(kernel) == hash(kernel)


class KernelContract(LawTests, KernelTests):
    """Inherit this class, name the kernel, and pytest holds it to the oracle::

        from easydel_ragged_plugin.testing import KernelContract

        class TestMyKernel(KernelContract):
            kernel = MyKernel()             # an object of a class derived from easydel_ragged_plugin.types.Kernel
            known_failures = {"test_values[sinks-v3]": "https://example.org/issues/7"}

    The kernel runs alone, on hostile batches (see ``batches``), for v2 and for v3. Output, logsumexp and cache are
    compared with the float64 oracle (``reference``). What selection would not give the kernel (``platforms``,
    ``features``, ``refuses``) is skipped with the reason. Narrow it with:

    ``known_failures``
        test name (``test_values[sinks-v3]``, or ``test_values`` for all of them, or a case's name for all tests of
        that case) to a reason. A strict xfail: the test must fail, and says so once it passes.
    ``cases``, ``versions``
        what to run: :data:`~easydel_ragged_plugin.testing.cases.CASES` and both versions unless set.
    ``law_case``
        geometry and dtypes of the tests that bring their own rows. Where the kernel does not take float32 with a
        ``head_dim`` of 32, replace them: ``dataclasses.replace(case_named("mixed"), dtype="bfloat16", head_dim=128)``.
    ``any_row_order``
        False where rows with one new token must come first.
    ``poison``
        ``"finite"`` where slots that no query sees must not hold NaN: they get large numbers.
    ``config``
        the :class:`~easydel_ragged_plugin.config.RaggedPageConfig` that the kernel is given.
    ``driver_class``
        a subclass of :class:`~easydel_ragged_plugin.testing.kernel_driver.KernelDriver`, for caches of other formats.
    ``compiler_options``
        of ``jax.jit``, for kernels in an interpreter.

    Needs pytest and hypothesis.
    """
