"""What libtpu writes of a compiled kernel: its final schedule, and the bundles of its inner loops."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["Figure", "Stretch", "figures_of_others", "figures_of_ours", "inner_loops", "stretches"]

TILE_TOKENS, TILE_KEYS = 128, 512
"""What prefill is given for: tiles of kernels differ."""


LINE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s*(?P<label>[A-Z]{2})?\s*:\s*(?P<nesting>[> ]*)\{")
PRODUCT = re.compile(r"\bvmat(?:mul|push|prep)")


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Bundles that follow one another, with no jump into them.

    Attributes:
        depth: loops around it.
        bundles: how many.
        products: instructions of the matrix unit among them.
    """

    depth: int
    bundles: int
    products: int


def stretches(listing: Iterable[str]) -> list[Stretch]:
    """The stretches of a ``*-final_bundles.txt``, in its order.

    A label (loop body, end of a predicated region) or another depth begins one. A predicated region, such as the body
    of a ``pl.when``, is one of its own, because the branch around it is listed without a loop's mark.
    """
    found: list[list[int]] = []
    for line in listing:
        parsed = LINE.match(line)
        if parsed is None:
            continue
        depth = parsed["nesting"].count(">")
        if not found or parsed["label"] or found[-1][0] != depth:
            found.append([depth, 0, 0])
        found[-1][1] += 1
        found[-1][2] += len(PRODUCT.findall(line))
    return [Stretch(*each) for each in found]


def inner_loops(listing: Iterable[str]) -> list[Stretch]:
    """The stretches of a listing that multiply, in its order."""
    return [each for each in stretches(listing) if each.products]


@dataclasses.dataclass(frozen=True)
class Figure:
    """Bundles of one stretch that attends over ``keys`` keys for a tile of ``tokens`` query tokens, all heads."""

    phase: str
    block: str
    tokens: int
    keys: int
    bundles: int

    @property
    def per_key(self) -> float:
        """Bundles for each key; in prefill for 128 query tokens."""
        tiles = 1.0 if self.phase == "decode" else TILE_TOKENS / self.tokens
        return tiles * self.bundles / self.keys


SIZES = (
    re.compile(r"RPA-(?P<phase>[dpm])-blocksizeQ-(?P<tokens>\d+)-blocksizeKV-(?P<pages>\d+)-pageSize-(?P<page>\d+)"),
    re.compile(r"RPA(?P<phase>[dpm])-p_\d+-bq_\d+_(?P<tokens>\d+)-bkv_\d+_(?P<keys>\d+)"),
)
"""Names of others' kernels, which say their blocks."""

PHASES = {"d": "decode", "m": "prefill"}


def figures_of_others(name: str, listing: Iterable[str]) -> list[Figure]:
    """Figures of a kernel whose name has its sizes; none for a name that is not known.

    These kernels have one inner loop, with a mask or, in decode, without one.
    """
    for pattern in SIZES:
        sizes = pattern.search(name)
        if sizes is None or sizes["phase"] not in PHASES:
            continue
        fields = sizes.groupdict()
        keys = int(fields["keys"]) if fields.get("keys") else int(fields["pages"]) * int(fields["page"])
        loops = inner_loops(listing)
        if len(loops) != 1:
            raise ValueError(f"{name}: got {len(loops)} stretches that multiply, wanted 1")
        return [Figure(PHASES[fields["phase"]], "any", int(fields["tokens"]), keys, loops[0].bundles)]
    return []


def figures_of_ours(call: dict[str, Any], listing: Iterable[str]) -> list[Figure]:
    """Figures of this package's kernel: blocks that all queries see whole, and blocks that need a mask.

    A third stretch multiplies: the one for tiles that hold a NaN, which is run for nothing else.
    """
    loops = inner_loops(listing)
    if len(loops) != 3:
        raise ValueError(f"{call['phase']}: got {len(loops)} stretches that multiply, wanted 3")
    sizes = (("whole", call["keys"], loops[0]), ("masked", call["part"], loops[1]))
    return [Figure(call["phase"], block, call["tokens"], keys, loop.bundles) for block, keys, loop in sizes]
