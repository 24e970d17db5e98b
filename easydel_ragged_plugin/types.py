"""What one call of ragged page attention is, and what a kernel is.

:class:`AttentionRequest` holds everything that is static while tracing. It is hashable, so it can key caches and be a
static argument of ``jax.jit``. :class:`Operands` holds the arrays. A :class:`Kernel` turns both into :class:`Attended`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from .formats import PLAIN, CacheFormat
from .layout import PageLayout, Version
from .options import LARGEST_NUMBER, NO_OPTIONS, SMALLEST_NUMBER, Options

if TYPE_CHECKING:
    from .config import RaggedPageConfig

__all__ = [
    "AttentionRequest",
    "Attended",
    "Distribution",
    "Features",
    "Kernel",
    "Operands",
    "Prepared",
    "Trial",
    "Tuning",
    "Version",
]


SATURATED = 32.0
"""``tanh`` of it is 1 in float32, and in float64."""


class Distribution(NamedTuple):
    """The three row bounds of the v3 metadata, in the order in which they are stored.

    Versions of the host fill the first two differently (and not by position under data parallelism), so this package's
    own kernels read only ``total``.

    Attributes:
        decode_end: rows before it decode one token each.
        prefill_end: rows from ``decode_end`` up to it are chunked prefill; those from it up to ``total`` are mixed.
        total: rows in use; those from it on are dead.
    """

    decode_end: int
    prefill_end: int
    total: int


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """Static description of one call, after validation.

    Attributes:
        version: ``"v2"`` (pages are up to date) or ``"v3"`` (new keys and values are written first, unless the option
            ``update_pages`` is off).
        platform: ``"cpu"``, ``"gpu"``, ``"tpu"``, or another name that the caller gave.
        num_tokens: query tokens, padding included.
        num_q_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_q_heads``.
        head_dim: elements of one head.
        num_rows: rows of the block table.
        pages_per_row: entries of the block table in each row.
        num_pages: pages in the cache.
        query_dtype: dtype of queries and of the result.
        cache_dtype: dtype of what the cache stores.
        layout: strides of the cache; for a cache of codes, strides of the numbers that the codes represent.
        cache_format: how the cache is stored.
        options: the options as they were given. Kernels read those that have a default through the properties below.
        return_lse: whether the logsumexp of each token and query head is a further result.
    """

    version: Version
    platform: str
    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_rows: int
    pages_per_row: int
    num_pages: int
    query_dtype: np.dtype
    cache_dtype: np.dtype
    layout: PageLayout
    cache_format: CacheFormat = PLAIN
    options: Options = NO_OPTIONS
    return_lse: bool = False

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.layout.page_size

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """Factor on ``query . key`` of real queries and keys."""
        given = self.options.softmax_scale
        return self.head_dim**-0.5 if given is None else given

    @property
    def logits_scale(self) -> float:
        """Factor on ``query . key`` of keys as they are stored: ``softmax_scale`` and ``k_scale``, where that is a
        number. Where it is an array, :attr:`Operands.k_scale` is a further factor."""
        return self.softmax_scale * (self.options.k_scale or 1.0)

    @property
    def scale_over_cap(self) -> float | None:
        """``logits_scale`` divided by the soft cap; None where there is none, or float32 does not hold the quotient.

        Then logits must be kept within :data:`SATURATED` caps before they are divided: XLA makes one constant of two
        that follow one another, and 0 times infinity would be NaN.
        """
        cap = self.options.soft_cap
        if cap is None:
            return None
        quotient = self.logits_scale / cap
        return quotient if quotient == 0 or SMALLEST_NUMBER <= abs(quotient) <= LARGEST_NUMBER else None

    @property
    def v_scale(self) -> float:
        """Factor that turns stored values into real ones, where it is a number; else see :attr:`Operands.v_scale`."""
        return self.options.v_scale or 1.0

    @property
    def writes_pages(self) -> bool:
        """Whether the call writes new keys and values into the pages."""
        return self.version == "v3" and self.options.update_pages

    @property
    def compute_dtype(self) -> np.dtype:
        """dtype of the operands of the two products. Softmax statistics and sums are float32 at least in any case."""
        return self.options.compute_dtype or self.query_dtype

    def requested_options(self) -> tuple[str, ...]:
        """Names of the options that are set and can change a result: a kernel must declare each of them."""
        given = self.options.given(hints=False)
        if self.compute_dtype == self.query_dtype:
            given.pop("compute_dtype", None)
        return tuple(given)

    def describe(self) -> str:
        """One line for logs: the operation, its geometry and its options."""
        options = str(self.options)
        return " ".join(
            [
                f"{self.version} on {self.platform}: {self.num_tokens} tokens,",
                f"{self.num_q_heads}/{self.num_kv_heads} heads, head_dim {self.head_dim},",
                f"{self.num_rows} rows x {self.pages_per_row} pages of {self.page_size},",
                f"{self.query_dtype.name} queries, {self.cache_format.describe(self.cache_dtype)}",
                *([options] if options else []),
                *(["with logsumexp"] if self.return_lse else []),
            ]
        )


class Operands(NamedTuple):
    """The arrays of one call. Index arrays are int32.

    Inside of ``jax.shard_map`` all of them vary over the same mesh axes, and so must all results: see ``varying.py``.

    Attributes:
        queries: ``[tokens, q_heads, head_dim]``.
        keys, values: ``[tokens, kv_heads, head_dim]`` of the new tokens; None where ``request.writes_pages`` is false.
        pages: the cache, in the form of ``request.cache_format``.
        context_lens: ``[rows]`` tokens of each row, the new ones included.
        block_tables: ``[rows, pages_per_row]`` page ids. Entries past a context may hold any number.
        query_start_loc: ``[rows + 1]`` first token of each row; row r has the tokens ``[qsl[r], qsl[r + 1])``.
        distribution: ``[3]``, see :class:`Distribution`; for v2 all three entries are ``num_seqs``.
        sinks: ``[q_heads]`` logits, float32 at least, that are added to the softmax's sum and have no value; None for
            none. Each is -inf, or a number that float32 holds.
        k_scale, v_scale: ``[kv_heads]`` float32 factors that turn stored keys and values into real ones; None where
            the option is no array.
        work: what :meth:`Kernel.prepare` of the kernel that runs gave for the same request and index arrays; None where
            the call is to compute it.
    """

    queries: jax.Array
    keys: jax.Array | None
    values: jax.Array | None
    pages: Any
    context_lens: jax.Array
    block_tables: jax.Array
    query_start_loc: jax.Array
    distribution: jax.Array
    sinks: jax.Array | None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    work: Any = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["work", "index"], meta_fields=["kernel", "request", "config"]
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What calls over the same rows share: what a kernel computes of their index arrays. ``api.prepare`` makes it.

    It is a pytree: it may be made inside of ``jax.jit``, and a ``lax.scan`` over layers may close over it.

    Attributes:
        work: what :meth:`Kernel.prepare` gave: a pytree of arrays, or None for nothing.
        index: ``context_lens``, ``query_start_loc`` and ``distribution`` that it was made of.
        kernel: name of the kernel that it is for.
        request: the call that it is for, as one device has it.
        config: the configuration of that call.
    """

    work: Any
    index: tuple[jax.Array, jax.Array, jax.Array]
    kernel: str
    request: AttentionRequest
    config: Any  # RaggedPageConfig, which is imported for type checkers alone

    def differences(self, kernel: str, request: AttentionRequest, config: RaggedPageConfig) -> list[str]:
        """What another call has that this is not for, as text."""
        pairs = [("kernel", self.kernel, kernel), ("config", self.config, config)]
        names = (field.name for field in dataclasses.fields(AttentionRequest))
        pairs += [(name, getattr(self.request, name), getattr(request, name)) for name in names]
        return [f"{name} {mine} and not {other}" for name, mine, other in pairs if mine != other]


class Attended(NamedTuple):
    """The result of one call.

    Attributes:
        output: ``[tokens, q_heads, head_dim]`` in the queries' dtype. Tokens of no live row give zeros.
        pages: the cache after the call; unchanged where ``request.writes_pages`` is false.
        lse: ``[tokens, q_heads]`` float32: natural logarithm of the sum of ``exp(logit)`` over the keys that a query
            sees and its sinks; -inf for tokens of no live row. None unless ``request.return_lse``.
    """

    output: jax.Array
    pages: Any
    lse: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Features:
    """What a kernel honors. Selection refuses, by name, what a call requests and the kernel does not declare.

    Attributes:
        options: names of fields of :class:`~easydel_ragged_plugin.options.Options`; hints need no declaration.
        cache_formats: names of the cache formats that it reads.
        results: names of the results that it can give beside output and pages: ``"lse"``.
    """

    options: frozenset[str]
    cache_formats: frozenset[str] = frozenset({"plain"})
    results: frozenset[str] = frozenset()

    def lacks(self, request: AttentionRequest) -> str | None:
        """What ``request`` needs and is not declared, as text; or None."""
        if request.cache_format.name not in self.cache_formats:
            return f"takes no {request.cache_format.label} cache"
        missing = [name for name in request.requested_options() if name not in self.options]
        if missing:
            texts = {"scale_arrays": " or ".join(f"{name} as an array" for name in request.options.scale_arrays)}
            return f"takes no {', '.join(texts.get(name, name) for name in missing)}"
        if request.return_lse and "lse" not in self.results:
            return "gives no logsumexp (return_lse)"
        return None


class Tuning(Protocol):
    """What ``easydel-ragged tune`` can measure of a kernel.

    Attributes:
        parts: kinds of work that are tuned separately: ``"decode"``, ``"prefill"`` or both.
        interpreted: the kernel in an interpreter, which runs on any platform, for trying the command out; or None.
            Its own ``tuning()`` has few candidates, and saves nothing that a later process would take.
    """

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def interpreted(self) -> Kernel | None: ...

    def candidates(self, part: str, request: AttentionRequest) -> Iterator[Any]:
        """Objects of the kernel's ``config_type`` to measure, the one in use first."""
        ...

    def save(self, request: AttentionRequest, best: Mapping[str, Any], measured: Mapping[str, Any]) -> Path:
        """Store the best configuration of each part for later processes.

        Args:
            request: what was measured.
            best: an object of ``config_type`` for each part.
            measured: further values to store with it, JSON-able.

        Returns:
            The file that holds it.
        """
        ...


class Trial(Protocol):
    """What ``easydel-ragged tune`` tries of a kernel that has to pass a trial on a machine before it is chosen there.

    The kernel runs in a process of its own, with a time limit for each step: small cases of every option that it
    declares, compared with the oracle, then calls with long rows, timed in turns with another kernel. Where and how the
    outcome is kept is the kernel's; its :meth:`Kernel.only_by_name` reads it.

    Attributes:
        beside: the kernel that it must be faster than.
        interpreted: the kernel in an interpreter, which runs on any platform, for trying the command out; or None.
            Its own ``trial()`` saves nothing that a later process would take.
    """

    @property
    def beside(self) -> Kernel: ...

    @property
    def interpreted(self) -> Kernel | None: ...

    def save(self, request: AttentionRequest, reason: str | None, measured: Mapping[str, Any]) -> Path:
        """Keep the outcome for later processes, in place of an earlier one.

        Args:
            request: a call with the geometry and the dtypes that were tried.
            reason: why the kernel has not passed; None where it has.
            measured: further values to store with it, JSON-able.

        Returns:
            The file that holds it.
        """
        ...


class Kernel(abc.ABC):
    """One way to compute ragged page attention.

    A subclass defines ``name``, ``platforms``, ``technologies``, ``features``, :meth:`refuses` and :meth:`forward`.
    ``features`` and ``refuses`` touch no device. The object is part of the key of JAX's compiled calls, so there is one
    object for each kernel.

    Attributes:
        name: unique name, used by ``kernel=`` and by ``EASYDEL_RAGGED_KERNEL``.
        platforms: platforms that it runs on, for example ``frozenset({"cpu"})``.
        technologies: how it is made: ``"xla"``, ``"triton"``, ``"pallas"``, ``"native"``, ... A config whose
            ``platform`` is not ``"auto"`` allows only kernels that list it here.
        features: what it honors. Selection refuses the rest by name.
        custom_calls: names of the custom calls in its programs that ``jax.export`` does not allow by itself.
        label: its name in tables and figures; ``name`` where it is empty.
        color: its color in figures; None for any.
        is_hosts: whether it is the host's own kernel, which others are compared with.
        config_type: dataclass of the settings that no other kernel has; ``RaggedPageConfig.kernel_config`` takes one.
        improves_on: name of a kernel further down in the order that takes the same calls, and some more; None where
            there is none. With that one to run in its place a refusal is no loss, and is not logged.
    """

    name: str
    platforms: frozenset[str]
    technologies: frozenset[str]
    features: Features
    custom_calls: tuple[str, ...] = ()
    label: str = ""
    color: str | None = None
    is_hosts: bool = False
    config_type: type | None = None
    improves_on: str | None = None

    @abc.abstractmethod
    def refuses(self, request: AttentionRequest) -> str | None:
        """Why this kernel can't run ``request``, or None. Called when :attr:`features` has all that it requests."""

    @abc.abstractmethod
    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """Attend, after writing the new tokens where ``request.writes_pages``."""

    def only_by_name(self, request: AttentionRequest) -> str | None:
        """Why ``kernel="auto"`` leaves this kernel out, although it can run ``request``; or None.

        A kernel that is named runs all the same. Called where nothing is in the way of it: not the platform, not
        :attr:`features`, not :meth:`refuses`.
        """
        return None

    def prepare(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Any:
        """What :meth:`forward` computes of the index arrays alone, as a pytree of arrays; None where that is nothing.

        ``forward`` takes it from ``operands.work`` where a caller has computed it before, once for many layers. Only
        ``context_lens``, ``query_start_loc`` and ``distribution`` are read.
        """
        return None

    def register_ffi_targets(self) -> str | None:
        """Make known to XLA what :attr:`custom_calls` call, where JAX does not: a program that is loaded needs it.

        It starts no backend, and a second call has no effect. Returns why it can't be done, or None.
        """
        return None

    def settle(self, pages: jax.Array) -> None:  # noqa: B027
        """Finish what this kernel does to a cache while it serves, so that calls are as fast as they will be later.

        Benchmarks call it on the cache that they time. ``pages`` keeps its place and what it holds.
        """

    def fingerprint(self) -> str:
        """What this kernel's numbers and programs depend on in this process. Must be equal on all workers of a job."""
        facts = self.facts()
        if not facts["available"]:
            return f"not available: {facts['reason']}"
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def facts(self) -> dict[str, Any]:
        """What ``doctor`` and benchmarks show of it, JSON-able: ``available``, ``reason`` (None where it is available),
        and further facts. ``huge_pages`` is "used" where the kernel moves caches there."""
        return {"available": True, "reason": None}

    def notes(self, platform: str) -> tuple[str, ...]:
        """Notes of ``doctor`` for a user of ``platform``; none of them is an error."""
        return ()

    def tuning(self) -> Tuning | None:
        """What ``easydel-ragged tune`` can measure, or None."""
        return None

    def trial(self) -> Trial | None:
        """What ``easydel-ragged tune`` has to try before :meth:`only_by_name` lets it be chosen, or None."""
        return None
