"""The contract of a ragged page attention operation, as one pytest class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from .cases import CASES, FAULTS, Batch, Case, Fault, Row, build_batch, case_named, spoil_row
from .driver import Driver, Outcome
from .tolerances import tolerance_for

__all__ = ["Capabilities", "RaggedPageAttentionContract", "assert_close"]


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What an operation says it can do. What it does not declare is skipped, with the reason.

    The defaults declare everything that the host may ask for; an operation that can do less says so.

    Attributes:
        head_dims: head sizes; None for any.
        page_sizes: tokens in a page; None for any.
        dtypes: of queries, keys and values.
        cache_dtypes: of the pages.
        mixed_dtypes: whether the cache's dtype may differ from that of the new keys.
        sliding_window, soft_cap: those options.
        window_pairs: ``sliding_window=(left, right)``.
        sinks: shapes of ``softmax_aux`` taken: "heads" ``[q_heads]``, "groups" ``[kv_heads, n]``.
        scales: accepts ``q_scale``, ``k_scale`` and ``v_scale`` as keywords (the host passes none).
        any_row_order: rows may come in any order; otherwise rows with one new token come first.
        nan_in_dead_slots: dead slots may hold NaN. Otherwise they hold large finite numbers.
        garbage_table_entries: unused table entries may name pages that do not exist.
        compute_dtype_none_keeps_precision: ``compute_dtype=None`` computes in the precision of the queries.
            Otherwise the kit passes the dtype of the queries, except in the test of this very thing.
        invalid_rows: rows that make no sense give zeros and write nothing.
        strict_arguments: a keyword that the host does not pass is refused.
        forwarding_view: takes a view that only forwards ``kv_pages`` and ``metadata``.
        forward_methods: methods that can be called directly on the machine that runs the tests.
        updates_in_place: v3 leaves the new pages in the view that it was given, whatever else it returns.
    """

    head_dims: frozenset[int] | None = None
    page_sizes: frozenset[int] | None = None
    dtypes: frozenset[str] = frozenset(("float32", "bfloat16", "float16"))
    cache_dtypes: frozenset[str] = frozenset(("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"))
    mixed_dtypes: bool = True
    sliding_window: bool = True
    window_pairs: bool = True
    soft_cap: bool = True
    sinks: frozenset[str] = frozenset(("heads", "groups"))
    scales: bool = False
    any_row_order: bool = True
    nan_in_dead_slots: bool = True
    garbage_table_entries: bool = True
    compute_dtype_none_keeps_precision: bool = True
    invalid_rows: bool = True
    strict_arguments: bool = True
    forwarding_view: bool = True
    forward_methods: tuple[str, ...] = ("native", "cpu", "gpu", "cuda", "rocm", "tpu")

    def lacks(self, case: Case) -> str | None:
        """Why this operation is not asked to do ``case``, or None."""
        cache_dtype = case.np_cache_dtype.name
        checks = (
            (self.head_dims is not None and case.head_dim not in self.head_dims, f"head_dim {case.head_dim}"),
            (self.page_sizes is not None and case.page_size not in self.page_sizes, f"page_size {case.page_size}"),
            (case.dtype not in self.dtypes, f"dtype {case.dtype}"),
            (cache_dtype not in self.cache_dtypes, f"cache dtype {cache_dtype}"),
            (not self.mixed_dtypes and cache_dtype != case.dtype, f"{case.dtype} on a {cache_dtype} cache"),
            (not self.sliding_window and case.sliding_window is not None, "sliding_window"),
            (not self.window_pairs and isinstance(case.sliding_window, tuple), "sliding_window as a pair"),
            (not self.soft_cap and case.logits_soft_cap is not None, "logits_soft_cap"),
            (case.sinks is not None and case.sinks not in self.sinks, f"sinks of the form {case.sinks!r}"),
            (not self.scales and (case.q_scale or case.k_scale or case.v_scale) is not None, "q/k/v scales"),
            (not self.any_row_order and not case.decode_first, "rows in any order"),
            (not self.garbage_table_entries and case.table == "garbage", "garbage in unused table entries"),
        )
        return next((feature for missing, feature in checks if missing), None)


# Laws run on one geometry, so that all examples share a compiled program. The settings make them repeatable, and
# let several classes inherit one test, which hypothesis otherwise takes for an accident.
_LAW = hypothesis.settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.differing_executors],
)
_SEEDS = strategies.integers(0, 2**20)
_LAW_CASE = case_named("mixed")


def _law_case(*pairs: tuple[int, int]) -> Case:
    return dataclasses.replace(_LAW_CASE, rows=tuple(Row(*pair) for pair in pairs))


@strategies.composite
def _row_pairs(draw: Callable[..., Any]) -> list[tuple[int, int]]:
    """Up to five rows, decodes first, that fit the laws' geometry."""
    longest = _LAW_CASE.pages_per_row * _LAW_CASE.page_size
    pairs = []
    for _ in range(draw(strategies.integers(1, 5))):
        new = draw(strategies.integers(1, 6))
        pairs.append((draw(strategies.integers(new, longest)), new))
    return sorted(pairs, key=lambda pair: pair[1] != 1)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape[:2], -1)


def assert_close(actual: np.ndarray, expected: np.ndarray, case: Case, what: str = "output") -> None:
    """Fail, with the worst place and the bound's reason, unless ``actual`` lies within the case's tolerance."""
    bound = tolerance_for(case)
    actual = actual.astype(np.float64)
    assert not np.isnan(actual).any(), f"{what}: NaN in tokens {np.unique(np.argwhere(np.isnan(actual))[:, 0])}"
    error = np.abs(actual - expected)
    excess = error - (bound.atol + bound.rtol * np.abs(expected))
    if excess.size and excess.max() > 0:
        token, head, lane = np.unravel_index(excess.argmax(), excess.shape)
        wrong = np.unique(np.argwhere(excess > 0)[:, 0])
        pytest.fail(
            f"{what}: largest error {error.max():.3g} "
            f"(bound atol {bound.atol:.3g}, rtol {bound.rtol:.3g}: {bound.reason}); "
            f"at token {token}, head {head}, lane {lane} got {actual[token, head, lane]:.6g}, "
            f"wanted {expected[token, head, lane]:.6g}; wrong tokens {wrong.tolist()}",
            pytrace=False,
        )


@functools.lru_cache(maxsize=1)
def _driver_for(operation: type[Any], contract: str) -> Driver:
    """One driver at a time: pytest runs class by class, and outcomes hold whole caches."""
    return Driver(operation)


class RaggedPageAttentionContract:
    """Inherit this class, name the operation, and pytest holds it to the host's contract::

        from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract

        class TestMyAttention(RaggedPageAttentionContract):
            capabilities = Capabilities(window_pairs=False)
            known_failures = {"test_values[sinks]": "https://example.org/issues/7"}

            @pytest.fixture
            def operation(self):
                return MyAttention          # the OperationImpl class, not an instance

    Whether it is v2 or v3 follows from ``MyAttention.get_impl_name()``. The operation meets the host's own cache
    view and metadata with the arguments that the host's attention layer passes, on hostile batches (see
    ``cases``), and is compared with the float64 oracle (``reference``). Narrow it with:

    ``capabilities``
        what the operation does; the rest is skipped with the reason.
    ``known_failures``
        test name (``test_values[sinks]``, or ``test_values`` for all of them, or a case's name for all
        tests of that case) to a reason. A strict xfail: the test must fail, and says so once it passes.
    ``cases``
        the cases to run, :data:`~easydel_ragged_plugin.testing.cases.CASES` unless set.

    Needs pytest and hypothesis, and a supported EasyDeL.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    known_failures: ClassVar[dict[str, str]] = {}
    cases: ClassVar[tuple[Case, ...]] = CASES

    @pytest.fixture
    def operation(self) -> type:
        """The operation class under test; the same class each time."""
        raise NotImplementedError(
            f"{type(self).__name__} must define the fixture `operation`, returning an operation class"
        )

    @pytest.fixture
    def driver(self, operation: type) -> Driver:
        """Calls the operation as the host does. Tests of one class share it, with its programs and outcomes."""
        return _driver_for(operation, f"{type(self).__module__}.{type(self).__qualname__}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise tests that take a case with the class's own cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=[case.name for case in self.cases])

    @pytest.fixture(autouse=True)
    def _declared(self, request: pytest.FixtureRequest) -> None:
        case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
        if case is not None:
            missing = self.capabilities.lacks(case)
            if missing is not None:
                pytest.skip(f"the operation does not declare: {missing}")
            version = request.getfixturevalue("driver").version
            if version not in case.versions:
                pytest.skip(f"no {version} cache has this geometry: {case.about}")
        names = [request.node.name, request.node.originalname] + ([case.name] if case is not None else [])
        for name in names:
            if name in self.known_failures:
                request.applymarker(pytest.mark.xfail(strict=True, reason=self.known_failures[name]))
                break

    # How calls are made.

    @property
    def _poison(self) -> Literal["nan", "finite"]:
        return "nan" if self.capabilities.nan_in_dead_slots else "finite"

    def _call(self, driver: Driver, batch: Batch, **how: Any) -> Outcome:
        if not self.capabilities.compute_dtype_none_keeps_precision:
            how.setdefault("compute_dtype", batch.case.np_dtype)
        return driver.call(batch, **how)

    def _build(self, driver: Driver, case: Case, seed: int = 0) -> Batch:
        return build_batch(case, driver.version, seed, self._poison)

    def _run(self, driver: Driver, case: Case) -> tuple[Batch, np.ndarray, np.ndarray, Outcome]:
        outcomes = driver.outcomes
        if case.name not in outcomes:
            batch = self._build(driver, case)
            try:
                outcomes[case.name] = (batch, *batch.expected(), self._call(driver, batch))
            except Exception as error:  # any failure of the operation is every dependent test's failure
                outcomes[case.name] = error
        found = outcomes[case.name]
        if isinstance(found, Exception):
            raise found
        return found

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
        wrong = (_bytes(outcome.pages) != _bytes(pages)).any(axis=-1) & batch.written_slots
        assert not wrong.any(), f"wrong bytes in written (page, slot): {np.argwhere(wrong)[:8].tolist()}"

    def test_other_slots_keep_their_bytes(self, driver: Driver, case: Case) -> None:
        """No slot changes that is not a live new token's: dead rows, padding tokens, other pages, the null page."""
        batch, _, pages, outcome = self._run(driver, case)
        changed = (_bytes(outcome.pages) != _bytes(pages)).any(axis=-1)
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
        assert (_bytes(outcome.pages) == _bytes(pages)).all()
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
        assert (_bytes(outcome.pages) == _bytes(batch.expected()[1])).all()

    def test_forwarding_view(self, driver: Driver) -> None:
        """A view of another class that forwards ``kv_pages`` and ``metadata`` is served like the host's own."""
        if not self.capabilities.forwarding_view:
            pytest.skip("the operation does not declare: forwarding_view")
        batch = self._build(driver, _LAW_CASE)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, forwarding_view=True)
        assert_close(outcome.output, expected, _LAW_CASE)
        assert (_bytes(outcome.pages) == _bytes(pages)).all()

    @pytest.mark.parametrize("name", ["mixed", "empty-rows", "full-batch"])
    def test_pages_written_by_the_host(self, driver: Driver, name: str) -> None:
        """v2: the host's view writes the new tokens, then the operation reads them. v3: that write does nothing."""
        case = case_named(name)
        batch = self._build(driver, case)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, host_writes=True)
        assert_close(outcome.output, expected, case)
        assert (_bytes(outcome.pages) == _bytes(pages)).all()

    @pytest.mark.parametrize("method", ["native", "cpu", "gpu", "cuda", "rocm", "tpu"])
    def test_forward_methods_agree(self, driver: Driver, method: str) -> None:
        """Each ``forward_*`` method exists, takes three-dimensional arrays, and gives the same answer."""
        function = getattr(driver.operation, f"forward_{method}", None)
        assert callable(function), f"forward_{method} is missing"
        if method not in self.capabilities.forward_methods:
            pytest.skip(f"the operation does not declare: forward_{method} on this machine")
        batch = self._build(driver, _LAW_CASE)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch, method=f"forward_{method}")
        assert outcome.output_shape == batch.queries.shape
        assert_close(outcome.output, expected, _LAW_CASE)
        assert (_bytes(outcome.pages) == _bytes(pages)).all()

    def test_unknown_argument_is_refused(self, driver: Driver) -> None:
        """A keyword that nobody knows is an error that names it, not something to drop."""
        if not self.capabilities.strict_arguments:
            pytest.skip("the operation does not declare: strict_arguments")
        with pytest.raises((TypeError, ValueError), match="no_such_option"):
            self._call(driver, self._build(driver, _LAW_CASE), extra={"no_such_option": 1})

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
        registry = driver.host.OperationRegistry
        held = registry._registry.get(driver.name)
        registry._registry[driver.name] = driver.operation
        try:
            assert type(registry.create(driver.name, driver.instance().metadata)) is driver.operation
        finally:
            if held is None:
                del registry._registry[driver.name]
            else:
                registry._registry[driver.name] = held

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
        case = dataclasses.replace(_LAW_CASE, sliding_window=window)
        batch = spoil_row(self._build(driver, case), fault)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch)
        assert_close(outcome.output, expected, case)
        assert not outcome.output[~batch.live_tokens].any()
        assert (_bytes(outcome.pages) == _bytes(pages)).all()

    # Laws.

    @_LAW
    @hypothesis.given(seed=_SEEDS, pairs=_row_pairs())
    def test_any_batch_agrees_with_the_oracle(self, driver: Driver, seed: int, pairs: list[tuple[int, int]]) -> None:
        """Values and pages are the oracle's for whatever rows there are."""
        case = dataclasses.replace(_law_case(*pairs), table=("zeros", "stale")[seed % 2])
        batch = self._build(driver, case, seed)
        expected, pages = batch.expected()
        outcome = self._call(driver, batch)
        assert_close(outcome.output, expected, case)
        assert (_bytes(outcome.pages) == _bytes(pages)).all()

    @_LAW
    @hypothesis.given(seed=_SEEDS, pairs=_row_pairs())
    def test_relabelling_pages_changes_nothing(self, driver: Driver, seed: int, pairs: list[tuple[int, int]]) -> None:
        """Page ids are names: another naming gives the same bits, and the pages under the new names."""
        batch = self._build(driver, _law_case(*pairs), seed)
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
        assert (_bytes(first.pages[old]) == _bytes(second.pages)).all()

    @_LAW
    @hypothesis.given(seed=_SEEDS, cuts=strategies.sets(strategies.integers(1, 23), min_size=1, max_size=3))
    def test_prefill_in_chunks_equals_prefill_in_one(self, driver: Driver, seed: int, cuts: set[int]) -> None:
        """A prompt of 24 tokens, given in pieces, gives the same tokens and the same pages."""
        whole = self._build(driver, _law_case((24, 24)), seed)
        at_once = self._call(driver, whole, host_writes=True)
        pages, parts = whole.pages, []
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 24], strict=True):
            chunk = self._chunk(whole, begin, end, pages)
            outcome = self._call(driver, chunk, host_writes=True)
            pages = outcome.pages
            parts.append(outcome.output[: end - begin])
        assert_close(np.concatenate(parts), at_once.output[:24].astype(np.float64), _LAW_CASE)
        assert (_bytes(pages) == _bytes(at_once.pages)).all()

    @_LAW
    @hypothesis.given(seed=_SEEDS, length=strategies.integers(2, 24))
    def test_decode_equals_the_last_token_of_a_prefill(self, driver: Driver, seed: int, length: int) -> None:
        """The last token of a prompt gives the same answer when it comes alone."""
        whole = self._build(driver, _law_case((24, 24)), seed)
        prefill = self._call(driver, self._chunk(whole, 0, length, whole.pages), host_writes=True)
        before = self._call(driver, self._chunk(whole, 0, length - 1, whole.pages), host_writes=True)
        decode = self._call(driver, self._chunk(whole, length - 1, length, before.pages), host_writes=True)
        assert_close(decode.output[:1], prefill.output[length - 1 : length].astype(np.float64), _LAW_CASE)
        assert (_bytes(decode.pages) == _bytes(prefill.pages)).all()

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
    def test_row_order_changes_nothing(self, driver: Driver, seed: int) -> None:
        """Rows are independent: in another order each token gives the same answer, and the pages are the same."""
        batch = self._build(driver, _law_case((9, 1), (30, 1), (17, 5), (8, 5), (25, 5)), seed)
        # Without leave to mix them, decodes change places with decodes and prefills with prefills.
        groups = [[0, 1, 2, 3, 4]] if self.capabilities.any_row_order else [[0, 1], [2, 3, 4]]
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
        assert_close(second.output, first.output[tokens].astype(np.float64), _LAW_CASE)
        assert (_bytes(first.pages) == _bytes(second.pages)).all()

    def test_wider_table_changes_nothing(self, driver: Driver) -> None:
        """Entries past every context are never used, however many there are.

        Within tolerance, not to the bit: the order of a sum may follow the static shapes.
        """
        batch = self._build(driver, dataclasses.replace(_LAW_CASE, table="stale"))
        extra = np.random.default_rng(0).integers(0, len(batch.pages), (len(batch.context_lens), 3), np.int32)
        wider = dataclasses.replace(
            batch,
            case=dataclasses.replace(batch.case, pages_per_row=batch.case.pages_per_row + 3),
            block_tables=np.concatenate([batch.block_tables, extra], axis=1),
        )
        first, second = self._call(driver, batch), self._call(driver, wider)
        assert_close(second.output, first.output.astype(np.float64), _LAW_CASE)
        assert (_bytes(first.pages) == _bytes(second.pages)).all()

    @pytest.mark.parametrize("window", [32, 10**6])
    def test_window_past_the_context_equals_none(self, driver: Driver, window: int) -> None:
        """A sliding window that holds every context hides nothing."""
        if not self.capabilities.sliding_window:
            pytest.skip("the operation does not declare: sliding_window")
        batch = self._build(driver, _LAW_CASE)
        windowed = dataclasses.replace(batch, case=dataclasses.replace(_LAW_CASE, sliding_window=window))
        first, second = self._call(driver, batch), self._call(driver, windowed)
        assert_close(second.output, first.output.astype(np.float64), _LAW_CASE)
        assert (_bytes(first.pages) == _bytes(second.pages)).all()
