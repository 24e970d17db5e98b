"""Tests of one call: values, pages, and what the host requires of an operation."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from easydel_ragged_plugin import host

from .batches import FAULTS, Batch, Case, Fault, Version, spoil_row
from .capabilities import Capabilities
from .cases import case_named
from .compare import assert_close, assert_same_pages, slot_bytes
from .contract_base import ContractBase
from .driver import Driver, Outcome

__all__ = ["CallTests", "OperationBase"]


@functools.lru_cache(maxsize=1)
def _driver_for(operation: type[Any], contract: str, version: Version | None) -> Driver:
    """One driver at a time: pytest runs class by class, and outcomes hold whole caches."""
    return Driver(operation, version=version)


class OperationBase(ContractBase):
    """An operation of the host is under test."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    @pytest.fixture
    def operation(self) -> type:
        """The operation class under test; the same class each time."""
        raise NotImplementedError(
            f"{type(self).__name__} must define the fixture `operation`, returning an operation class"
        )

    @pytest.fixture
    def driver(self, operation: type) -> Driver:
        """Calls the operation as the host does. Tests of one class share it, with its programs and outcomes."""
        contract = f"{type(self).__module__}.{type(self).__qualname__}"
        return _driver_for(operation, contract, self.capabilities.version)

    @property
    def any_row_order(self) -> bool:  # type: ignore[override]
        """Whether the operation declares that rows may come in any order."""
        return self.capabilities.any_row_order

    @property
    def poison(self) -> Literal["nan", "finite"]:  # type: ignore[override]
        """As the operation declares."""
        return "nan" if self.capabilities.nan_in_dead_slots else "finite"

    def _missing(self, driver: Driver, case: Case) -> str | None:
        missing = self.capabilities.lacks(case)
        return None if missing is None else f"the operation does not declare: {missing}"

    def _call(self, driver: Driver, batch: Batch, **how: Any) -> Outcome:
        if not self.capabilities.compute_dtype_none_keeps_precision:
            how.setdefault("compute_dtype", batch.case.np_dtype)
        return driver.call(batch, **how)


class CallTests(OperationBase):
    """Tests of the contract that look at one call."""

    # Values and pages, for each case.

    def test_values(self, driver: Driver, case: Case) -> None:
        """Live tokens hold what the oracle computes."""
        batch, expected, _, outcome = self._run(driver, case)
        assert_close(outcome.output[batch.live_tokens], expected[batch.live_tokens], case)

    def test_padding_tokens_are_zero(self, driver: Driver, case: Case) -> None:
        """Tokens of no live row hold exact zeros."""
        batch, _, _, outcome = self._run(driver, case)
        padding = outcome.output[~batch.live_tokens].astype(np.float32)
        assert not padding.any(), f"padding tokens: got values up to {np.abs(padding).max()}, wanted zeros"

    def test_new_tokens_are_stored(self, driver: Driver, case: Case) -> None:
        """v3: the slots of live new tokens hold their keys and values, in the cache's dtype."""
        if driver.version == "v2":
            pytest.skip("v2: the host writes the pages")
        batch, _, pages, outcome = self._run(driver, case)
        wrong = (slot_bytes(outcome.pages) != slot_bytes(pages)).any(axis=-1) & batch.written_slots
        assert not wrong.any(), f"wrong bytes in written (page, slot): {np.argwhere(wrong)[:8].tolist()}"

    def test_other_slots_keep_their_bytes(self, driver: Driver, case: Case) -> None:
        """No slot changes but those of live new tokens: dead rows, padding tokens, other pages, the null page."""
        batch, _, pages, outcome = self._run(driver, case)
        changed = (slot_bytes(outcome.pages) != slot_bytes(pages)).any(axis=-1)
        if driver.version == "v3":
            changed &= ~batch.written_slots
        assert not changed.any(), f"changed (page, slot): {np.argwhere(changed)[:8].tolist()}"

    # The host's contract.

    def test_result_has_the_shape_and_dtype_of_the_queries(self, driver: Driver) -> None:
        """(1, tokens, heads, head_dim), in the queries' dtype."""
        for name in ("mixed", "bfloat16"):
            case = case_named(name)
            if self.capabilities.lacks(case):
                continue
            batch, _, _, outcome = self._run(driver, case)
            assert outcome.output_shape == (1, *batch.queries.shape)
            assert outcome.output_dtype == case.np_dtype

    def test_compute_dtype_none_keeps_precision(self, driver: Driver) -> None:
        """The host passes ``compute_dtype=None``; float32 queries then give a float32 answer."""
        case = case_named("mixed")
        batch = self._build(driver, case)
        outcome = driver.call(batch, compute_dtype=None)
        assert_close(outcome.output, batch.expected()[0], case)

    def test_view_that_went_in_holds_the_pages(self, driver: Driver) -> None:
        """v3 puts the pages into the view that it was called with and returns that view; v2 returns it, or none."""
        _, _, pages, outcome = self._run(driver, case_named("mixed"))
        assert_same_pages(outcome.pages, pages)
        assert outcome.returned_view in (("same",) if driver.version == "v3" else ("same", "none"))

    def test_view_is_not_returned_where_the_host_would_cast_it(self, driver: Driver) -> None:
        """0.2.0.2 casts every array of the output to the model's dtype: other pages must not be in it."""
        if driver.host.version != "0.2.0.2":
            pytest.skip("this host leaves the returned view alone")
        case = case_named("float32-on-bfloat16-cache")
        if self.capabilities.lacks(case):
            pytest.skip(f"the operation does not declare: {self.capabilities.lacks(case)}")
        batch = self._build(driver, case)
        outcome = self._call(driver, batch)
        assert outcome.returned_view == "none"
        assert_same_pages(outcome.pages, batch.expected()[1])

    def test_forwarding_view(self, driver: Driver) -> None:
        """A view of another class that forwards ``kv_pages`` and ``metadata`` gives the same results as the host's."""
        if not self.capabilities.forwarding_view:
            pytest.skip("the operation does not declare: forwarding_view")
        batch = self._build(driver, self.law_case)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, forwarding_view=True)
        assert_close(outcome.output, expected, batch.case)
        assert_same_pages(outcome.pages, pages)

    @pytest.mark.parametrize("name", ["mixed", "empty-rows", "full-batch"])
    def test_pages_written_by_the_host(self, driver: Driver, name: str) -> None:
        """v2: the host's view writes the new tokens, then the operation reads them. v3: that write does nothing."""
        case = case_named(name)
        batch = self._build(driver, case)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, host_writes=True)
        assert_close(outcome.output, expected, case)
        assert_same_pages(outcome.pages, pages)

    @pytest.mark.parametrize("method", ["native", "cpu", "gpu", "cuda", "rocm", "tpu"])
    def test_forward_methods_agree(self, driver: Driver, method: str) -> None:
        """Each ``forward_*`` method exists, takes three-dimensional arrays, and gives the same answer."""
        function = getattr(driver.operation, f"forward_{method}", None)
        assert callable(function), f"forward_{method} is missing"
        if method not in self.capabilities.forward_methods:
            pytest.skip(f"the operation does not declare: forward_{method} on this machine")
        batch = self._build(driver, self.law_case)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, method=f"forward_{method}")
        assert outcome.output_shape == batch.queries.shape
        assert_close(outcome.output, expected, batch.case)
        assert_same_pages(outcome.pages, pages)

    def test_unknown_argument_is_refused(self, driver: Driver) -> None:
        """An unknown keyword is an error that names it."""
        if not self.capabilities.strict_arguments:
            pytest.skip("the operation does not declare: strict_arguments")
        with pytest.raises((TypeError, ValueError), match="no_such_option"):
            self._call(driver, self._build(driver, self.law_case), extra={"no_such_option": 1})

    def test_requirements(self, driver: Driver) -> None:
        """The requirements name the metadata and the cache that the host must build."""
        host, requirements = driver.host, driver.operation.get_requirements()
        fields = host.MetadataField
        needed = fields.CONTEXT_LENS | fields.QUERY_START_LOC | fields.PAGES_TABLES
        needed |= fields.SLOT_MAPPING if driver.version == "v2" else fields.REQUEST_DISTRIBUTION
        assert requirements.metadata.required & needed == needed, f"required metadata lacks some of {needed}"
        assert requirements.cache.requires_cache
        assert requirements.cache.supported & host.CacheType.RAGGED_PAGES
        assert requirements.cache.cache_view_class is host.RaggedPagesCacheView

    def test_name_and_metadata(self, driver: Driver) -> None:
        """The host has an operation of this name, and the object returns the metadata that it was made with."""
        if self.capabilities.version is None:
            assert driver.name in host.OPERATION_NAMES, (
                f"get_impl_name: got {driver.name!r}, wanted one of {', '.join(host.OPERATION_NAMES)}. An operation of "
                "another name declares which of the two it is: Capabilities(version='v2') or 'v3'."
            )
        assert issubclass(driver.operation, driver.host.OperationImpl)
        operation = driver.instance()
        assert operation.get_impl_metadata() is operation.metadata

    def test_objects_are_hashable(self, driver: Driver) -> None:
        """The host keys compiled programs by the model's graph, in which the operation object is a static part."""
        operation = driver.instance()
        assert hash(operation) == hash(operation)
        assert operation == operation

    def test_host_creates_it_from_the_registry(self, driver: Driver) -> None:
        """What the host does with a registered class: look it up by name and make an object of it."""
        registry = host.registry()
        held = registry.get(driver.name)
        registry[driver.name] = driver.operation
        try:
            made = driver.host.OperationRegistry.create(driver.name, driver.instance().metadata)
            assert type(made) is driver.operation
        finally:
            if held is None:
                del registry[driver.name]
            else:
                registry[driver.name] = held

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("window", [None, 3])
    def test_invalid_row(self, driver: Driver, fault: Fault, window: int | None) -> None:
        """A malformed row gives zeros and writes nothing, and the other rows are right."""
        if not self.capabilities.invalid_rows:
            pytest.skip("the operation does not declare: invalid_rows")
        batch = spoil_row(self._build(driver, self.law_case.with_options(sliding_window=window)), fault)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch)
        assert_close(outcome.output, expected, batch.case)
        assert not outcome.output[~batch.live_tokens].any()
        assert_same_pages(outcome.pages, pages)
