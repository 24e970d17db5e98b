"""What one call must give: values, pages, and what the host expects of an operation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from easydel_ragged_plugin import host

from .batches import FAULTS, Case, Fault, spoil_row
from .cases import case_named
from .compare import assert_close, slot_bytes
from .contract_base import LAW_CASE, ContractBase
from .driver import Driver

__all__ = ["CallTests"]


class CallTests(ContractBase):
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
        """No slot changes that is not a live new token's: dead rows, padding tokens, other pages, the null page."""
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
        """v3 puts the pages into the view it was given and returns that view; v2 returns it, or none."""
        _, _, pages, outcome = self._run(driver, case_named("mixed"))
        assert (slot_bytes(outcome.pages) == slot_bytes(pages)).all()
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
        assert (slot_bytes(outcome.pages) == slot_bytes(batch.expected()[1])).all()

    def test_forwarding_view(self, driver: Driver) -> None:
        """A view of another class that forwards ``kv_pages`` and ``metadata`` is served like the host's own."""
        if not self.capabilities.forwarding_view:
            pytest.skip("the operation does not declare: forwarding_view")
        batch = self._build(driver, LAW_CASE)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, forwarding_view=True)
        assert_close(outcome.output, expected, LAW_CASE)
        assert (slot_bytes(outcome.pages) == slot_bytes(pages)).all()

    @pytest.mark.parametrize("name", ["mixed", "empty-rows", "full-batch"])
    def test_pages_written_by_the_host(self, driver: Driver, name: str) -> None:
        """v2: the host's view writes the new tokens, then the operation reads them. v3: that write does nothing."""
        case = case_named(name)
        batch = self._build(driver, case)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, host_writes=True)
        assert_close(outcome.output, expected, case)
        assert (slot_bytes(outcome.pages) == slot_bytes(pages)).all()

    @pytest.mark.parametrize("method", ["native", "cpu", "gpu", "cuda", "rocm", "tpu"])
    def test_forward_methods_agree(self, driver: Driver, method: str) -> None:
        """Each ``forward_*`` method exists, takes three-dimensional arrays, and gives the same answer."""
        function = getattr(driver.operation, f"forward_{method}", None)
        assert callable(function), f"forward_{method} is missing"
        if method not in self.capabilities.forward_methods:
            pytest.skip(f"the operation does not declare: forward_{method} on this machine")
        batch = self._build(driver, LAW_CASE)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, method=f"forward_{method}")
        assert outcome.output_shape == batch.queries.shape
        assert_close(outcome.output, expected, LAW_CASE)
        assert (slot_bytes(outcome.pages) == slot_bytes(pages)).all()

    def test_unknown_argument_is_refused(self, driver: Driver) -> None:
        """A keyword that nobody knows is an error that names it, not something to drop."""
        if not self.capabilities.strict_arguments:
            pytest.skip("the operation does not declare: strict_arguments")
        with pytest.raises((TypeError, ValueError), match="no_such_option"):
            self._call(driver, self._build(driver, LAW_CASE), extra={"no_such_option": 1})

    def test_requirements(self, driver: Driver) -> None:
        """The host reads from the requirements which metadata to make and which cache to build."""
        host, requirements = driver.host, driver.operation.get_requirements()
        fields = host.MetadataField
        needed = fields.CONTEXT_LENS | fields.QUERY_START_LOC | fields.PAGES_TABLES
        needed |= fields.SLOT_MAPPING if driver.version == "v2" else fields.REQUEST_DISTRIBUTION
        assert requirements.metadata.required & needed == needed, f"required metadata lacks some of {needed}"
        assert requirements.cache.requires_cache
        assert requirements.cache.supported & host.CacheType.RAGGED_PAGES
        assert requirements.cache.cache_view_class is host.RaggedPagesCacheView

    def test_name_and_metadata(self, driver: Driver) -> None:
        """The name is one that the host knows, and the object gives back the metadata it was made with."""
        assert driver.name in ("ragged_page_attention_v2", "ragged_page_attention_v3")
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

    @pytest.mark.parametrize(
        "fault",
        list(FAULTS),
    )
    @pytest.mark.parametrize("window", [None, 3])
    def test_invalid_row(self, driver: Driver, fault: Fault, window: int | None) -> None:
        """A row that makes no sense gives zeros, writes nothing, and leaves its neighbours alone."""
        if not self.capabilities.invalid_rows:
            pytest.skip("the operation does not declare: invalid_rows")
        if window is not None and not self.capabilities.sliding_window:
            pytest.skip("the operation does not declare: sliding_window")
        case = dataclasses.replace(LAW_CASE, sliding_window=window)
        batch = spoil_row(self._build(driver, case), fault)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch)
        assert_close(outcome.output, expected, case)
        assert not outcome.output[~batch.live_tokens].any()
        assert (slot_bytes(outcome.pages) == slot_bytes(pages)).all()
