"""What one call of ragged page attention is: its static description and its arrays.

:class:`AttentionRequest` holds everything that is known while tracing. It is hashable, so it can key
caches and travel through ``jax.jit`` as a static value. :class:`Operands` holds the arrays.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .layout import PageLayout, Version

if TYPE_CHECKING:
    import jax

    from .config import RaggedPageConfig

__all__ = ["AttentionRequest", "Distribution", "Kernel", "Operands", "Version"]


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
        cache_dtype: dtype of the pages.
        compute_dtype: dtype in which the operands of the two products are held. Softmax statistics and
            sums are float32 at least, whatever this is.
        layout: strides of the page array.
        softmax_scale: factor on ``query . key``.
        sliding_window: tokens that a query sees, its own included; None for all.
        logits_soft_cap: cap c of ``c * tanh(logits / c)``; None for none.
        has_sinks: whether each query head has a sink logit.
        q_scale, k_scale, v_scale: factors that turn stored queries, keys and values into real ones.
        vmem_limit_bytes: ceiling on a TPU kernel's scoped VMEM. Kernels that use none meet any ceiling.
        optimized: a hint of the host's v2 call for its TPU kernel. Never changes results.
        turboquant: whether the cache is a :class:`~easydel_ragged_plugin.turboquant.TurboQuantPages`. Then
            ``cache_dtype`` is uint8, and ``layout`` counts the coordinates that the codes stand for.
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
    compute_dtype: np.dtype
    layout: PageLayout
    softmax_scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    has_sinks: bool = False
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    vmem_limit_bytes: int | None = None
    optimized: bool = False
    turboquant: bool = False

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.layout.page_size

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_q_heads // self.num_kv_heads

    def describe(self) -> str:
        """One line for logs: the operation, its geometry and its options."""
        options = [
            f"{name}={getattr(self, name)}"
            for name in ("sliding_window", "logits_soft_cap", "q_scale", "k_scale", "v_scale")
            if getattr(self, name) is not None
        ]
        if self.has_sinks:
            options.append("sinks")
        return " ".join(
            [
                f"{self.version} on {self.platform}: {self.num_tokens} tokens,",
                f"{self.num_q_heads}/{self.num_kv_heads} heads, head_dim {self.head_dim},",
                f"{self.num_rows} rows x {self.pages_per_row} pages of {self.page_size},",
                f"{self.query_dtype.name} queries, {'TurboQuant' if self.turboquant else self.cache_dtype.name} cache",
                *options,
            ]
        )


class Operands(NamedTuple):
    """The arrays of one call, in the order kernels take them. Index arrays are int32.

    Attributes:
        queries: ``[tokens, q_heads, head_dim]``.
        keys, values: ``[tokens, kv_heads, head_dim]`` new rows for v3; None for v2.
        pages: the page array, in the shape of ``request.version``; TurboQuantPages where ``request.turboquant``.
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


@runtime_checkable
class Kernel(Protocol):
    """One way to compute ragged page attention.

    A kernel states what it can do without running: ``refuses`` looks at the request alone, touches no
    device and returns the reason as text, or None when it takes the call.

    Attributes:
        name: unique name, used by ``kernel=`` and by ``EASYDEL_RAGGED_KERNEL``.
        platforms: platforms that it runs on, for example ``frozenset({"cpu"})``.
        technologies: the host's words for what it is (``"xla"``, ``"triton"``, ``"pallas"``, ...): a host
            config whose ``platform`` is one of them keeps to kernels that list it.
        takes_turboquant: whether it reads TurboQuant caches. May be left out: then it is not asked to.
    """

    name: str
    platforms: frozenset[str]
    technologies: frozenset[str]

    def refuses(self, request: AttentionRequest) -> str | None:
        """Why this kernel can't do ``request``, or None when it can."""
        ...

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> tuple[jax.Array, Any]:
        """Attend, for v3 after writing the new rows.

        Returns:
            ``(output [tokens, q_heads, head_dim] in query dtype, pages)``. Tokens of no live row give
            zeros. For v2 the pages are returned as they came.
        """
        ...
