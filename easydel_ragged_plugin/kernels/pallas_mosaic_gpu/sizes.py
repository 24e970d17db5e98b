"""Sizes of the Mosaic kernel: what two warpgroups compute, and the blocks of keys that a third one brings them.

The numbers are derived, not measured. A product of Hopper's tensor cores takes 64 rows for a warpgroup, so each of the
two has 64 queries. The accumulator is float32 ``[64, head_dim]`` and the logits ``[64, keys]``: 64 registers of a
thread each at head_dim 128 and 128 keys, with 32 more for the weights, of 224. Blocks in flight fill the shared memory.
"""

from __future__ import annotations

import dataclasses

from easydel_ragged_plugin.types import AttentionRequest

__all__ = [
    "COMPUTE_REGISTERS",
    "COMPUTE_WARPGROUPS",
    "MEMORY_REGISTERS",
    "OUTPUT_LANES",
    "QUERIES",
    "Sizes",
    "choose",
]

COMPUTE_WARPGROUPS = 2
QUERIES = 64
"""Queries of a warpgroup: rows of one product."""
TILE_ROWS = 8
"""Rows of shared memory that a copy of queries fills at least: those of a tile of the swizzled form."""
OUTPUT_LANES = 64
"""Lanes of the output that are staged at a time."""

COMPUTE_REGISTERS = 224
MEMORY_REGISTERS = 56
"""Of a thread, by ``setmaxnreg``: all threads of a program have 64 Ki registers together."""

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one program holds.

    Attributes:
        tokens: tokens of one compute warpgroup; each has ``group_size`` queries.
        heads_first: order of a warpgroup's queries. Query m is head ``m // tokens`` of token ``m % tokens`` where it is
            true, head ``m % group_size`` of token ``m // group_size`` where it is false.
        keys: keys of a block.
        stages: blocks that are in shared memory, the one that is being computed included.
    """

    tokens: int
    heads_first: bool
    keys: int
    stages: int

    @property
    def tile_tokens(self) -> int:
        """Tokens of a program."""
        return COMPUTE_WARPGROUPS * self.tokens

    def shared_bytes(self, request: AttentionRequest) -> int:
        """Shared memory of a program without barriers: queries, blocks, and what leaves it."""
        queries = COMPUTE_WARPGROUPS * QUERIES
        elements = queries * (request.head_dim + OUTPUT_LANES) + 2 * self.stages * self.keys * request.head_dim
        return elements * request.compute_dtype.itemsize + 2 * queries * 4


def choose(request: AttentionRequest) -> Sizes | None:
    """Sizes for a request; None where the heads of a group do not fill whole tiles of shared memory.

    A copy brings one head of several tokens, or all heads of one token, and both must be whole tiles of 8 rows. So up
    to 8 heads take a multiple of 8 tokens, and more of them must be such a multiple.
    """
    group = request.group_size
    if group <= TILE_ROWS:
        tokens, heads_first = QUERIES // group // TILE_ROWS * TILE_ROWS, True
        tokens = 1 << (tokens.bit_length() - 1)  # what is left over is stored in parts of powers of two
    elif group % TILE_ROWS == 0 and group <= QUERIES:
        tokens, heads_first = QUERIES // group, False
    else:
        return None
    keys, stages = {64: (128, 4), 128: (128, 2), 256: (64, 2)}[request.head_dim]
    return Sizes(tokens, heads_first, keys, stages)
