"""Lists of work: tiles of long rows, and what is left to ``pallas_gpu``.

They depend on row lengths alone, as in ``pallas_gpu``, so a loop over layers can take them from its caller. Rows that
lack a page are looked for in each call, and their tiles taken out: a tile copies the pages that it sees and no others.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.kernels.pallas_gpu import work
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Tiles
from easydel_ragged_plugin.kernels.pallas_gpu.work import Column, Work
from easydel_ragged_plugin.rows import Rows, lacks_page
from easydel_ragged_plugin.types import AttentionRequest

__all__ = ["LongWork", "work_of"]


class LongWork(NamedTuple):
    """All lists of a call, int32.

    Attributes:
        others: those of ``pallas_gpu``, in which long rows have an update and nothing else.
        tiles: ``[tiles, len(Column)]``, tiles of new tokens of long rows.
        rows: the long rows; all others have no queries.
        listed: ``[rows]`` tokens of each that ``tiles`` has: fewer than there are only where malformed rows share them.
    """

    others: Work
    tiles: jax.Array
    rows: Rows
    listed: jax.Array

    def with_pages(self, request: AttentionRequest, tables: jax.Array) -> LongWork:
        """Without the long rows that lack a page, by the block tables of the call."""
        lacks = lacks_page(request, self.rows, tables)
        tiles = jnp.where(lacks[self.tiles[:, Column.ROW]][:, None], 0, self.tiles)
        return self._replace(tiles=tiles, listed=jnp.where(lacks, 0, self.listed))

    def has_token(self, request: AttentionRequest) -> jax.Array:
        """``[tokens]``: whether any tile has the token."""
        return work.has_row(request, self.rows._replace(num_queries=self.listed)) > 0


def work_of(request: AttentionRequest, others: Tiles, tile_tokens: int, more_than: int, rows: Rows) -> LongWork:
    """All lists of a call: rows of more than ``more_than`` tokens are long, in tiles of ``tile_tokens``."""
    few = jnp.where(rows.num_queries <= more_than, rows.num_queries, 0)
    short, long = rows._replace(num_queries=few), rows._replace(num_queries=rows.num_queries - few)
    update = work.query_work(request, rows, others.update_tokens) if request.writes_pages else None
    parts, merges = work.decode_work(request, others, short)
    return LongWork(
        Work(update, parts, merges, None, work.has_row(request, short)),
        work.query_work(request, long, tile_tokens, more_than),
        long,
        work.listed_rows(request, long, tile_tokens, more_than).num_queries,
    )
