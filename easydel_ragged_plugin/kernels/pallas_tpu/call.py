"""What one call of the kernel is: its sizes, its memory, and what it gives."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.types import AttentionRequest

from .blocks import LEAST_KEYS, TABLE_CHUNK, Block, Shapes

__all__ = ["Call", "Results", "scratch"]

PART_KEYS = 256
"""See :attr:`Call.part`."""


class Results(NamedTuple):
    """What a call gives. Tokens that are in no tile of it are undefined.

    Attributes:
        output: ``[joints, tokens, rows of a token / pack, pack, lanes]``, see :class:`Call`.
        lse: ``[tokens, rows of a token, 128]`` float32, a lane for each joint; None where it is not requested.
    """

    output: jax.Array
    lse: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the kernel.

    In decode the kv heads are joined in twos: rows of 256 lanes fill the matrix unit of a v6e and later, and the
    queries of two heads fill more of a register. A joint has the keys of both heads side by side, and queries with
    zeros beside those of the other head. Of its output, the part of the other head's values is dropped.

    Attributes:
        request: what is computed.
        block: its sizes.
        shapes: how arrays are held.
        tokens: tokens of its queries and results.
        writes: whether it writes the new tokens.
        decode: whether each tile is of one token.
    """

    request: AttentionRequest
    block: Block
    shapes: Shapes
    tokens: int
    writes: bool
    decode: bool

    @property
    def pages(self) -> int:
        """Pages in a block."""
        return self.block.pages(self.request.page_size)

    @property
    def keys(self) -> int:
        """Slots in a block."""
        return self.pages * self.request.page_size

    @property
    def part(self) -> int:
        """Keys that are attended over at once in a block that needs a mask."""
        return self._part(PART_KEYS)

    @property
    def careful_part(self) -> int:
        """The same for a tile that is done again: it is seldom, and its program should be short."""
        return self._part(LEAST_KEYS)

    def _part(self, wanted: int) -> int:
        # Rows of v2's slots are tiled in fours or eights, and Mosaic has to prove that a part begins with a tile.
        return wanted if self.keys % wanted == 0 and not self.shapes.is_v2 else self.keys

    @property
    def joined(self) -> int:
        """Heads of a joint."""
        return 2 if self.decode and self.request.num_kv_heads > 1 and self.shapes.lanes == LANES else 1

    @property
    def joints(self) -> int:
        """Joints of all kv heads. The last one has one head twice where their number is odd."""
        return -(-self.request.num_kv_heads // self.joined)

    @property
    def token_rows(self) -> int:
        """Rows of queries of a token for one joint."""
        return self.joined * self.shapes.group

    @property
    def rows(self) -> int:
        """Rows of queries of a tile for one joint."""
        return self.block.tokens * self.token_rows

    @property
    def lanes(self) -> int:
        """Lanes of a row of a joint."""
        return self.joined * self.shapes.lanes

    def heads_of(self, joint: int) -> tuple[int, ...]:
        """The kv heads of a joint."""
        last = self.request.num_kv_heads - 1
        return tuple(min(joint * self.joined + each, last) for each in range(self.joined))


def scratch(call: Call) -> dict[str, Any]:
    """The memory of a call."""
    request, shapes, block = call.request, call.shapes, call.block
    buffers = block.buffers + 1  # the last one is for attend_again

    def tile(copies: int, dtype: np.dtype) -> Any:
        pack = packing(dtype)
        return pltpu.VMEM((copies, call.joints, block.tokens, call.token_rows // pack, pack, call.lanes), dtype)

    found = {
        "cache": pltpu.VMEM((buffers, call.keys, *shapes.buffered_slot), request.cache_dtype),
        "tile": tile(block.buffers, shapes.operand),
        "out": tile(2, shapes.result),
        "maximum": pltpu.VMEM((call.joints, call.rows, LANES), jnp.float32),
        "total": pltpu.VMEM((call.joints, call.rows, LANES), jnp.float32),
        "weighted": pltpu.VMEM((call.joints, call.rows, call.lanes), jnp.float32),
        "entries": pltpu.SMEM((3, 1, TABLE_CHUNK), jnp.int32),
        "table_semaphores": pltpu.SemaphoreType.DMA((3,)),
        "page_semaphores": pltpu.SemaphoreType.DMA((buffers,)),
        "tile_semaphores": pltpu.SemaphoreType.DMA((block.buffers,)),
        "out_semaphores": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if request.return_lse:
        found["lse_out"] = pltpu.VMEM((2, block.tokens, call.token_rows, LANES), jnp.float32)
    if call.writes:
        found["write_semaphores"] = pltpu.SemaphoreType.DMA((1,))
    return found
