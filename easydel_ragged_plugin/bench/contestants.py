"""Who takes part in a measurement, in one form: this package's kernels, EasyDeL's, and peers (see ``peers``)."""

from __future__ import annotations

from typing import Protocol

from easydel_ragged_plugin import select
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported

from .problem import Problem
from .timing import Candidate

__all__ = ["Contestant", "Entry", "OfKernel"]


class Entry(Protocol):
    """A contestant on one problem.

    Attributes:
        kernel: its name in reports.
        form: how it is called, where that is a choice; empty where it is not.
        checked_us: microseconds of the call that :meth:`check` made.
    """

    @property
    def kernel(self) -> str: ...

    @property
    def form(self) -> str: ...

    @property
    def checked_us(self) -> float: ...

    def check(self) -> tuple[float, bool]:
        """(the largest error, whether answer and cache are right), in samples of every row."""
        ...

    def choose(self) -> float:
        """Take the fastest way to call it; microseconds of a call that way."""
        ...

    def time_us(self, calls: int) -> float:
        """Mean microseconds of ``calls`` calls, after some that warm it up."""
        ...


class Contestant(Protocol):
    """Who is measured. A wrong answer ends the measurement of ``is_own``; of others it is noted.

    Attributes:
        label: its name in what the command says.
        is_own: whether it is this package's.
    """

    @property
    def label(self) -> str: ...

    @property
    def is_own(self) -> bool: ...

    def enter(self, problem: Problem) -> Entry:
        """Prepare its arrays.

        Raises:
            Unsupported: it can't be run here, or not on this problem; the text says why, and what to do.
        """
        ...


class OfKernel:
    """A kernel.

    Args:
        name: its name, or None for what selection chooses.
        is_named: whether somebody asked for it by this name: one that runs only by name might never end.
    """

    def __init__(self, name: str | None, *, is_named: bool = True) -> None:
        self._name = name
        self._is_named = is_named
        self.is_own = name is None or not select.kernels()[name].is_hosts
        self.label = (name or "this package") if self.is_own else "EasyDeL's kernel"

    def enter(self, problem: Problem) -> Candidate:
        """Compile it."""
        if self._name is not None and not self._is_named:
            kernel = select.kernels()[self._name]
            refusal = select.why_not(kernel, problem.request, RaggedPageConfig())
            reason = kernel.only_by_name(problem.request) if refusal is None else None
            if reason is not None:
                raise Unsupported(f"{self._name} runs only by name: {reason}. To time it, name it with --kernel.")
        return Candidate(problem, self._name)
