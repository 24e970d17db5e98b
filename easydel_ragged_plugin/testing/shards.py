"""Batches for meshes, with pages where a data-parallel host puts them."""

from __future__ import annotations

import dataclasses

import numpy as np

from .cases import Batch

__all__ = ["local_pages"]


def local_pages(batch: Batch, shards: int) -> Batch:
    """``batch`` with its pages moved so that each row's pages lie in the part of the cache of the row's shard.

    Rows and pages are divided into ``shards`` contiguous parts each. An unused table entry still names the same page,
    so some of them name pages of other shards. Page 0 is not moved.

    Raises:
        ValueError: rows or pages do not divide, or a shard has fewer pages than its rows need.
    """
    num_pages, (num_rows, _) = len(batch.pages), batch.block_tables.shape
    if num_pages % shards or num_rows % shards:
        raise ValueError(f"got {num_pages} pages and {num_rows} rows, wanted multiples of {shards} of both.")
    case, size = batch.case, num_pages // shards
    free = [list(range(max(1, shard * size), (shard + 1) * size)) for shard in range(shards)]
    place = {0: 0}
    for row, each in enumerate(case.rows):
        shard = row // (num_rows // shards)
        first = 0
        if case.free_left_of_window and case.window:
            first = max(0, each.context - each.new - case.window + 1) // case.page_size
        for page in batch.block_tables[row, first : -(-each.context // case.page_size)]:
            if int(page) not in place:
                if not free[shard]:
                    raise ValueError(f"shard {shard}: got {size} pages, wanted more for its rows.")
                place[int(page)] = free[shard].pop(0)
    rest = [page for part in free for page in part]
    for page in range(num_pages):
        if page not in place:
            place[page] = rest.pop()
    new_id = np.array([place[page] for page in range(num_pages)], np.int32)

    def moved(array: np.ndarray) -> np.ndarray:
        result = np.empty_like(array)
        result[new_id] = array
        return result

    inside = (batch.block_tables >= 0) & (batch.block_tables < num_pages)
    tables = np.where(inside, new_id[np.where(inside, batch.block_tables, 0)], batch.block_tables)
    mapping = batch.slot_mapping.copy()
    used = slice(int(batch.num_kv_update_slices[0]))
    mapping[0, used] = new_id[mapping[0, used] // case.page_size] * case.page_size + mapping[0, used] % case.page_size
    return dataclasses.replace(
        batch,
        pages=moved(batch.pages),
        updated_pages=moved(batch.updated_pages),
        block_tables=tables,
        written_slots=moved(batch.written_slots),
        slot_mapping=mapping,
    )
