"""Named cases of ragged page attention, and the hostile batches that are built from them.

:data:`CASES` is the one table that the contract, this package's own tests and the benchmark share. A case
is a description; :func:`build_batch` turns it into arrays. The batches are hostile on purpose:

* pages lie in shuffled order, and every slot that no live token owns holds poison: the rest of a last
  page, unused pages, the null page 0, pages that a sliding window has freed;
* unused table entries hold zeros (as EasyDeL 0.3.0 leaves them), the pages of other rows (0.2.0.2), or garbage;
* rows differ in keys and values, so that reading a neighbour's page shows;
* padding tokens at the end carry large non-zero keys and values, and dead rows carry plausible lengths.

Cases of equal geometry share shapes, and so one compiled program.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.layout import page_shape

__all__ = ["CASES", "FAULTS", "Batch", "Case", "Row", "build_batch", "case_named", "spoil_row"]

Version = Literal["v2", "v3"]
_BOTH: tuple[Version, ...] = ("v2", "v3")
_FLOAT8_DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, **_FLOAT8_DTYPES}

# Far from every real value and finite in every cache dtype: what dead slots hold for operations that have
# declared that they can't stand NaN there.
_FINITE_POISON = 320.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One request of a batch: ``context`` tokens in all, the last ``new`` of them new. ``new=0`` is an idle row."""

    context: int
    new: int


def _rows(*pairs: tuple[int, int]) -> tuple[Row, ...]:
    return tuple(Row(context, new) for context, new in pairs)


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
        softmax_scale: None for ``head_dim ** -0.5``.
        sliding_window, logits_soft_cap: options of the call.
        sinks: None, "heads" for ``[q_heads]``, "groups" for ``[kv_heads, 2]``.
        q_scale, k_scale, v_scale: factors on stored queries, keys and values. The host never passes them.
        query_gain, value_mean: size of queries, mean of values.
        free_left_of_window: pages that no query can see any more are not the row's any longer.
        repeat_page: the first row's table names its first page twice.
        table: what unused table entries hold.
        dead_rows: "idle" (no tokens), or "claim": the first dead row's tokens are the padding.
        poison: what dead slots hold; None for what the tested operation stands.
        decode_first: whether rows with one new token come before the others, as the host orders them.
        versions: operations that can have such a cache.
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
    softmax_scale: float | None = None
    sliding_window: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    sinks: Literal["heads", "groups"] | None = None
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    query_gain: float = 2.0
    value_mean: float = 0.0
    free_left_of_window: bool = False
    repeat_page: bool = False
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
    def scale(self) -> float:
        """The softmax scale as a number, which is how the host passes it."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the functions for this case, those that are set."""
        names = ("sliding_window", "logits_soft_cap", "q_scale", "k_scale", "v_scale")
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"softmax_scale": self.scale, **options}

    @property
    def window(self) -> int | None:
        """The sliding window as a number of tokens."""
        window = self.sliding_window
        return window[0] + 1 if isinstance(window, tuple) else window


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of one call, in NumPy.

    ``pages`` is the cache before the new tokens, ``updated_pages`` after them. ``live_tokens`` marks tokens that
    belong to a live row, ``written_slots`` (``[pages, page_size]``) the slots that the new tokens fill.
    ``slot_mapping`` and ``num_kv_update_slices`` are the v2 host's description of the same writes.
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

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(output in float64, pages after the call) of the oracle."""
        index = (self.context_lens, self.block_tables, self.query_start_loc)
        if self.version == "v2":
            output = reference.ragged_page_attention_v2(
                self.queries, self.updated_pages, *index, self.num_seqs, self.sinks, **self.case.options
            )
            return output, self.updated_pages
        return reference.ragged_page_attention_v3(
            self.queries,
            self.keys,
            self.values,
            self.pages,
            *index,
            self.distribution,
            self.sinks,
            **self.case.options,
        )


def _pages_needed(case: Case, row: Row) -> tuple[int, int]:
    """Table entries [first, end) that a row owns pages for."""
    end = -(-row.context // case.page_size)
    if not (case.free_left_of_window and case.window):
        return 0, end
    return max(0, row.context - row.new - case.window + 1) // case.page_size, end


def build_batch(case: Case, version: Version, seed: int = 0, poison: Literal["nan", "finite"] = "nan") -> Batch:
    """Arrays for ``case``; the same arguments give the same arrays.

    Args:
        case: what to build.
        version: layout of the pages.
        seed: another one gives other numbers and another order of pages.
        poison: what dead slots hold where the case leaves it open.
    """
    random = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    bounds = [_pages_needed(case, row) for row in case.rows]
    needed = 1 + sum(end - first for first, end in bounds)
    num_pages = case.num_pages if case.num_pages is not None else needed + 5
    if needed > num_pages:
        raise ValueError(f"case {case.name}: got num_pages {num_pages}, wanted at least {needed} for its rows")
    live = sum(row.new for row in case.rows)
    if live > case.num_tokens or len(case.rows) > case.num_rows:
        raise ValueError(
            f"case {case.name}: got {live} tokens in {len(case.rows)} rows, more than the case's axes hold"
        )

    order = iter(1 + random.permutation(num_pages - 1))
    tables = np.zeros((case.num_rows, case.pages_per_row), np.int32)
    owned: list[int] = []
    for r, (first, end) in enumerate(bounds):
        for entry in range(first, end):
            tables[r, entry] = next(order)
        if r == 0 and case.repeat_page:
            tables[r, 1] = tables[r, 0]
        owned.extend(tables[r, first:end])
    for r in range(case.num_rows):
        first, end = bounds[r] if r < len(bounds) else (0, 0)
        unused = [e for e in range(case.pages_per_row) if not first <= e < end]
        if case.table == "garbage":
            # Left of a window the host writes real page ids or zeros; only entries past a context can hold anything.
            tables[r, [e for e in unused if e >= end]] = random.choice([-1, -7, num_pages, 2**30], len(unused) - first)
        elif case.table == "stale" and owned:
            others = [p for p in owned if r >= len(bounds) or p not in tables[r, first:end]] or [0]
            tables[r, unused] = random.choice(others, len(unused))

    dtype, cache_dtype = case.np_dtype, case.np_cache_dtype
    fill = np.nan if (case.poison or poison) == "nan" else _FINITE_POISON
    shape = page_shape(version, num_pages, case.page_size, case.kv_heads, case.head_dim, cache_dtype)
    pages = np.full(shape, fill, cache_dtype)

    def normal(*shape: int, gain: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + gain * random.standard_normal(shape)).astype(np.float32)

    queries = normal(case.num_tokens, case.q_heads, case.head_dim, gain=case.query_gain).astype(dtype)
    # Padding tokens keep these large keys and values; live tokens get their row's own below.
    keys = normal(case.num_tokens, case.kv_heads, case.head_dim, mean=50.0).astype(dtype)
    values = normal(case.num_tokens, case.kv_heads, case.head_dim, mean=50.0).astype(dtype)
    context_lens = np.zeros(case.num_rows, np.int32)
    starts = np.zeros(case.num_rows + 1, np.int32)
    slices: list[tuple[int, int, int]] = []
    written = np.zeros((num_pages, case.page_size), bool)
    start = 0
    for r, row in enumerate(case.rows):
        cached = row.context - row.new
        row_keys = normal(row.context, case.kv_heads, case.head_dim).astype(dtype)
        row_values = normal(row.context, case.kv_heads, case.head_dim, mean=case.value_mean + 0.25 * (r % 5)).astype(
            dtype
        )
        first_cached = min(cached, bounds[r][0] * case.page_size)
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
        start += row.new
        context_lens[r], starts[r + 1] = row.context, start
    starts[len(case.rows) + 1 :] = start
    dead = slice(len(case.rows), case.num_rows)
    context_lens[dead] = random.integers(1, case.pages_per_row * case.page_size + 1, case.num_rows - len(case.rows))
    if case.dead_rows == "claim":
        starts[len(case.rows) + 1 :] = case.num_tokens

    updated = pages.copy()
    for r, row in enumerate(case.rows):
        new = slice(starts[r], starts[r + 1])
        reference.write_tokens(updated, tables[r], row.context - row.new, keys[new], values[new])

    sinks = None
    if case.sinks is not None:
        sinks = normal(*((case.q_heads,) if case.sinks == "heads" else (case.kv_heads, 2)), mean=1.5).astype(dtype)
    mapping = np.zeros((3, case.num_tokens + case.num_rows), np.int32)
    mapping[:, : len(slices)] = np.array(slices, np.int32).reshape(-1, 3).T
    total = len(case.rows)
    decodes = sum(row.new == 1 and row.context > 1 for row in case.rows)
    return Batch(
        case=case,
        version=version,
        queries=queries,
        keys=keys,
        values=values,
        pages=pages,
        updated_pages=updated,
        context_lens=context_lens,
        block_tables=tables,
        query_start_loc=starts,
        num_seqs=np.array([total], np.int32),
        distribution=np.array([decodes, total if case.table != "stale" else decodes, total], np.int32),
        sinks=sinks,
        live_tokens=np.arange(case.num_tokens) < live,
        written_slots=written,
        slot_mapping=mapping,
        num_kv_update_slices=np.array([len(slices)], np.int32),
    )


Fault = Literal[
    "page past the cache",
    "negative page",
    "context past the table",
    "context shorter than its new tokens",
    "negative context",
    "backwards row",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


def spoil_row(batch: Batch, fault: Fault) -> Batch:
    """The batch with its last live row made invalid: it must give zeros and write nothing.

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
    else:
        starts[row + 1 :] = max(0, starts[row] - 1)
    live = batch.live_tokens.copy()
    live[batch.query_start_loc[row] :] = False
    return dataclasses.replace(batch, block_tables=tables, context_lens=lens, query_start_loc=starts, live_tokens=live)


_MIXED = _rows((9, 1), (30, 1), (17, 6), (8, 8), (25, 5))
_PAIR = _rows((9, 1), (13, 6))
_SMALL: dict[str, Any] = {"num_tokens": 16, "num_rows": 4, "pages_per_row": 4, "num_pages": 16}


def _wide(pages_per_row: int) -> Case:
    full = 2 * pages_per_row
    return Case(
        f"table-{pages_per_row}-pages",
        _rows((full, 1), (full - 1, 1), (max(3, full - 60), 3)),
        "a table whose width is no multiple of the kernel's block is read with a clamped slice",
        kv_heads=1,
        q_heads=2,
        page_size=2,
        pages_per_row=pages_per_row,
        num_tokens=16,
        num_rows=4,
        num_pages=None,
    )


CASES: tuple[Case, ...] = (
    # One geometry: which rows there are.
    Case("decode", _rows((5, 1), (16, 1), (17, 1), (32, 1), (2, 1)), "one new token in each row"),
    Case("prefill", _rows((7, 7), (12, 12), (4, 4)), "nothing cached"),
    Case("first-token", _rows((1, 1)), "a row that is one token long"),
    Case("chunked-prefill", _rows((20, 5), (11, 9), (32, 3)), "new tokens on top of cached ones"),
    Case("mixed", _MIXED, "decode and prefill in one batch"),
    Case("page-boundaries", _rows((4, 1), (5, 1), (8, 4), (9, 5), (12, 8)), "new tokens begin or end at a page's edge"),
    Case("empty-rows", _rows((9, 1), (0, 0), (12, 0), (17, 6), (0, 0), (8, 8)), "idle rows between live ones"),
    Case("nothing-live", (), "no row at all: all tokens are padding"),
    Case("all-idle", _rows((0, 0), (12, 0)), "rows, but no new token"),
    Case(
        "full-batch",
        _rows((9, 1), (30, 1), (5, 1), (2, 1), (17, 6), (8, 8), (25, 5), (9, 9)),
        "no padding token and no dead row",
    ),
    Case("stale-table", _MIXED, "unused table entries name other rows' pages", table="stale"),
    Case("garbage-table", _MIXED, "unused table entries name no page", table="garbage"),
    Case("dead-rows-claim-tokens", _MIXED, "dead rows have lengths and tokens", dead_rows="claim", table="stale"),
    Case("poisoned-slots", _MIXED, "a dead slot's NaN reaches the result", table="stale", poison="nan"),
    Case("rows-in-any-order", _rows((17, 6), (9, 1), (8, 8), (30, 1)), "prefill before decode", decode_first=False),
    Case("repeated-page", _rows((7, 2), (9, 1)), "a table that names a page twice loses new keys", repeat_page=True),
    # The same geometry: options.
    Case("softmax-scale", _MIXED, "softmax_scale is not head_dim ** -0.5", softmax_scale=0.31),
    Case("window-1", _MIXED, "each query sees itself alone", sliding_window=1),
    Case("window-3", _MIXED, "off by one, or measured from the row's last query", sliding_window=3),
    Case("window-7", _MIXED, "a window across pages", sliding_window=7),
    Case("window-past-context", _MIXED, "a window that hides nothing", sliding_window=100),
    Case("window-pair", _MIXED, "(left, right) as Gemma 4 passes it", sliding_window=(2, 0)),
    Case("window-freed-zeros", _MIXED, "entries left of the window are 0", sliding_window=3, free_left_of_window=True),
    Case(
        "window-freed-stale",
        _MIXED,
        "entries left of the window belong to another row",
        sliding_window=3,
        free_left_of_window=True,
        table="stale",
    ),
    Case("soft-cap", _MIXED, "logits_soft_cap ignored", logits_soft_cap=1.5),
    Case("sinks", _MIXED, "one sink logit per query head", sinks="heads"),
    Case("sinks-per-kv-head", _MIXED, "two sink logits for each query head of a kv head", sinks="groups"),
    Case(
        "all-options",
        _MIXED,
        "options together",
        sliding_window=7,
        logits_soft_cap=2.0,
        sinks="heads",
        softmax_scale=0.3,
    ),
    # Geometry.
    *(
        Case(f"head-dim-{d}", _PAIR, "lanes of a padded or packed head", head_dim=d, **_SMALL)
        for d in (64, 80, 96, 128, 192, 256)
    ),
    Case("head-dim-64-window-sinks", _PAIR, "gpt-oss", head_dim=64, sliding_window=4, sinks="heads", **_SMALL),
    Case("mqa", _PAIR, "one kv head", kv_heads=1, **_SMALL),
    Case("mha-5-heads", _PAIR, "odd number of heads, no groups", q_heads=5, kv_heads=5, **_SMALL),
    Case("gqa-9-3-head-dim-64", _PAIR, "SmolLM2", q_heads=9, kv_heads=3, head_dim=64, **_SMALL),
    Case(
        "gqa-9-3-head-dim-64-bfloat16",
        _PAIR,
        "a padding head fills the last 32 bits",
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        dtype="bfloat16",
        **_SMALL,
    ),
    Case("page-size-1", _rows((4, 1), (6, 3)), "a page for each token", page_size=1, **{**_SMALL, "pages_per_row": 8}),
    Case(
        "page-size-1-bfloat16",
        _rows((4, 1), (6, 3)),
        "a page for each token; v3 would need page_size % 2 == 0",
        page_size=1,
        dtype="bfloat16",
        versions=("v2",),
        **{**_SMALL, "pages_per_row": 8},
    ),
    Case("page-size-2", _PAIR, "small pages", page_size=2, **{**_SMALL, "pages_per_row": 8}),
    Case("page-size-16", _PAIR, "pages longer than the rows", page_size=16, **_SMALL),
    Case("page-size-128", _rows((129, 1), (140, 5)), "the host's default", page_size=128, **{**_SMALL, "num_pages": 8}),
    Case("page-size-256", _rows((257, 1), (140, 5)), "large pages", page_size=256, **{**_SMALL, "num_pages": 8}),
    Case(
        "table-1-page", _rows((9, 1), (13, 6)), "one entry in each row", page_size=16, **{**_SMALL, "pages_per_row": 1}
    ),
    Case("table-3-pages", _rows((9, 1), (12, 6)), "three entries in each row", **{**_SMALL, "pages_per_row": 3}),
    *(_wide(width) for width in (65, 100, 127, 200)),
    Case(
        "window-past-a-block",
        _rows((250, 1), (180, 5)),
        "whole blocks of keys lie outside the window",
        kv_heads=1,
        q_heads=2,
        page_size=2,
        pages_per_row=128,
        num_tokens=16,
        num_rows=4,
        num_pages=None,
        sliding_window=5,
    ),
    Case(
        "long-context",
        _rows((33000, 1), (40, 5)),
        "positions past 32768",
        q_heads=2,
        kv_heads=1,
        head_dim=64,
        page_size=256,
        pages_per_row=130,
        num_tokens=8,
        num_rows=2,
        num_pages=None,
    ),
    # Precision.
    Case("bfloat16", _PAIR, "", head_dim=128, dtype="bfloat16", **_SMALL),
    Case("bfloat16-head-dim-64", _PAIR, "", head_dim=64, dtype="bfloat16", **_SMALL),
    Case("float16", _PAIR, "", head_dim=64, dtype="float16", **_SMALL),
    Case(
        "bfloat16-long-sum",
        _rows((800, 1), (790, 4)),
        "sums over many keys are held in bfloat16",
        q_heads=2,
        kv_heads=1,
        dtype="bfloat16",
        pages_per_row=200,
        num_tokens=16,
        num_rows=4,
        num_pages=None,
        query_gain=0.3,
        value_mean=1.0,
    ),
    Case("float32-on-bfloat16-cache", _PAIR, "computed in the cache's precision", cache_dtype="bfloat16", **_SMALL),
    Case("bfloat16-on-float32-cache", _PAIR, "", dtype="bfloat16", cache_dtype="float32", **_SMALL),
    Case("float8-e4m3", _PAIR, "", head_dim=64, dtype="bfloat16", cache_dtype="float8_e4m3fn", **_SMALL),
    Case("float8-e4m3-head-dim-128", _PAIR, "", head_dim=128, dtype="bfloat16", cache_dtype="float8_e4m3fn", **_SMALL),
    Case("float8-e5m2", _PAIR, "", cache_dtype="float8_e5m2", **_SMALL),
    Case(
        "float8-saturates",
        _PAIR,
        "values past the largest finite float8 become NaN",
        cache_dtype="float8_e4m3fn",
        value_mean=500.0,
        **_SMALL,
    ),
    Case(
        "float8-scales",
        _PAIR,
        "a scale forgotten or applied twice",
        head_dim=64,
        dtype="bfloat16",
        cache_dtype="float8_e4m3fn",
        q_scale=0.5,
        k_scale=1.75,
        v_scale=0.25,
        **_SMALL,
    ),
    Case(
        "float32-scales", _PAIR, "a scale forgotten or applied twice", q_scale=0.5, k_scale=1.75, v_scale=0.25, **_SMALL
    ),
)


def case_named(name: str) -> Case:
    """The case of :data:`CASES` with this name."""
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"case: got {name!r}, wanted one of {', '.join(case.name for case in CASES)}")
