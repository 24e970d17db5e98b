"""The calls that ``easydel-ragged bench`` makes: the arrays of a case, and a compiled, checkable call on them."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.layout import page_shape
from easydel_ragged_plugin.testing.batches import Case, Version

__all__ = ["Candidate", "Problem", "build"]


@dataclasses.dataclass
class Problem:
    """Arrays of one case. Pages hold random numbers everywhere, so reading a wrong slot shows as an error."""

    case: Case
    version: Version
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    pages: np.ndarray
    updated: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    query_start_loc: np.ndarray

    @property
    def distribution(self) -> np.ndarray:
        """Decode rows come first in every case."""
        decodes = sum(row.new == 1 for row in self.case.rows)
        return np.array([decodes, decodes, len(self.case.rows)], np.int32)


def build(case: Case, version: Version) -> Problem:
    random = np.random.default_rng(0)
    dtype = case.np_dtype

    def normal(*shape: int) -> np.ndarray:
        # A period prime to every stride here: values repeat, but never in step with pages or heads.
        period = random.standard_normal(min(math.prod(shape), 1_000_003)).astype(dtype)
        return np.resize(period, shape)

    needed = [-(-row.context // case.page_size) for row in case.rows]
    num_pages = 1 + sum(needed)
    order = 1 + random.permutation(num_pages - 1)
    tables = np.zeros((len(case.rows), case.pages_per_row), np.int32)
    for index, (count, end) in enumerate(zip(needed, np.cumsum(needed), strict=True)):
        tables[index, :count] = order[end - count : end]
    starts = np.concatenate([[0], np.cumsum([row.new for row in case.rows])]).astype(np.int32)
    keys = normal(case.num_tokens, case.kv_heads, case.head_dim)
    values = normal(case.num_tokens, case.kv_heads, case.head_dim)
    pages = normal(*page_shape(version, num_pages, case.page_size, case.kv_heads, case.head_dim, dtype))
    updated = pages.copy()
    for index, row in enumerate(case.rows):
        new = slice(starts[index], starts[index + 1])
        reference.write_tokens(updated, tables[index], row.context - row.new, keys[new], values[new])
    return Problem(
        case=case,
        version=version,
        queries=normal(case.num_tokens, case.q_heads, case.head_dim),
        keys=keys,
        values=values,
        pages=pages,
        updated=updated,
        context_lens=np.array([row.context for row in case.rows], np.int32),
        block_tables=tables,
        query_start_loc=starts,
    )


def _sampled_answer(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, q heads, oracle's answer ``[tokens, heads, head_dim]``) for a few queries of every row.

    Each sampled query becomes a row of its own whose context ends at it, so the oracle does no more than asked for.
    """
    case = problem.case
    tokens, contexts, rows = [], [], []
    for r, row in enumerate(case.rows):
        for offset in sorted({0, row.new // 2, row.new - 1}):
            tokens.append(int(problem.query_start_loc[r]) + offset)
            contexts.append(row.context - row.new + offset + 1)
            rows.append(r)
    heads = np.arange(case.kv_heads) * (case.q_heads // case.kv_heads)
    queries = problem.queries[tokens][:, heads]
    index = (np.array(contexts), problem.block_tables[rows], np.arange(len(tokens) + 1))
    options = case.options.keywords()
    if problem.version == "v2":
        answer = reference.ragged_page_attention_v2(queries, problem.updated, *index, len(tokens), **options)
    else:
        new = (problem.keys[tokens], problem.values[tokens])  # written again where they are already
        distribution = np.array([0, 0, len(tokens)])
        answer, _ = reference.ragged_page_attention_v3(queries, *new, problem.updated, *index, distribution, **options)
    return np.array(tokens), heads, answer


class Candidate:
    """One kernel on one problem, its pages threaded through and donated, in two ways.

    As a program of one call, and as a program that makes any number of calls, as the layers of a model do. The second
    leaves out what JAX needs to start a program, but some kernels have their pages copied inside a loop. What is timed
    is the way that suits the kernel: see :meth:`choose`. In a loop each call's result is the next one's queries, so
    that none can be left out or moved.
    """

    def __init__(self, problem: Problem, config: str | None) -> None:
        import jax
        import jax.numpy as jnp

        from easydel_ragged_plugin import api

        self._problem = problem
        is_v3 = problem.version == "v3"
        index = [jnp.asarray(a) for a in (problem.context_lens, problem.block_tables, problem.query_start_loc)]
        options = problem.case.options.keywords()
        new: tuple[Any, ...]
        if is_v3:
            new = (jnp.asarray(problem.keys), jnp.asarray(problem.values))
            rest = (*index, jnp.asarray(problem.distribution))
        else:
            new = ()
            rest = (*index, jnp.asarray([len(problem.case.rows)], jnp.int32))
        self._pages = jnp.array(problem.pages if is_v3 else problem.updated)  # a copy, because it is donated
        queries = jnp.asarray(problem.queries)

        def call(pages: Any, queries: Any, new: Any, rest: Any) -> Any:
            arguments: Any = (queries, *new, pages, *rest)
            if is_v3:
                return api.ragged_page_attention_v3(*arguments, config=config, **options)
            return api.ragged_page_attention_v2(*arguments, config=config, **options), pages

        def program(calls: Any, pages: Any, queries: Any, new: Any, rest: Any) -> Any:
            return jax.lax.fori_loop(0, calls, lambda _, carry: call(carry[1], carry[0], new, rest), (queries, pages))

        function = api.ragged_page_attention_v3 if is_v3 else api.ragged_page_attention_v2
        arguments: Any = (queries, *new, self._pages, *rest)
        self.kernel = str(api.explain(function, *arguments, config=config, **options).kernel)
        self._arguments = (queries, new, rest)
        self._once = jax.jit(call, donate_argnums=0).lower(self._pages, *self._arguments).compile()
        self._many = jax.jit(program, donate_argnums=1).lower(np.int32(1), self._pages, *self._arguments).compile()
        self.in_one_program = True
        """Whether :meth:`time_us` makes its calls in one program."""
        self.checked_us = math.nan
        """Microseconds of the call that :meth:`check` made."""

    def run(self, calls: int) -> Any:
        """The result of the last of ``calls`` calls in one program, or of the same call as often."""
        if self.in_one_program:
            output, self._pages = self._many(np.int32(calls), self._pages, *self._arguments)
            return output.block_until_ready()
        for _ in range(calls):
            output, self._pages = self._once(self._pages, *self._arguments)
            output.block_until_ready()  # else JAX's threads for waiting calls compete with the kernel's
        return output

    def choose(self) -> float:
        """Take the faster way; microseconds of a call that way."""
        taken = {}
        for self.in_one_program in (True, False):
            calls = 1 if self.checked_us > 50_000 else 4
            self.run(1)
            taken[self.in_one_program] = self.time_us(calls)
        self.in_one_program = taken[True] <= taken[False]
        return taken[self.in_one_program]

    def check(self) -> float:
        """Largest deviation from the oracle over the sampled queries; infinite when v3's pages are not right."""
        tokens, heads, expected = _sampled_answer(self._problem)
        worst = 0.0
        for self.in_one_program in (False, True):
            started = time.perf_counter()
            answer = self.run(1)
            self.checked_us = (time.perf_counter() - started) * 1e6
            output = np.asarray(answer).astype(np.float64)
            if self._problem.version == "v3":
                written = np.asarray(self._pages)
                if written.tobytes() != self._problem.updated.tobytes():
                    return math.inf
            error = np.abs(output[tokens][:, heads] - expected).max()
            worst = max(worst, float(error) if np.isfinite(error) else math.inf)
        return worst

    def time_us(self, calls: int) -> float:
        """Mean microseconds of ``calls`` calls, after some that bring the pages to where such calls find them."""
        if calls > 1:
            self.run(1 + calls // 2)  # a last-level cache takes several rounds to settle
        started = time.perf_counter()
        self.run(calls)
        return (time.perf_counter() - started) / calls * 1e6
