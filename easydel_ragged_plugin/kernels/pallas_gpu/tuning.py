"""What ``easydel-ragged tune`` measures of this kernel, and where the winners are kept.

``tiles.py`` reads the file. An entry holds for one card and for those parts of a request that decide how a tile runs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from easydel_ragged_plugin import entries
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.types import AttentionRequest, Kernel

from . import tiles
from .tiles import Tile, Tiles, power_of_two

__all__ = ["TileTuning"]


@dataclasses.dataclass(frozen=True)
class TileTuning:
    """See :class:`easydel_ragged_plugin.types.Tuning`. Candidates are :class:`Tiles`.

    Attributes:
        interpreted: the kernel in Pallas' interpreter.
        interpret: whether that one is tuned: few candidates, and an entry that no card has.
    """

    interpreted: Kernel
    interpret: bool
    parts = ("decode", "prefill")

    def candidates(self, part: str, request: AttentionRequest) -> Iterator[Tiles]:
        """Sizes to measure, the present ones first: those of the other part stay as they are."""
        _, found = tiles.card()
        now = tiles.choose(request, RaggedPageConfig())
        yield now
        group = power_of_two(request.group_size)
        queries = sorted({group} if part == "decode" else {max(each, group) for each in (32, 64, 128)})
        keys = (16, 32) if self.interpret else (32, 64, 128)
        warps = (4,) if self.interpret else (2, 4, 8) if part == "decode" else (4, 8)
        stages = (1,) if self.interpret else (2, 3, 4)
        waves = (4,) if self.interpret or part == "prefill" else (2, 4, 8)
        for sizes in itertools.product(queries, keys, warps, stages, waves):
            tile = Tile(*sizes[:4])
            if not tile.fits(request, found):
                continue
            changes: dict[str, Any] = {part: tile}
            if part == "decode":
                changes["programs"] = found.multiprocessors * sizes[4]
            candidate = dataclasses.replace(now, **changes)
            if candidate != now:
                yield candidate

    def save(self, request: AttentionRequest, best: Mapping[str, Tiles], measured: Mapping[str, Any]) -> Path:
        """Add the winners, joined, to the file of this user; the file."""
        name = "interpreter" if self.interpret else tiles.card()[0]
        winner = dataclasses.replace(best["decode"], prefill=best["prefill"].prefill)
        file = tiles.tuned_file()
        entry = {**measured, "tiles": dataclasses.asdict(winner)}
        entries.write(file, tiles.FORMAT, tiles.tuned_key(name, request), entry)
        return file
