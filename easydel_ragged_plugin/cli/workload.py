"""Workloads on a GPU: their arrays, whether an answer is right, the least time they can take, and how long they take.

Shared by ``tune`` and ``benchmarks/gpu``. Pages are made on the device, where a cache may be larger than the host's
memory would like, and answers are checked in samples, against the float64 oracle.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from easydel_ragged_plugin import api, reference
from easydel_ragged_plugin.layout import page_shape
from easydel_ragged_plugin.testing.cases import Case, Row
from easydel_ragged_plugin.testing.tolerances import tolerance_for
from easydel_ragged_plugin.types import AttentionRequest, Operands

__all__ = ["Floor", "Problem", "Step", "build", "check", "floor", "public_call", "seconds_per_call", "workload"]

Version = Literal["v2", "v3"]

UNROLLED = 8
"""Calls in one trip of the timed loop, at most. Each has a block table of its own, over pages of its own."""

COLD_BYTES = 1 << 30
"""What the calls of one trip read together, so that none finds its pages in a cache. An H100 has one of 50 MB."""


def workload(name: str, rows: tuple[Row, ...], about: str = "", *, wider: int = 1, **fields: Any) -> Case:
    """A case with a token axis, rows and a block table that are just large enough; ``wider`` times the table."""
    defaults: dict[str, Any] = {"page_size": 128, "dtype": "bfloat16", "query_gain": 1.0}
    fields = {**defaults, **fields}
    width = wider * max(-(-row.context // fields["page_size"]) for row in rows)
    return Case(
        name,
        rows,
        about,
        num_tokens=sum(row.new for row in rows),
        num_rows=len(rows),
        num_pages=None,
        pages_per_row=width,
        **fields,
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One workload, ready to be called. ``tables`` are several block tables, each over pages of its own; ``operands``
    hold the first of them."""

    case: Case
    version: Version
    request: AttentionRequest
    operands: Operands
    tables: tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jax.random.normal(key, shape).astype(dtype)


def build(case: Case, version: Version, *, copies: int | None = None, platform: str | None = None) -> Problem:
    """Arrays for ``case``: random keys and values everywhere, so that reading a wrong slot shows.

    Args:
        copies: block tables; None for as many as defeat a GPU's cache.
    """
    copies = copies or max(1, min(UNROLLED, -(-COLD_BYTES // floor(case).read_bytes)))
    needed = [-(-row.context // case.page_size) for row in case.rows]
    num_pages = 1 + copies * sum(needed)
    order = 1 + np.random.default_rng(0).permutation(num_pages - 1)
    tables = []
    for copy in range(copies):
        table = np.zeros((case.num_rows, case.pages_per_row), np.int32)
        for row, (count, end) in enumerate(zip(needed, np.cumsum(needed), strict=True)):
            stop = copy * sum(needed) + end
            table[row, :count] = order[stop - count : stop]
        tables.append(jnp.asarray(table))
    starts = np.concatenate([[0], np.cumsum([row.new for row in case.rows])]).astype(np.int32)
    shape = page_shape(version, num_pages, case.page_size, case.kv_heads, case.head_dim, case.np_cache_dtype)
    seeds = jax.random.split(jax.random.key(0), 5)
    new_shape = (case.num_tokens, case.kv_heads, case.head_dim)
    is_v3 = version == "v3"
    operands = Operands(
        queries=_normal(seeds[0], (case.num_tokens, case.q_heads, case.head_dim), case.np_dtype),
        keys=_normal(seeds[1], new_shape, case.np_dtype) if is_v3 else None,
        values=_normal(seeds[2], new_shape, case.np_dtype) if is_v3 else None,
        pages=_normal(seeds[3], shape, case.np_cache_dtype),
        context_lens=jnp.array([row.context for row in case.rows], jnp.int32),
        block_tables=tables[0],
        query_start_loc=jnp.asarray(starts),
        distribution=jnp.array([sum(row.new == 1 for row in case.rows), *[len(case.rows)] * 2], jnp.int32),
        sinks=_normal(seeds[4], (case.q_heads,), np.dtype(np.float32)) if case.sinks else None,
    )
    request = api.explain(*public_call(version, operands), **case.options.keywords(), platform=platform).request
    return Problem(case, version, request, operands, tuple(tables))


def public_call(version: Version, operands: Operands) -> tuple[Any, ...]:
    """The public function of ``version`` and its positional arguments."""
    queries, keys, values, pages, *index, distribution, sinks = operands
    if version == "v2":
        return api.ragged_page_attention_v2, queries, pages, *index, distribution[2:], sinks
    return api.ragged_page_attention_v3, queries, keys, values, pages, *index, distribution, sinks


def _samples(case: Case) -> list[tuple[int, int, int]]:
    """(row, query token of the row, kv head): the longest row, the first and the last, at their ends and middles."""
    longest = max(range(len(case.rows)), key=lambda r: case.rows[r].context)
    rows = sorted({0, longest, len(case.rows) // 2, len(case.rows) - 1})
    return [
        (row, offset, (index + offset) % case.kv_heads)
        for index, row in enumerate(rows)
        for offset in sorted({0, case.rows[row].new // 2, case.rows[row].new - 1})
    ]


def check(problem: Problem, output: jax.Array, pages: jax.Array) -> tuple[float, bool]:
    """(largest deviation from the oracle, whether all samples are right), for a call with the first block table.

    For v3 the new keys and values must be in the pages, too, bit for bit.
    """
    case, layout, operands = problem.case, problem.request.layout, problem.operands
    group = case.q_heads // case.kv_heads
    bound = tolerance_for(case)
    slots = pages.reshape(pages.shape[0], layout.page_size, layout.token_stride)
    table = np.asarray(problem.tables[0])
    worst, right = 0.0, True
    for row, offset, head in _samples(case):
        length = case.rows[row]
        token = int(operands.query_start_loc[row]) + offset
        context = length.context - length.new + offset + 1
        first = max(0, context - (case.window or context)) // case.page_size
        ids = table[row, first : -(-context // case.page_size)]
        begin = head * layout.head_stride
        read = np.asarray(slots[ids, :, begin : begin + layout.value_offset + case.head_dim])
        pair = np.stack([read[..., : case.head_dim], read[..., layout.value_offset :]], axis=2)
        if operands.keys is not None and operands.values is not None:
            slot = pair.reshape(-1, 2, case.head_dim)[context - 1 - first * case.page_size]
            new = np.stack([np.asarray(each[token, head]) for each in (operands.keys, operands.values)])
            right &= slot.tobytes() == new.astype(slot.dtype).tobytes()
        heads = slice(head * group, head * group + 1)
        answer = reference.ragged_page_attention_v2(
            np.asarray(operands.queries[token : token + 1, heads]),
            pair,
            np.array([context - first * case.page_size]),
            np.arange(len(ids))[None],
            np.array([0, 1]),
            1,
            None if operands.sinks is None else np.asarray(operands.sinks[heads]),
            options=case.options,
        )
        difference = np.abs(np.asarray(output[token : token + 1, heads], np.float64) - answer)
        right &= bool((difference <= bound.atol + bound.rtol * np.abs(answer)).all())
        worst = max(worst, float(difference.max())) if np.isfinite(difference).all() else math.inf
    return worst, right


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a workload must at least move and compute."""

    read_bytes: int
    flops: float

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The least time at these rates: reading and computing overlap."""
        return max(self.read_bytes / bytes_per_s, self.flops / flops_per_s)


def floor(case: Case, rows: tuple[Row, ...] | None = None) -> Floor:
    """Keys and values that the masks need, once; queries and outputs; two products for each visible pair."""
    window, size = case.window, case.np_cache_dtype.itemsize
    keys, pairs, tokens = 0, 0, 0
    for row in case.rows if rows is None else rows:
        cached = row.context - row.new
        first = max(0, cached + 1 - window) if window else 0
        keys += row.context - first
        positions = np.arange(cached + 1, row.context + 1, dtype=np.int64)
        pairs += int(np.minimum(positions, window or row.context).sum())
        tokens += row.new
    read = 2 * keys * case.kv_heads * case.head_dim * size
    read += 2 * tokens * case.q_heads * case.head_dim * case.np_dtype.itemsize
    return Floor(read, 4.0 * pairs * case.q_heads * case.head_dim)


Step = Callable[[Operands], tuple[jax.Array, jax.Array]]
"""One call: its output, and the pages after it."""


def seconds_per_call(
    problem: Problem, step: Step, *, expected_s: float, repeats: int = 5, least_s: float = 0.05
) -> tuple[float, tuple[float, ...]]:
    """(median, all) seconds of a call, timed over many calls inside one compiled program.

    A call's output is the next one's queries, so none can be left out or moved. The program has a fixed number of
    trips: XLA asks the host nothing between them. Starting it costs some tens of microseconds, in ``least_s``.
    """
    trips = max(1, math.ceil(least_s / (expected_s * len(problem.tables))))

    def run(pages: jax.Array, operands: Operands, tables: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        def body(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            for table in tables:
                carry = step(operands._replace(queries=carry[0], pages=carry[1], block_tables=table))
            return carry

        return lax.fori_loop(0, trips, body, (operands.queries, pages))

    program = jax.jit(run, donate_argnums=0)
    shared = problem.operands._replace(pages=jnp.zeros(0))  # the pages travel alone, donated
    copied = jax.tree.map(jnp.copy, problem.operands.pages)  # of one array; of several for another cache's form
    pages = jax.block_until_ready(program(copied, shared, problem.tables))[1]
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        pages = jax.block_until_ready(program(pages, shared, problem.tables))[1]
        samples.append((time.perf_counter() - started) / (trips * len(problem.tables)))
    return statistics.median(samples), tuple(samples)
