"""The laws of ragged page attention: how the answers of two related calls hang together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from .batches import Batch
from .compare import assert_close, assert_same_pages
from .contract_base import ContractBase

__all__ = ["LawTests"]

# Laws run on one geometry, so that all examples share a compiled program. The settings make them repeatable, and
# let several classes inherit one test, which hypothesis otherwise takes for an accident.
_LAW = hypothesis.settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    # Not "explain": hundreds of calls more for each failure, to say which argument could be another. Here all could.
    phases=[phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain],
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.differing_executors],
)
_SEEDS = strategies.integers(0, 2**20)
_LONGEST = 32  # tokens of a context: what one row of every law_case has room for


@strategies.composite
def _row_pairs(draw: Callable[..., Any]) -> list[tuple[int, int]]:
    """(context, new tokens) of up to five rows, decodes first, that fit the laws' geometry."""
    pairs = []
    for _ in range(draw(strategies.integers(1, 5))):
        new = draw(strategies.integers(1, 6))
        pairs.append((draw(strategies.integers(new, _LONGEST)), new))
    return sorted(pairs, key=lambda pair: pair[1] != 1)


class LawTests(ContractBase):
    """Tests of the contract that compare calls with each other."""

    @_LAW
    @hypothesis.given(seed=_SEEDS, pairs=_row_pairs())
    def test_any_batch_agrees_with_the_oracle(self, driver: Any, seed: int, pairs: list[tuple[int, int]]) -> None:
        """Values and pages are the oracle's for whatever rows there are."""
        case = dataclasses.replace(self._rows(*pairs), table=("zeros", "stale")[seed % 2])
        batch = self._build(driver, case, seed)
        outcome = self._call(driver, batch)
        expected, pages = driver.expected(batch, outcome)
        assert_close(outcome.output, expected, case)
        assert_same_pages(outcome.pages, pages)

    @_LAW
    @hypothesis.given(seed=_SEEDS, pairs=_row_pairs())
    def test_relabelling_pages_changes_nothing(self, driver: Any, seed: int, pairs: list[tuple[int, int]]) -> None:
        """Page ids are names: another naming gives the same bits, and the pages under the new names."""
        batch = self._build(driver, self._rows(*pairs), seed)
        names = np.arange(len(batch.pages), dtype=np.int32)
        names[1:] = np.random.default_rng(seed).permutation(names[1:])  # the null page keeps its name
        old = np.argsort(names)
        renamed = dataclasses.replace(
            batch,
            pages=batch.pages[old],
            updated_pages=batch.updated_pages[old],
            block_tables=names[batch.block_tables],
        )
        first, second = self._call(driver, batch), self._call(driver, renamed)
        assert np.array_equal(first.output, second.output)
        assert_same_pages(first.pages[old], second.pages)

    @_LAW
    @hypothesis.given(seed=_SEEDS, cuts=strategies.sets(strategies.integers(1, 23), min_size=1, max_size=3))
    def test_prefill_in_chunks_equals_prefill_in_one(self, driver: Any, seed: int, cuts: set[int]) -> None:
        """A prompt of 24 tokens, given in pieces, gives the same tokens and the same pages."""
        whole = self._build(driver, self._rows((24, 24)), seed)
        at_once = self._call(driver, whole, host_writes=True)
        pages, parts = whole.pages, []
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 24], strict=True):
            chunk = self._chunk(whole, begin, end, pages)
            outcome = self._call(driver, chunk, host_writes=True)
            pages = outcome.pages
            parts.append(outcome.output[: end - begin])
        assert_close(np.concatenate(parts), at_once.output[:24].astype(np.float64), self.law_case)
        assert_same_pages(pages, at_once.pages)

    @_LAW
    @hypothesis.given(seed=_SEEDS, length=strategies.integers(2, 24))
    def test_decode_equals_the_last_token_of_a_prefill(self, driver: Any, seed: int, length: int) -> None:
        """The last token of a prompt gives the same answer when it comes alone."""
        whole = self._build(driver, self._rows((24, 24)), seed)
        prefill = self._call(driver, self._chunk(whole, 0, length, whole.pages), host_writes=True)
        before = self._call(driver, self._chunk(whole, 0, length - 1, whole.pages), host_writes=True)
        decode = self._call(driver, self._chunk(whole, length - 1, length, before.pages), host_writes=True)
        assert_close(decode.output[:1], prefill.output[length - 1 : length].astype(np.float64), self.law_case)
        assert_same_pages(decode.pages, prefill.pages)

    @staticmethod
    def _chunk(whole: Batch, begin: int, end: int, pages: np.ndarray) -> Batch:
        """Tokens [begin, end) of a batch that is one fresh prompt, on top of ``pages``."""
        size = whole.case.page_size
        tokens = np.roll(np.arange(len(whole.queries)), -begin)  # the chunk's tokens come first, the rest is padding
        slices, position = [], begin
        while position < end:
            count = min(size - position % size, end - position)
            page = whole.block_tables[0, position // size]
            slices.append((page * size + position % size, position - begin, count))
            position += count
        mapping = np.zeros_like(whole.slot_mapping)
        mapping[:, : len(slices)] = np.array(slices, np.int32).T
        starts = np.full_like(whole.query_start_loc, end - begin)
        starts[0] = 0
        lens = whole.context_lens.copy()
        lens[0] = end
        decode = int(end - begin == 1 and end > 1)
        return dataclasses.replace(
            whole,
            queries=whole.queries[tokens],
            keys=whole.keys[tokens],
            values=whole.values[tokens],
            pages=pages,
            context_lens=lens,
            query_start_loc=starts,
            distribution=np.array([decode, 1, 1], np.int32),
            slot_mapping=mapping,
            num_kv_update_slices=np.array([len(slices)], np.int32),
        )

    @_LAW
    @hypothesis.given(seed=_SEEDS)
    def test_row_order_changes_nothing(self, driver: Any, seed: int) -> None:
        """Rows are independent: in another order each token gives the same answer, and the pages are the same."""
        batch = self._build(driver, self._rows((9, 1), (30, 1), (17, 5), (8, 5), (25, 5)), seed)
        # Without leave to mix them, decodes change places with decodes and prefills with prefills.
        groups = [[0, 1, 2, 3, 4]] if self.any_row_order else [[0, 1], [2, 3, 4]]
        random = np.random.default_rng(seed)
        order = np.concatenate([random.permutation(group) for group in groups])
        counts = np.diff(batch.query_start_loc)[: len(order)]
        spans = [np.arange(batch.query_start_loc[row], batch.query_start_loc[row + 1]) for row in order]
        tokens = np.concatenate([*spans, np.arange(counts.sum(), len(batch.queries))])
        rows = np.concatenate([order, np.arange(len(order), len(batch.context_lens))])
        starts = batch.query_start_loc.copy()
        starts[1 : len(order) + 1] = np.cumsum(counts[order])
        moved = dataclasses.replace(
            batch,
            queries=batch.queries[tokens],
            keys=batch.keys[tokens],
            values=batch.values[tokens],
            context_lens=batch.context_lens[rows],
            block_tables=batch.block_tables[rows],
            query_start_loc=starts,
        )
        first, second = self._call(driver, batch), self._call(driver, moved)
        assert_close(second.output, first.output[tokens].astype(np.float64), self.law_case)
        assert_same_pages(first.pages, second.pages)

    def test_wider_table_changes_nothing(self, driver: Any) -> None:
        """Entries past every context are never used, however many there are.

        Within tolerance, not to the bit: the order of a sum may follow the static shapes.
        """
        batch = self._build(driver, dataclasses.replace(self.law_case, table="stale"))
        extra = np.random.default_rng(0).integers(0, len(batch.pages), (len(batch.context_lens), 3), np.int32)
        wider = dataclasses.replace(
            batch,
            case=dataclasses.replace(batch.case, pages_per_row=batch.case.pages_per_row + 3),
            block_tables=np.concatenate([batch.block_tables, extra], axis=1),
        )
        first, second = self._call(driver, batch), self._call(driver, wider)
        assert_close(second.output, first.output.astype(np.float64), self.law_case)
        assert_same_pages(first.pages, second.pages)

    @_LAW
    @hypothesis.given(seed=_SEEDS, pairs=_row_pairs())
    def test_attending_again_without_writing_changes_nothing(
        self, driver: Any, seed: int, pairs: list[tuple[int, int]]
    ) -> None:
        """v3 over the pages that a writing call has left gives its answers, and every page keeps its bits."""
        if driver.version == "v2":
            pytest.skip("v2 never writes")
        case = self._rows(*pairs).with_options(update_pages=False)
        self._require(driver, case)
        batch = self._build(driver, self._rows(*pairs), seed)
        first = self._call(driver, batch)
        garbage = np.full_like(batch.keys, np.nan)
        again = dataclasses.replace(batch, case=case, pages=first.pages, keys=garbage, values=garbage)
        second = self._call(driver, again)
        assert_close(second.output, first.output.astype(np.float64), case)
        assert_same_pages(second.pages, first.pages)

    @pytest.mark.parametrize("window", [32, 10**6, 2**31 - 1, 2**31, 2**64, (2**63 - 1, 0)])
    def test_window_past_the_context_equals_none(self, driver: Any, window: Any) -> None:
        """A sliding window that holds every context hides nothing."""
        case = self.law_case.with_options(sliding_window=window)
        batch = self._build(driver, self.law_case)
        self._require(driver, case)
        windowed = dataclasses.replace(batch, case=case)
        first, second = self._call(driver, batch), self._call(driver, windowed)
        assert_close(second.output, first.output.astype(np.float64), self.law_case)
        assert_same_pages(first.pages, second.pages)
