"""Sizes of blocks: a table by TPU generation, and the memory that they take.

**VMEM.** A TPU core's own memory holds ``buffers`` blocks of keys and values, as many tiles of queries, two tiles of
the output, and the float32 state of a tile. :func:`vmem_bytes` adds them up, and :func:`choose` halves sizes until the
sum fits the part of VMEM that :data:`GENERATIONS` allows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.types import AttentionRequest

__all__ = ["LEAST_KEYS", "TABLE_CHUNK", "Block", "Blocks", "Shapes", "choose", "too_large", "vmem_bytes", "vmem_limit"]

TABLE_CHUNK = 128
"""Entries of the block table that are copied to scalar memory at once. The pages of a block lie within one chunk."""

LEAST_KEYS = 128
"""Keys of a block, at least: a logit for each of them fills one row of a vector register."""

KEYS_MULTIPLE = 32
"""Keys of a block are a multiple of it: rows of a register of 8-bit numbers."""

MIB = 2**20
MOST_SMEM = 3 * MIB // 4


@dataclasses.dataclass(frozen=True)
class Block:
    """Sizes of one of the two calls.

    Attributes:
        tokens: query tokens in a tile.
        keys: tokens of context in a block; cut to a power of two of pages.
        buffers: blocks of keys and values in memory: one is attended over while the others are copied.
    """

    tokens: int
    keys: int
    buffers: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.keys) < 1 or self.buffers < 2:
            raise ValueError(f"Block: got {self}, wanted positive sizes and at least 2 buffers.")

    def pages(self, page_size: int) -> int:
        """Pages in a block: a power of two, up to a chunk of the block table."""
        pages = 1
        while pages < TABLE_CHUNK and (2 * pages * page_size <= self.keys or pages * page_size < LEAST_KEYS):
            pages *= 2
        return pages


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one call.

    Attributes:
        decode: for rows with one new token; its tiles are of one token.
        prefill: for all others.
    """

    decode: Block
    prefill: Block

    def __post_init__(self) -> None:
        if self.decode.tokens != 1:
            raise ValueError(f"Blocks: got decode tiles of {self.decode.tokens} tokens, wanted 1.")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is known of a generation of TPUs.

    Attributes:
        vmem: bytes of VMEM of a core.
        decode_bytes: bytes of a block of keys and values in decode: enough that a copy takes longer than to start it.
        prefill_rows: rows of a tile of prefill, each a query head of a token.
    """

    vmem: int
    decode_bytes: int
    prefill_rows: int


GENERATIONS = {
    "v4": Generation(16 * MIB, MIB, 256),
    "v5e": Generation(128 * MIB, MIB, 512),
    "v5p": Generation(64 * MIB, 2 * MIB, 512),
    "v6e": Generation(128 * MIB, 2 * MIB, 512),
    "7x": Generation(64 * MIB, 4 * MIB, 512),
}
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7": "7x",
    "TPU7x": "7x",
}
"""Generations by ``jax.Device.device_kind``."""

SMALLEST = "v4"
"""What is assumed of an unknown device."""

PREFILL_KEYS = 512
MOST_DECODE_KEYS = 2048


def generation_name() -> str | None:
    """That of this process's TPU, a key of :data:`GENERATIONS`; None where there is none, or an unknown one."""
    return KINDS.get(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None


def generation() -> Generation:
    """That of this process's TPU; the smallest one where there is none."""
    return GENERATIONS[generation_name() or SMALLEST]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """How the kernel holds the arrays of a request. Rows are of 128 lanes or a multiple.

    Attributes:
        stored: heads that a slot of the cache stores, keys and values counted apart unless they share a row.
        pack: rows of the cache that share 32 bits.
        lanes: elements of a row.
        is_v2: whether a slot of the cache has its rows in one axis, not in groups of ``pack``.
        shares_rows: whether a key and its value are halves of one row (head_dim 64).
        group: rows of a token's queries for one kv head: query heads, rounded up so that they fill 32 bits.
        operand: dtype of the operands of both products.
        result: dtype of the output.
    """

    stored: int
    pack: int
    lanes: int
    is_v2: bool
    shares_rows: bool
    group: int
    operand: np.dtype
    result: np.dtype

    @classmethod
    def of(cls, request: AttentionRequest) -> Shapes:
        """The shapes for ``request``."""
        layout, pack = request.layout, packing(request.cache_dtype)
        wide = {"float16": np.dtype(np.float32)}  # Mosaic has no float16
        operand = wide.get(request.compute_dtype.name, request.compute_dtype)
        result = wide.get(request.query_dtype.name, request.query_dtype)
        rows = max(packing(operand), packing(result))
        group = -(-request.group_size // rows) * rows
        is_v2 = request.version == "v2"
        shares_rows = not is_v2 and layout.value_offset < LANES
        lanes = LANES if shares_rows else layout.padded_head_dim
        return cls(layout.token_stride // lanes, pack, lanes, is_v2, shares_rows, group, operand, result)

    @property
    def words(self) -> int:
        """Rows of 32-bit words in a slot."""
        return self.stored // self.pack

    @property
    def stride(self) -> int:
        """Distance of slots in a buffer, in rows of words. One is left free where rows that are read together, one of
        each slot, would lie in the same banks of VMEM."""
        return self.words + (self.words % 2 == 0 and not self.is_v2)

    @property
    def slot(self) -> tuple[int, ...]:
        """The shape of a slot of the cache."""
        return (self.stored, self.lanes) if self.is_v2 else (self.words, self.pack, self.lanes)

    @property
    def buffered_slot(self) -> tuple[int, ...]:
        """The shape of a slot in a buffer."""
        return self.slot if self.is_v2 else (self.stride, self.pack, self.lanes)

    def words_of(self, head: int, *, value: bool) -> tuple[int, int]:
        """Which row of words holds a kv head's key or value, and which part of each word."""
        row = head if self.shares_rows else 2 * head + value
        return row // self.pack, row % self.pack


def vmem_bytes(request: AttentionRequest, block: Block) -> int:
    """Bytes of VMEM that a call takes for its buffers and state, and for the logits of one head."""
    shapes, heads = Shapes.of(request), request.num_kv_heads
    keys = block.pages(request.page_size) * request.page_size
    rows = (heads + 1) * block.tokens * shapes.group
    cache = (block.buffers + 1) * keys * shapes.stride * shapes.lanes * 4
    queries = rows * shapes.lanes * (block.buffers * shapes.operand.itemsize + 2 * shapes.result.itemsize)
    state = rows * (shapes.lanes + 2 * LANES) * 4
    sinks = rows * LANES * 4 if request.options.sinks else 0
    logits = 3 * max(8, block.tokens * shapes.group) * keys * 4
    return cache + queries + state + sinks + logits


def vmem_limit(request: AttentionRequest) -> int:
    """The limit that the compiler is given: the caller's, or three quarters of what there is."""
    return request.options.vmem_limit_bytes or 3 * generation().vmem // 4


def _fitting(request: AttentionRequest, block: Block, limit: int) -> Block:
    while vmem_bytes(request, block) > limit:
        pages = block.pages(request.page_size)
        if block.tokens > 8 and block.tokens * Shapes.of(request).group >= block.keys // 2:
            block = dataclasses.replace(block, tokens=-(-block.tokens // 2))
        elif pages > 1 and pages * request.page_size > LEAST_KEYS:
            block = dataclasses.replace(block, keys=pages * request.page_size // 2)
        elif block.buffers > 2:
            block = dataclasses.replace(block, buffers=block.buffers - 1)
        elif block.tokens > 1:
            block = dataclasses.replace(block, tokens=-(-block.tokens // 2))
        else:
            break
    return block


@functools.lru_cache(maxsize=256)
def _default(request: AttentionRequest, known: Generation, limit: int) -> Blocks:
    shapes = Shapes.of(request)
    slot = shapes.words * shapes.lanes * 4
    decode = Block(1, min(MOST_DECODE_KEYS, max(LEAST_KEYS, known.decode_bytes // slot)), 3)
    tokens = min(max(1, known.prefill_rows // shapes.group), request.num_tokens)
    prefill = Block(tokens, PREFILL_KEYS, 2)
    fit = 3 * limit // 4  # the rest is the compiler's
    return Blocks(_fitting(request, decode, fit), _fitting(request, prefill, fit))


def choose(request: AttentionRequest, config: RaggedPageConfig) -> Blocks:
    """The sizes for ``request``: the config's fields, then its ``kernel_config``, then the table.

    Raises:
        Unsupported: blocks of the config do not fit the memories of a core.
    """
    blocks: Blocks = config.kernel_config or _default(request, generation(), vmem_limit(request))
    changes: dict[str, int] = {}
    if config.num_kv_pages_per_block is not None:
        changes["keys"] = config.num_kv_pages_per_block * request.page_size
    decode, prefill = (dataclasses.replace(block, **changes) for block in (blocks.decode, blocks.prefill))
    if config.num_queries_per_block is not None:
        prefill = dataclasses.replace(prefill, tokens=min(config.num_queries_per_block, request.num_tokens))
    chosen = Blocks(decode, prefill)
    if chosen != blocks or config.kernel_config is not None:
        reason = unfit(request, chosen)
        if reason is not None:
            raise Unsupported(
                f"pallas_tpu: {reason}. Make the blocks of the config smaller, or leave them to the kernel."
            )
    return chosen


def smem_bytes(request: AttentionRequest, blocks: Blocks) -> int:
    """Bytes of scalar memory that the longest lists of work take: see ``work.py``."""
    tokens, rows = request.num_tokens, request.num_rows
    tiles = 2 * (tokens // blocks.prefill.tokens) + rows
    segments = min(2 * tokens, 2 * tokens // request.page_size + 2 * rows) if request.writes_pages else 0
    return 4 * (8 * tiles + 4 * segments)


def too_large(request: AttentionRequest) -> str | None:
    """What of ``request`` the memories of a core can't hold, with the smallest blocks that there are; or None."""
    return unfit(request, _default(request, generation(), vmem_limit(request)))


def unfit(request: AttentionRequest, blocks: Blocks) -> str | None:
    """Why ``blocks`` can't be used for ``request``, or None."""
    limit = vmem_limit(request)
    for block in (blocks.decode, blocks.prefill):
        taken, keys = vmem_bytes(request, block), block.pages(request.page_size) * request.page_size
        if taken > limit:
            return (
                f"blocks of {keys} tokens take {taken / MIB:.1f} MiB of VMEM, more than the {limit / MIB:.1f} MiB of "
                "this TPU or of vmem_limit_bytes"
            )
        if keys % KEYS_MULTIPLE:
            return f"pages of {request.page_size} tokens: blocks of {keys}, no multiple of {KEYS_MULTIPLE}"
    lists = smem_bytes(request, blocks)
    if lists > MOST_SMEM:
        return f"lists of work of {lists / MIB:.1f} MiB for {request.num_tokens} tokens, more than scalar memory holds"
    return None
