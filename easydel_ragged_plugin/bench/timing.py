"""How long a call takes: of a public function, as users call it, or of a kernel alone over pages that no cache has."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from easydel_ragged_plugin import api, select
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.testing.batches import Case
from easydel_ragged_plugin.types import Kernel, Operands

from .problem import Problem, check, every_row, public_call
from .work import work

__all__ = [
    "LEAST_GAIN",
    "Candidate",
    "Step",
    "copies_beyond_cache",
    "least_us",
    "mean_us",
    "seconds_per_call",
    "step_of",
    "timer",
]

LEAST_GAIN = 0.98
"""What takes the place of something else needs no more than this part of its time."""


class Candidate:
    """One kernel on one problem, its pages threaded through and donated, in two ways.

    As a program of one call, and as a program that makes any number of calls, as the layers of a model do. The second
    leaves out what JAX needs to start a program, but some kernels have their pages copied inside a loop. What is timed
    is the way that suits the kernel: see :meth:`choose`. In a loop each call's result is the next one's queries, so
    that none can be left out or moved.

    Args:
        problem: what to call.
        config: a kernel's name, or None for what selection chooses.
    """

    def __init__(self, problem: Problem, config: str | None) -> None:
        self._problem = problem
        version, options = problem.version, problem.case.options.keywords()
        self._pages = jnp.array(problem.operands.pages)  # a copy, because it is donated
        self._operands = problem.operands._replace(pages=jnp.zeros(0))  # the pages travel alone

        def call(pages: Any, operands: Operands) -> Any:
            function, *arguments = public_call(version, operands._replace(pages=pages))
            result = function(*arguments, config=config, **options)
            return result if version == "v3" else (result, pages)

        def program(calls: Any, pages: Any, operands: Operands) -> Any:
            def body(_: Any, carry: Any) -> Any:
                return call(carry[1], operands._replace(queries=carry[0]))

            return lax.fori_loop(0, calls, body, (operands.queries, pages))

        chosen = api.explain(*public_call(version, problem.operands), config=config, **options)
        self.kernel = chosen.kernel
        self._once = jax.jit(call, donate_argnums=0).lower(self._pages, self._operands).compile()
        self._many = jax.jit(program, donate_argnums=1).lower(np.int32(1), self._pages, self._operands).compile()
        self.form = ""
        self.in_one_program = True
        """Whether :meth:`time_us` makes its calls in one program."""
        self.checked_us = math.nan
        """Microseconds of the call that :meth:`check` made."""

    def run(self, calls: int) -> Any:
        """The result of the last of ``calls`` calls in one program, or of the same call as often."""
        return self._run(self.in_one_program, calls)

    def _run(self, in_one_program: bool, calls: int) -> Any:
        if in_one_program:
            output, self._pages = self._many(np.int32(calls), self._pages, self._operands)
            return output.block_until_ready()
        for _ in range(calls):
            output, self._pages = self._once(self._pages, self._operands)
            output.block_until_ready()  # else JAX's threads for waiting calls compete with the kernel's
        return output

    def choose(self) -> float:
        """Take the faster way; microseconds of a call that way."""
        together, one_by_one = least_us([partial(self._run, True), partial(self._run, False)])
        self.in_one_program = together <= one_by_one
        return min(together, one_by_one)

    def check(self) -> tuple[float, bool]:
        """See :func:`.problem.check`; in samples of every row, both ways. v3's pages are compared byte for byte.

        The kernel settles them then, so that what is timed is what a server has after some time.
        """
        worst, right = 0.0, True
        expected = self._problem.updated_pages()
        for self.in_one_program in (False, True):
            started = time.perf_counter()
            output = self.run(1)
            self.checked_us = (time.perf_counter() - started) * 1e6
            pages = np.asarray(self._pages)
            if not np.array_equal(pages.view(np.uint8), expected.view(np.uint8)):
                return math.inf, False
            error, each_right = check(self._problem, output, pages, every_row(self._problem.case))
            worst, right = max(worst, error), right and each_right
        select.kernels()[self.kernel].settle(self._pages)
        return worst, right

    def time_us(self, calls: int) -> float:
        """See :func:`mean_us`."""
        return mean_us(self.run, calls)


def mean_us(run: Callable[[int], object], calls: int) -> float:
    """Mean microseconds of ``calls`` calls, after some that bring the pages to where such calls find them.

    Args:
        run: makes as many calls as its argument says, and waits for them.
        calls: how many to time.
    """
    if calls > 1:
        run(1 + calls // 2)  # a last-level cache takes several rounds to settle
    started = time.perf_counter()
    run(calls)
    return (time.perf_counter() - started) / calls * 1e6


def least_us(ways: Sequence[Callable[[int], object]]) -> list[float]:
    """Microseconds of a call in each way: the least of three turns, for a busy moment makes none faster.

    A turn takes about 20 ms, among which starting the calls does not count. There is one turn where a call takes more.

    Args:
        ways: each makes as many calls as its argument says, and waits for them.
    """
    least = [math.inf] * len(ways)
    for _ in range(3):
        for i, run in enumerate(ways):
            calls = max(1, min(200, round(20_000 / mean_us(run, 1))))
            least[i] = min(least[i], mean_us(run, calls))
        if min(least) > 20_000:
            break
    return least


Step = Callable[[Operands], tuple[jax.Array, jax.Array]]
"""One call: its output, and the pages after it."""


def step_of(kernel: Kernel, problem: Problem, config: RaggedPageConfig) -> Step:
    """A call of ``kernel`` alone on ``problem``."""

    def step(operands: Operands) -> tuple[jax.Array, jax.Array]:
        attended = kernel.forward(problem.request, config, operands)
        return attended.output, attended.pages

    return step


UNROLLED = 8
"""Calls in one trip of the loop of :func:`timer`, at most. Each has a block table of its own."""

COLD_BYTES = 1 << 30
"""What the calls of one trip read together, so that none finds its pages in a cache. An H100 has one of 50 MB."""


def copies_beyond_cache(case: Case) -> int:
    """Block tables over disjoint pages that a GPU's cache does not hold together."""
    return max(1, min(UNROLLED, -(-COLD_BYTES // work(case).moved_bytes)))


def timer(problem: Problem, step: Step, *, expected_s: float, least_s: float = 0.05) -> Callable[[], float]:
    """A function that gives seconds of a call, each time anew: a mean over many calls inside one compiled program.

    A call's output is the next one's queries, so none can be left out or moved. The program has a fixed number of
    trips, so that XLA need not wait for the host between them. Starting it costs tens of microseconds in ``least_s``.
    It has been compiled, and has run once.

    Args:
        problem: what is called, with each of its block tables in turn.
        step: the call.
        expected_s: about how long a call takes, in seconds.
        least_s: how long a run of the program should take, in seconds.
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

    def seconds() -> float:
        nonlocal pages
        started = time.perf_counter()
        pages = jax.block_until_ready(program(pages, shared, problem.tables))[1]
        return (time.perf_counter() - started) / (trips * len(problem.tables))

    return seconds


def seconds_per_call(
    problem: Problem, step: Step, *, expected_s: float, repeats: int = 5, least_s: float = 0.05
) -> tuple[float, tuple[float, ...]]:
    """(median, all) of ``repeats`` times that :func:`timer` gives."""
    seconds = timer(problem, step, expected_s=expected_s, least_s=least_s)
    samples = tuple(seconds() for _ in range(repeats))
    return statistics.median(samples), samples
