"""One case, ready to be called: its arrays, on the device, and whether an answer to it is right."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin import api, reference
from easydel_ragged_plugin.layout import page_shape
from easydel_ragged_plugin.testing.batches import Case, Version, place
from easydel_ragged_plugin.testing.tolerances import tolerance_for
from easydel_ragged_plugin.types import AttentionRequest, Operands

__all__ = ["Problem", "Sample", "build", "check", "every_row", "few_rows", "public_call"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case and its arrays.

    Attributes:
        case, version: what was built.
        request: the static description of a call with these arrays.
        operands: the arrays of a call with the first block table. Pages hold what they hold before the call for v3,
            and for v2, which writes nothing, random numbers for the new tokens, too.
        tables: block tables, each over pages of its own.
    """

    case: Case
    version: Version
    request: AttentionRequest
    operands: Operands
    tables: tuple[jax.Array, ...]

    def updated_pages(self) -> np.ndarray:
        """The pages after a right call with the first block table, byte for byte."""
        pages = np.array(self.operands.pages)
        if self.operands.keys is None or self.operands.values is None:
            return pages
        keys, values = np.asarray(self.operands.keys), np.asarray(self.operands.values)
        table, starts = np.asarray(self.tables[0]), np.asarray(self.operands.query_start_loc)
        for index, row in enumerate(self.case.rows):
            new = slice(starts[index], starts[index + 1])
            reference.write_tokens(pages, table[index], row.context - row.new, keys[new], values[new])
        return pages

    def gather(self, row: int, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a row in the order of its tokens, each ``[context, kv_heads, head_dim]``."""
        layout, context = self.request.layout, self.case.rows[row].context
        ids = np.asarray(self.tables[0])[row, : -(-context // layout.page_size)]
        tokens = pages.reshape(len(pages), layout.page_size, layout.token_stride)[ids]
        used = tokens.reshape(-1, layout.token_stride)[:context, : layout.num_kv_heads * layout.head_stride]
        heads = used.reshape(context, layout.num_kv_heads, layout.head_stride)
        values = heads[..., layout.value_offset : layout.value_offset + layout.head_dim]
        return heads[..., : layout.head_dim], values


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    # A period prime to every stride here: numbers repeat, but never in step with pages or heads.
    size = math.prod(shape)
    period = jax.random.normal(key, (min(size, 1_000_003),)).astype(dtype)
    return jnp.tile(period, -(-size // len(period)))[:size].reshape(shape)


def build(case: Case, version: Version, *, copies: int = 1, platform: str | None = None) -> Problem:
    """Arrays for ``case``: random keys and values in every slot, so that reading a wrong one shows.

    Args:
        case: what to build. Its options for hostile batches (what dead slots and unused table entries hold) are not
            looked at.
        version: layout of the pages, and which operation is called.
        copies: how many block tables, over disjoint pages.
        platform: see the public functions.
    """
    placement = place(case, np.random.default_rng(0), copies)
    tables = tuple(map(jnp.asarray, placement.block_tables))
    shape = page_shape(version, placement.num_pages, case.page_size, case.kv_heads, case.head_dim, case.np_cache_dtype)
    seeds = jax.random.split(jax.random.key(0), 5)
    new_shape = (case.num_tokens, case.kv_heads, case.head_dim)
    is_v3 = version == "v3"
    operands = Operands(
        queries=_normal(seeds[0], (case.num_tokens, case.q_heads, case.head_dim), case.np_dtype),
        keys=_normal(seeds[1], new_shape, case.np_dtype) if is_v3 else None,
        values=_normal(seeds[2], new_shape, case.np_dtype) if is_v3 else None,
        pages=_normal(seeds[3], shape, case.np_cache_dtype),
        context_lens=jnp.asarray(placement.context_lens),
        block_tables=tables[0],
        query_start_loc=jnp.asarray(placement.query_start_loc),
        distribution=jnp.asarray(placement.distribution),
        sinks=_normal(seeds[4], (case.q_heads,), np.dtype(np.float32)) if case.sinks else None,
    )
    request = api.explain(*public_call(version, operands), **case.options.keywords(), platform=platform).request
    return Problem(case, version, request, operands, tables)


def public_call(version: Version, operands: Operands) -> tuple[Any, ...]:
    """The public function of ``version`` and its positional arguments."""
    queries, keys, values, pages, *index, distribution, sinks = operands[:9]  # no case has scales as arrays
    if version == "v2":
        return api.ragged_page_attention_v2, queries, pages, *index, distribution[2:], sinks
    return api.ragged_page_attention_v3, queries, keys, values, pages, *index, distribution, sinks


class Sample(NamedTuple):
    """One query head's answer to one query token: the first query head of ``kv_head``."""

    row: int
    offset: int
    kv_head: int


def _offsets(case: Case, row: int) -> list[int]:
    """A row's first query token, its middle one and its last."""
    new = case.rows[row].new
    return sorted({0, new // 2, new - 1})


def every_row(case: Case) -> Iterator[Sample]:
    """Some tokens of every row, for every kv head."""
    for row in range(len(case.rows)):
        for offset in _offsets(case, row):
            yield from (Sample(row, offset, head) for head in range(case.kv_heads))


def few_rows(case: Case) -> Iterator[Sample]:
    """Some tokens of the longest row, the first, a middle one and the last, for one kv head each."""
    longest = max(range(len(case.rows)), key=lambda r: case.rows[r].context)
    for index, row in enumerate(sorted({0, longest, len(case.rows) // 2, len(case.rows) - 1})):
        yield from (Sample(row, offset, (index + offset) % case.kv_heads) for offset in _offsets(case, row))


def check(problem: Problem, output: Any, pages: Any, samples: Iterator[Sample]) -> tuple[float, bool]:
    """Compare an answer with the oracle, in samples. For v3 their new keys and values must be in the pages, too.

    Args:
        problem: what was called, with its first block table.
        output, pages: what the call returned.
        samples: where to look.

    Returns:
        The largest deviation (infinite where the answer is not finite), and whether all samples are right.
    """
    case, layout, operands = problem.case, problem.request.layout, problem.operands
    group = case.q_heads // case.kv_heads
    bound = tolerance_for(case)
    slots = pages.reshape(pages.shape[0], layout.page_size, layout.token_stride)
    table, starts = np.asarray(problem.tables[0]), np.asarray(operands.query_start_loc)
    queries, keys, values, sinks = (
        None if each is None else np.asarray(each)
        for each in (operands.queries, operands.keys, operands.values, operands.sinks)
    )
    assert queries is not None
    answers = np.asarray(output)
    worst, right = 0.0, True
    for row, offset, head in samples:
        length = case.rows[row]
        token = int(starts[row]) + offset
        context = length.context - length.new + offset + 1
        first = max(0, context - (case.window or context)) // case.page_size
        ids = table[row, first : -(-context // case.page_size)]
        begin = head * layout.head_stride
        read = np.asarray(slots[ids, :, begin : begin + layout.value_offset + case.head_dim])
        pair = np.stack([read[..., : case.head_dim], read[..., layout.value_offset :]], axis=2)
        if keys is not None and values is not None:
            slot = pair.reshape(-1, 2, case.head_dim)[context - 1 - first * case.page_size]
            new = np.stack([keys[token, head], values[token, head]])
            right &= slot.tobytes() == new.astype(slot.dtype).tobytes()
        heads = slice(head * group, head * group + 1)
        answer = reference.ragged_page_attention_v2(
            queries[token : token + 1, heads],
            pair,
            np.array([context - first * case.page_size]),
            np.arange(len(ids))[None],
            np.array([0, 1]),
            1,
            None if sinks is None else sinks[heads],
            options=case.options,
        )
        difference = np.abs(answers[token : token + 1, heads].astype(np.float64) - answer)
        right &= bool((difference <= bound.atol + bound.rtol * np.abs(answer)).all())
        worst = max(worst, float(difference.max())) if np.isfinite(difference).all() else math.inf
    return worst, right
