"""Calls one kernel on a batch: no EasyDeL, no selection, no mesh."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.request import describe
from easydel_ragged_plugin.select import why_not
from easydel_ragged_plugin.types import Attended, AttentionRequest, Kernel, Operands
from easydel_ragged_plugin.varying import vary, varying_axes

from .batches import Batch, Case, Version, build_batch

__all__ = ["KernelDriver", "KernelOutcome"]

MOST_MEMORY_MAPS = 30_000
"""Memory maps of the process above which compiled programs are dropped. XLA's compiler for CPUs keeps a hundred for a
program, five hundred for an interpreted kernel of a TPU, and dies at the limit: 65,530 on Linux, unless changed."""

AXIS = "shards"
"""The mesh axis of calls inside of ``jax.shard_map``."""


def memory_maps() -> int:
    """How many memory maps this process has; 0 where the system does not say: none but Linux limits them."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def _all_vary(program: Callable[[Any, Operands], Attended], cache: Any, rest: Operands) -> Attended:
    """``program``, each of whose results must vary over the axis, as all operands do."""
    attended = program(*vary((cache, rest), (cache, rest)))
    lacking = [name for name, each in attended._asdict().items() if AXIS not in varying_axes(each)]
    if attended.lse is None:
        lacking.remove("lse")
    if lacking:
        raise TypeError(
            f"forward: got {', '.join(lacking)} that vary over no mesh axis, wanted those of the operands. Inside of "
            "jax.shard_map use easydel_ragged_plugin.varying: result_type for the results of a call, vary for constants"
        )
    return attended


@dataclasses.dataclass(frozen=True)
class KernelOutcome:
    """What a call gave.

    Attributes:
        output: ``[tokens, q_heads, head_dim]``, in the dtype in which it came.
        pages: the cache after the call, ``[pages, page_size, ...]``.
        lse: ``[tokens, q_heads]``, or None where the kernel gave none.
    """

    output: np.ndarray
    pages: np.ndarray
    lse: np.ndarray | None


class KernelDriver:
    """Drives one kernel; keeps its compiled programs, so cases of equal shape compile once.

    A subclass serves another cache format: :meth:`cache_of`, :meth:`pages_of`, :meth:`with_new_tokens` and
    :meth:`expected_with_lse` are what depends on it. ``outcomes`` is for the caller, which looks at one run in several
    tests.

    Args:
        kernel: the kernel.
        version: which operation.
        config: the configuration that the kernel is given.
        compiler_options: of ``jax.jit``.
    """

    platform: str | None = None
    """The platform that the kernel is told; None for the one that the tests run on."""

    def __init__(
        self,
        kernel: Kernel,
        version: Version,
        config: RaggedPageConfig | None = None,
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        self.kernel = kernel
        self.version = version
        self.config = config or RaggedPageConfig()
        self.outcomes: dict[Case, Any] = {}
        self._compiler_options = compiler_options
        self._programs: dict[tuple[AttentionRequest, bool], Any] = {}
        self._missing: dict[Case, str | None] = {}

    def cache_of(self, batch: Batch, pages: np.ndarray) -> Any:
        """The cache that the kernel is given, from pages as a batch holds them or :meth:`pages_of` gave them."""
        return jnp.array(pages)

    def pages_of(self, cache: Any) -> np.ndarray:
        """A cache as one array ``[pages, page_size, ...]``, to compare and to reorder."""
        return np.asarray(cache)

    def with_new_tokens(self, batch: Batch, pages: np.ndarray) -> np.ndarray:
        """``pages`` with the new tokens of the batch's live rows, as the caller of v2 has written them."""
        pages, total = pages.copy(), int(batch.num_seqs[0])
        for row, (start, end) in enumerate(itertools.pairwise(batch.query_start_loc[: total + 1])):
            first = int(batch.context_lens[row]) - int(end - start)
            new = slice(int(start), int(end))
            reference.write_tokens(pages, batch.block_tables[row], first, batch.keys[new], batch.values[new])
        return pages

    def expected_with_lse(self, batch: Batch, outcome: KernelOutcome) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The oracle's output, pages and logsumexp for a call on ``batch``, which gave ``outcome``."""
        return batch.expected_with_lse()

    def expected(self, batch: Batch, outcome: KernelOutcome) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's output and pages."""
        output, pages, _ = self.expected_with_lse(batch, outcome)
        return output, pages

    def missing(self, case: Case) -> str | None:
        """Why the kernel does not take ``case``, in the words of selection, or None."""
        if case not in self._missing:
            batch = build_batch(case, self.version)
            try:
                request, _ = self._described(batch, batch.pages, False)
                self._missing[case] = why_not(self.kernel, request, self.config)
            except Unsupported as refusal:  # options that the cache format can't have
                self._missing[case] = str(refusal)
        return self._missing[case]

    def call(
        self, batch: Batch, *, host_writes: bool = False, return_lse: bool = False, in_shard_map: bool = False
    ) -> KernelOutcome:
        """Run the kernel on ``batch`` inside ``jax.jit``, with the cache donated.

        Args:
            batch: what to run. Its pages may be those of an earlier outcome.
            host_writes: for v2, write the batch's new tokens into its pages first, where they are not written yet.
            return_lse: whether to request the logsumexp.
            in_shard_map: run inside of ``jax.shard_map`` as well, with its defaults, over a mesh of one device. All
                operands vary over its axis, and so must all results.
        """
        pages = batch.pages
        if self.version == "v2":
            pages = self.with_new_tokens(batch, pages) if host_writes else batch.updated_pages
        request, operands = self._described(batch, pages, return_lse)
        key = (request, in_shard_map)
        if key not in self._programs:
            if memory_maps() > MOST_MEMORY_MAPS:
                jax.clear_caches()  # those of other drivers, too, which compile again when they are called again
            # v2 leaves the cache alone: nothing to donate it to.
            donated = 0 if self.version == "v3" else ()
            program = functools.partial(self._program, request)
            if in_shard_map:
                mesh = jax.sharding.Mesh(jax.devices()[:1], (AXIS,))
                along = jax.sharding.PartitionSpec(AXIS)
                program = jax.shard_map(
                    functools.partial(_all_vary, program), mesh=mesh, in_specs=along, out_specs=along
                )
            self._programs[key] = jax.jit(program, donate_argnums=donated, compiler_options=self._compiler_options)
        attended = self._programs[key](operands.pages, operands._replace(pages=None))
        lse = None if attended.lse is None else np.asarray(attended.lse)
        return KernelOutcome(np.asarray(attended.output), self.pages_of(attended.pages), lse)

    def types(self, batch: Batch, *, return_lse: bool = False) -> Attended:
        """The shapes and dtypes of what the kernel gives for ``batch``; nothing runs."""
        pages = batch.pages if self.version == "v3" else batch.updated_pages
        request, operands = self._described(batch, pages, return_lse)
        found: Attended = jax.eval_shape(
            functools.partial(self._program, request), operands.pages, operands._replace(pages=None)
        )
        return found

    def _program(self, request: AttentionRequest, cache: Any, rest: Operands) -> Attended:
        attended = self.kernel.forward(request, self.config, rest._replace(pages=cache))
        if not isinstance(attended, Attended):
            raise TypeError(f"forward: got {type(attended).__name__}, wanted easydel_ragged_plugin.types.Attended")
        return attended

    def _described(self, batch: Batch, pages: np.ndarray, return_lse: bool) -> tuple[AttentionRequest, Operands]:
        is_v3 = self.version == "v3"
        scales: dict[str, Any] = {name: jnp.asarray(scale) for name, scale in batch.scales.items()}
        return describe(
            self.version,
            jnp.asarray(batch.queries),
            jnp.asarray(batch.keys) if is_v3 else None,
            jnp.asarray(batch.values) if is_v3 else None,
            self.cache_of(batch, pages),
            jnp.asarray(batch.context_lens),
            jnp.asarray(batch.block_tables),
            jnp.asarray(batch.query_start_loc),
            jnp.asarray(batch.distribution if is_v3 else batch.num_seqs),
            None if batch.sinks is None else jnp.asarray(batch.sinks),
            batch.case.options,
            **scales,
            return_lse=return_lse,
            platform=self.platform,
        )
