"""The cases that ``easydel-ragged bench`` times."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.system import last_level_cache
from easydel_ragged_plugin.testing.batches import Case, Row

from .work import work

__all__ = ["BENCH_CASES", "CALL_BOUND", "SCALED", "by_name", "with_dtype", "workload"]


def workload(name: str, rows: tuple[Row, ...], about: str = "", **fields: Any) -> Case:
    """A case whose token axis, rows and cache are just large enough; so is its block table unless ``fields`` say.

    Other defaults: pages of 128, bfloat16, queries of size 1.
    """
    fields = {"page_size": 128, "dtype": "bfloat16", "query_gain": 1.0, **fields}
    fields.setdefault("pages_per_row", max(-(-row.context // fields["page_size"]) for row in rows))
    tokens = sum(row.new for row in rows)
    return Case(name, rows, about, num_tokens=tokens, num_rows=len(rows), num_pages=None, **fields)


def _decodes(*contexts: int) -> tuple[Row, ...]:
    return tuple(Row(context, 1) for context in contexts)


def _case(name: str, about: str, rows: tuple[Row, ...], **changes: Any) -> Case:
    """A workload of the common geometry: 32 q heads, 8 kv heads, head_dim 128, a block table for 8192 tokens."""
    fields = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "pages_per_row": 64, **changes}
    return workload(name, rows, about, **fields)


BENCH_CASES = (
    _case("decode-1x4k", "one request, 4096 tokens of context", _decodes(4096)),
    _case("decode-1x16k", "one request, 16384 tokens of context", _decodes(16384), pages_per_row=128),
    _case("decode-8x2k", "8 requests, 2048 tokens each", _decodes(*[2048] * 8)),
    _case("decode-32x2k", "32 requests, 2048 tokens each", _decodes(*[2048] * 32)),
    _case("decode-skewed", "one long request among short ones", _decodes(8000, 100, 300, 50, 900, 20, 700, 333)),
    _case(
        "decode-8x4k-window128",
        "sliding window of 128 on 4096 tokens",
        _decodes(*[4096] * 8),
        options=Options(sliding_window=128),
    ),
    _case("verify-8x4-on-2k", "8 requests, 4 new tokens each at 2048: speculative decoding", (Row(2048, 4),) * 8),
    _case("verify-4x8-on-2k", "4 requests, 8 new tokens each at 2048", (Row(2048, 8),) * 4),
    _case(
        "decode-16x4k-shared",
        "16 requests with 4096 tokens in common, in the same pages, and 128 of their own",
        _decodes(*[4224] * 16),
        shared_pages=32,
    ),
    _case(
        "decode-16x4k-apart",
        "the same lengths, and nothing in common",
        _decodes(*[4224] * 16),
    ),
    _case("prefill-1k", "one prompt of 1024 tokens", (Row(1024, 1024),)),
    _case("prefill-4k", "one prompt of 4096 tokens", (Row(4096, 4096),)),
    _case("prefill-256-on-4k", "a chunk of 256 tokens after 3840", (Row(4096, 256),)),
    _case(
        "mixed-7-decodes-256-prefill", "7 decodes at 1024, a prompt of 256", (*_decodes(*[1024] * 7), Row(1024, 256))
    ),
    _case(
        "decode-8x2k-d64",
        "head_dim 64, 9/3 heads",
        _decodes(*[2048] * 8),
        q_heads=9,
        kv_heads=3,
        head_dim=64,
    ),
    _case("decode-4x1k-mha", "a kv head for each q head", _decodes(*[1024] * 4), kv_heads=32),
    _case("decode-beyond-cache", "as many requests of 2048 tokens as no cache holds", _decodes(2048)),
    _case("decode-8x2k-wide-table", "decode-8x2k, table for 65536 tokens", _decodes(*[2048] * 8), pages_per_row=512),
    _case(
        "tiny",
        "2 requests, 16 tokens each: what a call costs",
        _decodes(16, 16),
        q_heads=4,
        kv_heads=2,
        head_dim=128,
        page_size=16,
        pages_per_row=4,
    ),
    _case(
        "smoke",
        "seconds, for trying the command out; not part of 'all'",
        (Row(40, 1), Row(24, 8)),
        q_heads=4,
        kv_heads=2,
        head_dim=32,
        page_size=16,
        pages_per_row=4,
    ),
)


SCALED = {"decode-8x2k-wide-table": "decode-8x2k"}
"""Cases that are the same work as another: both are timed in turns, and the ratio is shown."""

CALL_BOUND = frozenset({"tiny"})
"""Cases of so little work that the call itself is what counts."""

BEYOND_CACHE = "decode-beyond-cache"
"""The case whose number of requests depends on the machine: its keys and values fill 1.25 last-level caches."""


def by_name() -> dict[str, Case]:
    return {case.name: case for case in BENCH_CASES}


def with_dtype(case: Case, dtype: str) -> Case:
    """The case with queries and cache of ``dtype``, and in :data:`BEYOND_CACHE` as many rows as that takes."""
    case = dataclasses.replace(case, dtype=dtype)
    if case.name != BEYOND_CACHE:
        return case
    count = math.ceil(1.25 * (last_level_cache() or 1 << 26) / work(case).cache_bytes)
    return dataclasses.replace(case, rows=case.rows * count, num_tokens=count, num_rows=count)
