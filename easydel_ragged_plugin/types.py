"""What one call of ragged page attention is, and what a kernel is.

:class:`AttentionRequest` holds everything that is known while tracing. It is hashable, so it can key
caches and travel through ``jax.jit`` as a static value. :class:`Operands` holds the arrays. A :class:`Kernel` turns
both into :class:`Attended`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .formats import PLAIN, CacheFormat
from .layout import PageLayout, Version
from .options import NO_OPTIONS, Options

if TYPE_CHECKING:
    import jax

    from .config import RaggedPageConfig

__all__ = ["AttentionRequest", "Attended", "Distribution", "Features", "Kernel", "Operands", "Tuning", "Version"]


class Distribution(NamedTuple):
    """The three row bounds of the v3 metadata, in the order they are stored.

    Rows ``[0, decode_end)`` decode one token each, ``[decode_end, prefill_end)`` are chunked prefill,
    ``[prefill_end, total)`` are mixed, rows ``>= total`` are dead. Hosts fill the first two differently
    (and not by position under data parallelism), so this package's own kernels read ``total`` alone.
    """

    decode_end: int
    prefill_end: int
    total: int


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """Static description of one call, after validation.

    Attributes:
        version: ``"v2"`` (pages are up to date) or ``"v3"`` (new keys and values are written first).
        platform: ``"cpu"``, ``"gpu"``, ``"tpu"``, or the name that the host gave.
        num_tokens: query tokens, padding included.
        num_q_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_q_heads``.
        head_dim: elements of one head.
        num_rows: rows (requests) of the block table.
        pages_per_row: entries of the block table in each row.
        num_pages: pages in the cache.
        query_dtype: dtype of queries and of the result.
        cache_dtype: dtype of what the cache stores.
        layout: strides of the cache; of a coded one, strides of the numbers that the codes stand for.
        cache_format: how the cache is stored.
        options: the options as they were given. Kernels read those that have a default through the properties below.
        return_lse: whether the logsumexp of each token and query head is a result, too.
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
        """Factor on ``query . key`` of queries and keys as they are stored: ``softmax_scale`` and their scales."""
        return self.softmax_scale * (self.options.q_scale or 1.0) * (self.options.k_scale or 1.0)

    @property
    def v_scale(self) -> float:
        """Factor that turns stored values into real ones."""
        return self.options.v_scale or 1.0

    @property
    def compute_dtype(self) -> np.dtype:
        """dtype in which the operands of the two products are held. Softmax statistics and sums are float32 at least,
        whatever this is."""
        return self.options.compute_dtype or self.query_dtype

    def requested_options(self) -> tuple[str, ...]:
        """Names of the options that are set and change a result: a kernel must declare each of them."""
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
    """The arrays of one call, in the order kernels take them. Index arrays are int32.

    Attributes:
        queries: ``[tokens, q_heads, head_dim]``.
        keys, values: ``[tokens, kv_heads, head_dim]`` of the new tokens for v3; None for v2.
        pages: the cache, in the form of ``request.cache_format``.
        context_lens: ``[rows]`` tokens of each request, the new ones included.
        block_tables: ``[rows, pages_per_row]`` page ids. Entries past a context are never used.
        query_start_loc: ``[rows + 1]`` first token of each row; row r owns ``[qsl[r], qsl[r + 1])``.
        distribution: ``[3]``, see :class:`Distribution`; for v2 all three entries hold ``num_seqs``.
        sinks: ``[q_heads]`` float32 logits that take part in the softmax's sum alone; None for none.
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


class Attended(NamedTuple):
    """The result of one call.

    Attributes:
        output: ``[tokens, q_heads, head_dim]`` in the queries' dtype. Tokens of no live row give zeros.
        pages: the cache after the call; for v2 as it came.
        lse: ``[tokens, q_heads]`` float32, where ``request.return_lse``: natural logarithm of the sum of ``exp(logit)``
            over the keys that a query sees, sinks included. -inf for tokens of no live row. Else None.
    """

    output: jax.Array
    pages: Any
    lse: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Features:
    """What a kernel honors. What a call requests and a kernel does not declare, selection refuses by name.

    Attributes:
        options: names of fields of :class:`~easydel_ragged_plugin.options.Options`; hints need no declaration.
        cache_formats: names of cache formats that it reads.
        results: results beside output and pages that it can give: ``"lse"``.
    """

    options: frozenset[str]
    cache_formats: frozenset[str] = frozenset({"plain"})
    results: frozenset[str] = frozenset()

    def lacks(self, request: AttentionRequest) -> str | None:
        """What ``request`` needs and is not declared, or None."""
        if request.cache_format.name not in self.cache_formats:
            return f"takes no {request.cache_format.label} cache"
        missing = [name for name in request.requested_options() if name not in self.options]
        if missing:
            return f"takes no {', '.join(missing)}"
        if request.return_lse and "lse" not in self.results:
            return "gives no logsumexp (return_lse)"
        return None


class Tuning(Protocol):
    """What ``easydel-ragged tune`` can measure of a kernel.

    Attributes:
        parts: kinds of work that are tuned apart, such as ``("decode", "prefill")``.
    """

    parts: tuple[str, ...]

    def candidates(self, part: str, request: AttentionRequest, small: bool) -> Iterator[Any]:
        """Objects of the kernel's ``config_type`` to measure, the present one first. ``small``: for an interpreter."""
        ...

    def save(self, request: AttentionRequest, best: Mapping[str, Any], measured: Mapping[str, Any]) -> Path:
        """Keep the best configuration of each part for later processes; the file that holds it.

        Args:
            request: what was measured.
            best: an object of ``config_type`` for each part.
            measured: what to note beside it, JSON-able.
        """
        ...


class Kernel(abc.ABC):
    """One way to compute ragged page attention. Subclass it, and define the first four attributes and two methods.

    A kernel states what it can do without running: ``features`` and ``refuses`` touch no device. Its object is part of
    the key under which JAX keeps a compiled call, so there is one object for each kernel.

    Attributes:
        name: unique name, used by ``kernel=`` and by ``EASYDEL_RAGGED_KERNEL``.
        platforms: platforms that it runs on, for example ``frozenset({"cpu"})``.
        technologies: the host's words for what it is (``"xla"``, ``"triton"``, ``"pallas"``, ...): a host
            config whose ``platform`` is one of them keeps to kernels that list it.
        features: what it honors. Selection refuses the rest by name.
        label, color: its name and color in tables and figures; without them its name, and a color of no meaning.
        is_hosts: whether it is the host's own kernel, which others are compared with.
        config_type: dataclass of the knobs that no other kernel has; ``RaggedPageConfig.kernel_config`` takes one.
    """

    name: str
    platforms: frozenset[str]
    technologies: frozenset[str]
    features: Features
    label: str = ""
    color: str | None = None
    is_hosts: bool = False
    config_type: type | None = None

    @abc.abstractmethod
    def refuses(self, request: AttentionRequest) -> str | None:
        """Why this kernel can't do ``request``, whose features it has, or None when it can."""

    @abc.abstractmethod
    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """Attend, for v3 after writing the new tokens."""

    def fingerprint(self) -> str:
        """What decides about this kernel's numbers and programs in this process: equal on all workers of a job."""
        facts = self.facts()
        if not facts["available"]:
            return f"not available: {facts['reason']}"
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def facts(self) -> dict[str, Any]:
        """What ``doctor`` and benchmarks show of it, as JSON has it: ``available``, ``reason`` (None where it is
        available), and whatever else a reader should see."""
        return {"available": True, "reason": None}

    def notes(self, platform: str) -> tuple[str, ...]:
        """What a user of ``platform`` should know, none of it an error; for ``doctor``."""
        return ()

    def tuning(self) -> Tuning | None:
        """What can be tuned of it, or None."""
        return None
