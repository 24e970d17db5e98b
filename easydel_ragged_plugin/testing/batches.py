"""The description of one call, and the hostile arrays that are built from it.

A :class:`Case` is a description; :func:`build_batch` turns it into arrays. The batches are hostile on purpose:

* pages lie in shuffled order, and every slot that no live token owns holds poison: the rest of a last
  page, unused pages, the null page 0, pages that a sliding window has freed;
* unused table entries hold zeros (as EasyDeL 0.3.0 leaves them), the pages of other rows (0.2.0.2), or garbage;
* rows differ in keys and values, so that reading another row's page shows;
* padding tokens at the end carry large non-zero keys and values, and dead rows carry plausible lengths.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.layout import page_shape
from easydel_ragged_plugin.options import NO_OPTIONS, Options

__all__ = ["FAULTS", "Batch", "Case", "Fault", "Placement", "Row", "Version", "build_batch", "place", "spoil_row"]

Version = Literal["v2", "v3"]
_BOTH: tuple[Version, ...] = ("v2", "v3")
_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e3m4": ml_dtypes.float8_e3m4,
    "float8_e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int8": np.int8,
}

# What dead slots hold for operations that declare that NaN does harm there: a number that is far from every real value
# and finite in every cache dtype.
_FINITE_POISON = 320.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One request of a batch.

    Attributes:
        context: its tokens, the new ones included.
        new: how many of them, the last ones, are new. 0 is an idle row.
    """

    context: int
    new: int


@dataclasses.dataclass(frozen=True)
class Case:
    """Description of one call.

    Attributes:
        name: unique; tests are named after it.
        rows: live rows, in order.
        about: what goes wrong in an operation that fails this case.
        q_heads, kv_heads, head_dim, page_size: geometry. ``page_size`` in tokens.
        pages_per_row: width of the block table.
        num_tokens: length of the token axis; what the rows leave is padding.
        num_rows: rows of the block table; those past ``rows`` are dead.
        num_pages: pages in the cache, the null page 0 included. None: what the rows need and five more.
        dtype: of queries, new keys and new values.
        cache_dtype: of the pages. None: ``dtype``.
        options: options of the call. With ``update_pages=False`` the pages hold the new tokens before the call, and
            the call's keys and values are NaN.
        sinks: None, "heads" for ``[q_heads]``, "groups" for ``[kv_heads, 2]``.
        query_gain, value_mean: size of queries, mean of values.
        stored_gain: size of keys and values; those of an integer cache are large, and its scales small.
        free_left_of_window: pages left of every query's window do not belong to the row.
        repeat_page: the first row's table names its first page twice.
        shared_pages: the rows begin with so many pages of the first row, all of old tokens.
        table: what unused table entries hold.
        dead_rows: "idle" (no tokens), or "claim": the tokens of the first dead row are the padding.
        poison: what dead slots hold; None for NaN, or finite numbers where NaN does harm.
        decode_first: whether rows with one new token come before the others, as the host orders them.
        versions: versions that can have such a cache.
    """

    name: str
    rows: tuple[Row, ...]
    about: str = ""
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 4
    pages_per_row: int = 8
    num_tokens: int = 32
    num_rows: int = 8
    num_pages: int | None = 64
    dtype: str = "float32"
    cache_dtype: str | None = None
    options: Options = NO_OPTIONS
    sinks: Literal["heads", "groups"] | None = None
    query_gain: float = 2.0
    value_mean: float = 0.0
    stored_gain: float = 1.0
    free_left_of_window: bool = False
    repeat_page: bool = False
    shared_pages: int = 0
    table: Literal["zeros", "stale", "garbage"] = "zeros"
    dead_rows: Literal["idle", "claim"] = "idle"
    poison: Literal["nan", "finite"] | None = None
    decode_first: bool = True
    versions: tuple[Version, ...] = _BOTH

    @property
    def np_dtype(self) -> np.dtype:
        """dtype of queries, keys and values."""
        return np.dtype(_DTYPES[self.dtype])

    @property
    def np_cache_dtype(self) -> np.dtype:
        """dtype of the pages."""
        return np.dtype(_DTYPES[self.cache_dtype or self.dtype])

    @property
    def softmax_scale(self) -> float:
        """The softmax scale as a number, which is how the host passes it."""
        return self.options.softmax_scale or self.head_dim**-0.5

    @property
    def window(self) -> int | None:
        """The sliding window as a number of tokens."""
        return self.options.window

    def with_options(self, **changes: Any) -> Case:
        """The case with some of its options changed."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of one call, in NumPy.

    Attributes:
        case: what it was built from.
        version: the layout of the pages.
        queries, keys, values: of the new tokens, ``[tokens, heads, head_dim]``.
        pages, updated_pages: the cache before the new tokens, and after them.
        context_lens, block_tables, query_start_loc, num_seqs, distribution: the index arrays of the functions, int32.
        sinks: the logits for ``softmax_aux``, or None.
        live_tokens: bool ``[tokens]``: those that belong to a live row.
        written_slots: bool ``[pages, page_size]``: those that the new tokens fill.
        slot_mapping, num_kv_update_slices: the v2 host's description of the same writes.
        k_scale, v_scale: float32 ``[kv_heads]`` where the case has them as arrays; else None.
    """

    case: Case
    version: Version
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    pages: np.ndarray
    updated_pages: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    query_start_loc: np.ndarray
    num_seqs: np.ndarray
    distribution: np.ndarray
    sinks: np.ndarray | None
    live_tokens: np.ndarray
    written_slots: np.ndarray
    slot_mapping: np.ndarray
    num_kv_update_slices: np.ndarray
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None

    @property
    def scales(self) -> dict[str, np.ndarray]:
        """The scales that are arrays, by the names of their keywords."""
        return {name: getattr(self, name) for name in self.case.options.scale_arrays}

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(output in float64, pages after the call) of the oracle."""
        output, pages, _ = self.expected_with_lse()
        return output, pages

    def expected_with_lse(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(output, pages, logsumexp ``[tokens, q_heads]`` in float64) of the oracle."""
        index = (self.context_lens, self.block_tables, self.query_start_loc)
        how: Any = {"options": self.case.options, "return_lse": True, **self.scales}
        if self.version == "v2":
            output, lse = reference.ragged_page_attention_v2(
                self.queries, self.updated_pages, *index, self.num_seqs, self.sinks, **how
            )
            return output, self.updated_pages, lse
        new = (self.queries, self.keys, self.values)
        output, pages, lse = reference.ragged_page_attention_v3(
            *new, self.pages, *index, self.distribution, self.sinks, **how
        )
        return output, pages, lse


def _pages_needed(case: Case, row: Row) -> tuple[int, int]:
    """Table entries [first, end) that a row owns pages for."""
    end = -(-row.context // case.page_size)
    if not (case.free_left_of_window and case.window):
        return 0, end
    return max(0, row.context - row.new - case.window + 1) // case.page_size, end


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the rows of a case lie, without their numbers: the metadata of a call, int32 in NumPy.

    Attributes:
        num_pages: pages in the cache, the null page 0 included.
        block_tables: one or more ``[rows, pages_per_row]``, over disjoint pages.
        context_lens: ``[rows]``.
        query_start_loc: ``[rows + 1]``.
        distribution: ``[3]``.
    """

    num_pages: int
    block_tables: tuple[np.ndarray, ...]
    context_lens: np.ndarray
    query_start_loc: np.ndarray
    distribution: np.ndarray


def place(case: Case, random: np.random.Generator, copies: int = 1) -> Placement:
    """Give every row of ``case`` pages of its own, in shuffled order, and fill the metadata as the host does.

    Args:
        case: whose rows to place.
        random: for the order of pages, and for what dead entries hold.
        copies: how many block tables, each over pages of its own.

    Raises:
        ValueError: the case's axes or its ``num_pages`` have no room for its rows.
    """
    bounds = [_pages_needed(case, row) for row in case.rows]
    shared = case.shared_pages * case.page_size
    if any(row.context - row.new < shared for row in case.rows):
        raise ValueError(f"case {case.name}: got a row with fewer than the {shared} old tokens of its shared pages")
    own = sum(end - first for first, end in bounds) - case.shared_pages * max(0, len(bounds) - 1)
    needed = 1 + copies * own
    num_pages = case.num_pages if case.num_pages is not None else needed + 5
    if needed > num_pages:
        raise ValueError(f"case {case.name}: got num_pages {num_pages}, wanted at least {needed} for its rows")
    live = sum(row.new for row in case.rows)
    if live > case.num_tokens or len(case.rows) > case.num_rows:
        raise ValueError(
            f"case {case.name}: got {live} tokens in {len(case.rows)} rows, more than the case's axes hold"
        )
    order = iter(1 + random.permutation(num_pages - 1))
    tables = tuple(_table(case, bounds, order, num_pages, random) for _ in range(copies))
    total, dead = len(case.rows), case.num_rows - len(case.rows)
    contexts = [row.context for row in case.rows]
    # Those of dead rows are plausible.
    plausible = random.integers(1, case.pages_per_row * case.page_size + 1, dead)
    starts = np.cumsum([0, *(row.new for row in case.rows)])
    after = case.num_tokens if case.dead_rows == "claim" else live
    decodes = sum(row.new == 1 and row.context > 1 for row in case.rows)
    return Placement(
        num_pages=num_pages,
        block_tables=tables,
        context_lens=np.array([*contexts, *plausible], np.int32),
        query_start_loc=np.array([*starts, *[after] * dead], np.int32),
        distribution=np.array([decodes, total if case.table != "stale" else decodes, total], np.int32),
    )


def _table(
    case: Case, bounds: list[tuple[int, int]], order: Iterator[int], num_pages: int, random: np.random.Generator
) -> np.ndarray:
    """A block table whose rows own the next pages of ``order``; ``bounds`` are their entries [first, end)."""
    table = np.zeros((case.num_rows, case.pages_per_row), np.int32)
    owned: list[int] = []
    for r, (first, end) in enumerate(bounds):
        own = case.shared_pages if r > 0 else first
        table[r, :own] = table[0, :own]
        table[r, own:end] = [next(order) for _ in range(own, end)]
        if r == 0 and case.repeat_page:
            table[r, 1] = table[r, 0]
        owned.extend(table[r, first:end])
    for r in range(case.num_rows):
        first, end = bounds[r] if r < len(bounds) else (0, 0)
        unused = [e for e in range(case.pages_per_row) if not first <= e < end]
        if case.table == "garbage":
            # Left of a window the host writes real page ids or zeros; only entries past a context can hold anything.
            table[r, [e for e in unused if e >= end]] = random.choice([-1, -7, num_pages, 2**30], len(unused) - first)
        elif case.table == "stale" and owned:
            others = [p for p in owned if r >= len(bounds) or p not in table[r, first:end]] or [0]
            table[r, unused] = random.choice(others, len(unused))
    return table


def build_batch(case: Case, version: Version, seed: int = 0, poison: Literal["nan", "finite"] = "nan") -> Batch:
    """Arrays for ``case``; the same arguments give the same arrays.

    Args:
        case: what to build.
        version: layout of the pages.
        seed: another one gives other numbers and another order of pages.
        poison: what dead slots hold where the case leaves it open.
    """
    random = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    placement = place(case, random)
    (tables,) = placement.block_tables
    starts = placement.query_start_loc

    dtype, cache_dtype = case.np_dtype, case.np_cache_dtype
    fill = np.nan if (case.poison or poison) == "nan" else _FINITE_POISON
    if np.issubdtype(cache_dtype, np.integer):
        fill = np.iinfo(cache_dtype).min  # has no NaN; nobody writes this one
    shape = page_shape(version, placement.num_pages, case.page_size, case.kv_heads, case.head_dim, cache_dtype)
    pages = np.full(shape, fill, cache_dtype)

    def normal(*shape: int, gain: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + gain * random.standard_normal(shape)).astype(np.float32)

    queries = normal(case.num_tokens, case.q_heads, case.head_dim, gain=case.query_gain).astype(dtype)
    # Padding tokens keep these large keys and values; live tokens get their row's own below.
    keys = normal(case.num_tokens, case.kv_heads, case.head_dim, mean=50.0).astype(dtype)
    values = normal(case.num_tokens, case.kv_heads, case.head_dim, mean=50.0).astype(dtype)
    slices: list[tuple[int, int, int]] = []
    written = np.zeros((placement.num_pages, case.page_size), bool)
    for r, row in enumerate(case.rows):
        cached, start = row.context - row.new, starts[r]
        heads, gain = (row.context, case.kv_heads, case.head_dim), case.stored_gain
        row_keys = normal(*heads, gain=gain).astype(dtype)
        row_values = normal(*heads, gain=gain, mean=case.value_mean + 0.25 * gain * (r % 5)).astype(dtype)
        first_cached = min(cached, _pages_needed(case, row)[0] * case.page_size)
        if case.shared_pages and r > 0:
            first_cached = case.shared_pages * case.page_size  # the first row has written the tokens before it
        reference.write_tokens(
            pages, tables[r], first_cached, row_keys[first_cached:cached], row_values[first_cached:cached]
        )
        keys[start : start + row.new], values[start : start + row.new] = row_keys[cached:], row_values[cached:]
        position = cached
        while position < row.context:
            slot = position % case.page_size
            count = min(case.page_size - slot, row.context - position)
            page = tables[r, position // case.page_size]
            written[page, slot : slot + count] = True
            slices.append((page * case.page_size + slot, start + position - cached, count))
            position += count

    updated = pages.copy()
    for r, row in enumerate(case.rows):
        new = slice(starts[r], starts[r + 1])
        reference.write_tokens(updated, tables[r], row.context - row.new, keys[new], values[new])

    sinks = None
    if case.sinks is not None:
        sinks = normal(*((case.q_heads,) if case.sinks == "heads" else (case.kv_heads, 2)), mean=1.5).astype(dtype)
    if not case.options.update_pages:
        pages, written = updated.copy(), np.zeros_like(written)
        keys, values = np.full_like(keys, np.nan), np.full_like(values, np.nan)
    mapping = np.zeros((3, case.num_tokens + case.num_rows), np.int32)
    mapping[:, : len(slices)] = np.array(slices, np.int32).reshape(-1, 3).T
    return Batch(
        case=case,
        version=version,
        queries=queries,
        keys=keys,
        values=values,
        pages=pages,
        updated_pages=updated,
        context_lens=placement.context_lens,
        block_tables=tables,
        query_start_loc=starts,
        num_seqs=np.array([len(case.rows)], np.int32),
        distribution=placement.distribution,
        sinks=sinks,
        live_tokens=np.arange(case.num_tokens) < sum(row.new for row in case.rows),
        written_slots=written,
        slot_mapping=mapping,
        num_kv_update_slices=np.array([len(slices)], np.int32),
        **{name: random.uniform(0.25, 2.0, case.kv_heads).astype(np.float32) for name in case.options.scale_arrays},
    )


Fault = Literal[
    "page past the cache",
    "negative page",
    "context past the table",
    "context shorter than its new tokens",
    "negative context",
    "backwards row",
    "start past the tokens",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


def spoil_row(batch: Batch, fault: Fault) -> Batch:
    """The batch with its last live row made invalid: it must give zeros and write nothing.

    A wrong start spoils the row before it as well; then both are in the middle, and the rows after them are good.

    The batch's ``updated_pages`` and ``written_slots`` follow, as far as v3 goes (the v2 host writes pages itself).
    """
    case, row = batch.case, len(batch.case.rows) - 1
    tables, lens, starts = batch.block_tables.copy(), batch.context_lens.copy(), batch.query_start_loc.copy()
    last_page = (case.rows[row].context - 1) // case.page_size
    if fault == "page past the cache":
        tables[row, last_page] = len(batch.pages)
    elif fault == "negative page":
        tables[row, last_page] = -3
    elif fault == "context past the table":
        lens[row] = case.pages_per_row * case.page_size + 1
    elif fault == "context shorter than its new tokens":
        lens[row] = case.rows[row].new - 1
    elif fault == "negative context":
        lens[row] = -2
    elif fault == "start past the tokens":
        row = len(case.rows) // 2
        starts[row] = 10**6
    else:
        starts[row + 1 :] = max(0, starts[row] - 1)
    live = batch.live_tokens.copy()
    if fault == "start past the tokens":
        live[batch.query_start_loc[row - 1] : batch.query_start_loc[row + 1]] = False
    else:
        live[batch.query_start_loc[row] :] = False
    return dataclasses.replace(batch, block_tables=tables, context_lens=lens, query_start_loc=starts, live_tokens=live)
