"""The named cases of ragged page attention: :data:`CASES`, the one table of the contracts and of this package's tests.

Cases of equal geometry have equal shapes, and so share one compiled program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from easydel_ragged_plugin.options import Options

from .batches import FAULTS, Batch, Case, Row, build_batch, spoil_row

__all__ = ["CASES", "FAULTS", "Batch", "Case", "Row", "build_batch", "case_named", "one_of_each", "spoil_row"]


def _rows(*pairs: tuple[int, int]) -> tuple[Row, ...]:
    return tuple(Row(context, new) for context, new in pairs)


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
    Case(
        "shared-prefix",
        _rows((100, 1), (81, 1), (97, 1), (84, 4), (112, 30), (96, 1)),
        "rows that begin with the same pages get each other's keys",
        page_size=16,
        num_tokens=40,
        shared_pages=5,
    ),
    # The same geometry: options.
    Case("softmax-scale", _MIXED, "softmax_scale is not head_dim ** -0.5", options=Options(softmax_scale=0.31)),
    Case("window-1", _MIXED, "each query sees itself alone", options=Options(sliding_window=1)),
    Case("window-3", _MIXED, "off by one, or measured from the row's last query", options=Options(sliding_window=3)),
    Case("window-7", _MIXED, "a window across pages", options=Options(sliding_window=7)),
    Case("window-past-context", _MIXED, "a window that hides nothing", options=Options(sliding_window=100)),
    Case("window-pair", _MIXED, "(left, right) as Gemma 4 passes it", options=Options(sliding_window=(2, 0))),
    Case(
        "window-freed-zeros",
        _MIXED,
        "entries left of the window are 0",
        options=Options(sliding_window=3),
        free_left_of_window=True,
    ),
    Case(
        "window-freed-stale",
        _MIXED,
        "entries left of the window belong to another row",
        options=Options(sliding_window=3),
        free_left_of_window=True,
        table="stale",
    ),
    Case("chunk-1", _MIXED, "each query sees itself alone", options=Options(attention_chunk_size=1)),
    Case("chunk-5", _MIXED, "chunks that begin inside of a page", options=Options(attention_chunk_size=5)),
    Case(
        "chunk-8",
        _MIXED,
        "chunks of whole pages: as a window, or from the row's last query",
        options=Options(attention_chunk_size=8),
    ),
    Case("chunk-past-context", _MIXED, "a chunk that hides nothing", options=Options(attention_chunk_size=100)),
    Case(
        "chunk-and-window",
        _MIXED,
        "both limits hold",
        options=Options(attention_chunk_size=8, sliding_window=5),
        table="stale",
        poison="nan",
    ),
    Case(
        "pages-as-they-are",
        _MIXED,
        "v3 writes, or reads keys and values, although it shares another layer's cache",
        options=Options(update_pages=False),
        table="stale",
        versions=("v3",),
    ),
    Case(
        "pages-as-they-are-bfloat16",
        _PAIR,
        "v3 writes, or reads keys and values, although it shares another layer's cache",
        head_dim=64,
        dtype="bfloat16",
        options=Options(update_pages=False),
        versions=("v3",),
        **_SMALL,
    ),
    Case("soft-cap", _MIXED, "logits_soft_cap ignored", options=Options(logits_soft_cap=1.5)),
    Case("sinks", _MIXED, "one sink logit per query head", sinks="heads"),
    Case("sinks-per-kv-head", _MIXED, "two sink logits for each query head of a kv head", sinks="groups"),
    Case(
        "all-options",
        _MIXED,
        "options together",
        options=Options(sliding_window=7, logits_soft_cap=2.0, softmax_scale=0.3),
        sinks="heads",
    ),
    Case(
        "all-options-in-chunks",
        _MIXED,
        "options together, those that the host does not pass among them",
        options=Options(sliding_window=7, attention_chunk_size=12, logits_soft_cap=2.0, softmax_scale=0.3, v_scale=0.5),
        sinks="heads",
    ),
    # Geometry.
    *(
        Case(f"head-dim-{d}", _PAIR, "lanes of a padded or packed head", head_dim=d, **_SMALL)
        for d in (64, 80, 96, 128, 192, 256)
    ),
    Case(
        "head-dim-64-window-sinks",
        _PAIR,
        "gpt-oss",
        head_dim=64,
        options=Options(sliding_window=4),
        sinks="heads",
        **_SMALL,
    ),
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
        options=Options(sliding_window=5),
    ),
    Case(
        "chunk-past-a-block",
        _rows((250, 1), (180, 5)),
        "whole blocks of keys lie before the chunk, and one row's queries in two chunks",
        kv_heads=1,
        q_heads=2,
        page_size=2,
        pages_per_row=128,
        num_tokens=16,
        num_rows=4,
        num_pages=None,
        options=Options(attention_chunk_size=178),
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
        "a scale forgotten or applied twice; one of queries, which cancels, applied at all",
        head_dim=64,
        dtype="bfloat16",
        cache_dtype="float8_e4m3fn",
        options=Options(q_scale=0.5, k_scale=1.75, v_scale=0.25),
        **_SMALL,
    ),
    Case(
        "float32-scales",
        _PAIR,
        "a scale forgotten or applied twice; one of queries, which cancels, applied at all",
        options=Options(q_scale=0.5, k_scale=1.75, v_scale=0.25),
        **_SMALL,
    ),
    Case(
        "scales-per-kv-head",
        _MIXED,
        "the scale of another kv head, or of the call's first one",
        options=Options(scale_arrays=("k_scale", "v_scale"), logits_soft_cap=2.0),
        sinks="heads",
    ),
    Case(
        "float8-scales-per-kv-head",
        _PAIR,
        "a number and an array",
        head_dim=64,
        dtype="bfloat16",
        cache_dtype="float8_e4m3fn",
        options=Options(v_scale=0.25, scale_arrays=("k_scale",)),
        **_SMALL,
    ),
)


def case_named(name: str) -> Case:
    """The case of :data:`CASES` with this name.

    Args:
        name: such as ``"mixed"``.

    Raises:
        ValueError: there is no such case. The text has all names.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"case: got {name!r}, wanted one of {', '.join(case.name for case in CASES)}")


def one_of_each(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The first case of each set of options and dtypes, for where each program takes long to compile."""
    first: dict[Any, Case] = {}
    for case in cases:
        first.setdefault((case.options, case.sinks, case.dtype, case.np_cache_dtype.name), case)
    return tuple(first.values())
