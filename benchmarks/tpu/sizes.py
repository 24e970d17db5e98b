"""The block sizes that the TPU kernel chooses, as a table: made from the code, without compiling anything."""

from __future__ import annotations

from unittest import mock

from easydel_ragged_plugin import RaggedPageConfig, explain
from easydel_ragged_plugin.kernels import xla
from easydel_ragged_plugin.kernels.pallas_tpu import blocks
from easydel_ragged_plugin.types import AttentionRequest

from .programs import GEOMETRIES, Geometry, call_of

__all__ = ["table"]

MIB = 2**20


def request_of(geometry: Geometry) -> AttentionRequest:
    """The request of the program that the schedules are of."""
    function, arguments, _ = call_of(geometry, xla.KERNEL.name)  # every kernel gets the same request
    return explain(function.func, *arguments, **function.keywords).request


def cell(request: AttentionRequest, block: blocks.Block) -> str:
    """Query tokens and keys of a block, its buffers, and the memory that they take."""
    keys = block.pages(request.page_size) * request.page_size
    return f"{block.tokens} x {keys}, {block.buffers}, {blocks.vmem_bytes(request, block) / MIB:.1f} MiB"


def table() -> str:
    """The sizes for each geometry on each generation, as Markdown."""
    lines = [
        f"| geometry | phase | {' | '.join(blocks.GENERATIONS)} |",
        f"|---|---|{'---|' * len(blocks.GENERATIONS)}",
    ]
    for geometry in GEOMETRIES.values():
        request, chosen = request_of(geometry), []
        for known in blocks.GENERATIONS.values():
            with mock.patch.object(blocks, "generation", return_value=known):
                chosen.append(blocks.choose(request, RaggedPageConfig()))
        for label, phase in ((geometry.label, "decode"), ("", "prefill")):
            cells = (cell(request, getattr(each, phase)) for each in chosen)
            lines.append(f"| {label} | {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)
