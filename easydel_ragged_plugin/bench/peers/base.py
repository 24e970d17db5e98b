"""What a peer is: attention of another project, with the cache in its own form, checked and timed as kernels are."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from easydel_ragged_plugin.bench.problem import Problem, check, every_row
from easydel_ragged_plugin.bench.timing import least_us, mean_us
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.types import AttentionRequest, Features

__all__ = ["Form", "Peer", "PeerEntry"]


class Form(abc.ABC):
    """One way to call a peer on one problem.

    Attributes:
        text: how it is called, and what is not counted.
    """

    text: str

    @abc.abstractmethod
    def run(self, calls: int) -> None:
        """Write the new tokens, where the operation writes, and attend, ``calls`` times."""

    @abc.abstractmethod
    def answer(self) -> np.ndarray:
        """``[tokens, q_heads, head_dim]`` of the last call, in any float dtype that holds it exactly."""

    @abc.abstractmethod
    def has_written(self) -> bool:
        """Whether the cache holds what it must after a call."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """PyTorch refuses arguments, and fails to get memory, with RuntimeError."""
    try:
        yield
    except NotImplementedError:  # Unsupported, too
        raise
    except RuntimeError as failure:
        raise Unsupported(str(failure)) from failure


class PeerEntry:
    """A peer on one problem: see :class:`..contestants.Entry`. The fastest of its forms is timed."""

    def __init__(self, peer: Peer, problem: Problem) -> None:
        self.kernel = peer.name
        self.checked_us = float("nan")
        self._problem = problem
        with _refusals():
            self._forms = list(peer.forms(problem))

    @property
    def form(self) -> str:
        """Of the fastest form, when :meth:`check` or :meth:`choose` has found it."""
        return self._forms[0].text

    def check(self) -> tuple[float, bool]:
        """Every form is compared with the same oracle as a kernel."""
        worst, right = 0.0, True
        pages = self._problem.updated_pages()
        taken = {}
        for form in self._forms:
            with _refusals():
                started = time.perf_counter()
                form.run(1)
                taken[form] = (time.perf_counter() - started) * 1e6
            error, each_right = check(self._problem, form.answer(), pages, every_row(self._problem.case))
            worst, right = max(worst, error), right and each_right and form.has_written()
        self._forms.sort(key=taken.__getitem__)
        self.checked_us = taken[self._forms[0]]
        return worst, right

    def choose(self) -> float:
        """The fastest form; the others' arrays are given back."""
        taken = least_us([form.run for form in self._forms])
        self._forms = [self._forms[taken.index(min(taken))]]
        return min(taken)

    def time_us(self, calls: int) -> float:
        """See :func:`..timing.mean_us`."""
        return mean_us(self._forms[0].run, calls)


class Peer(abc.ABC):
    """Attention of another project.

    Attributes:
        name: its name for ``--peer``, and in reports.
        label, color: in tables and figures.
        features: the options that it honors. A request for others is refused by name.
        dtypes: names of dtypes of queries and cache that it takes.
    """

    is_own = False
    is_hosts = False

    name: str
    label: str
    color: str
    features: Features
    dtypes: Sequence[str]

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why it can't be run in this environment, with what to install; or None. Imports nothing large."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What reports hold of it: ``available``, ``reason``, and further facts."""

    @abc.abstractmethod
    def forms(self, problem: Problem) -> Sequence[Form]:
        """The ways to call it, one at least, over arrays of its own."""

    def refuses(self, request: AttentionRequest) -> str | None:
        """Why it can't run ``request``, or None."""
        if request.query_dtype.name not in self.dtypes or request.cache_dtype != request.query_dtype:
            return (
                f"takes queries and cache of one type, {', '.join(self.dtypes)}; got {request.query_dtype.name} and "
                f"{request.cache_dtype.name}"
            )
        return self.features.lacks(request)

    def enter(self, problem: Problem) -> PeerEntry:
        """See :class:`..contestants.Contestant`."""
        request = problem.request
        if request.platform != "cpu":
            raise Unsupported(f"is measured on a CPU, and JAX runs on {request.platform} here")
        reason = self.unavailable() or self.refuses(request)
        if reason is not None:
            raise Unsupported(reason)
        return PeerEntry(self, problem)
