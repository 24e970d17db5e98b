"""How long the schedules of the TPU kernels are: instructions (VLIW bundles) of their inner loops for each key.

libtpu compiles each program for a described TPU, in a process of its own, and writes the final schedule of each kernel
as text. A TPU core starts one bundle in a cycle, in the order of that text, so the number of bundles is the least
number of cycles. Waits for memory and for results come on top and can't be seen here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from . import described, sizes
from .listing import TILE_KEYS, TILE_TOKENS, Figure, figures_of_others, figures_of_ours
from .processes import answer, started
from .programs import FIELDS, GEOMETRIES, PAGE_SIZE, Program, compile_one

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tpu.md"
MARKERS = "<!-- {}: begin -->", "<!-- {}: end -->"

DISTRIBUTIONS = ("jax", "libtpu", "ejkernel")
"""What makes the schedules."""


def measured(program: Program, limit_s: float) -> dict[str, Any]:
    """Compile ``program`` in a process of its own and read its schedules: figures, or why there are none."""
    with tempfile.TemporaryDirectory(prefix="schedules-") as folder:
        asked = dataclasses.asdict(program)
        about = started(asked, limit_s, command="schedules", variables=described.dumping(folder))
        why = about.get("why")
        if why:
            return {"figures": [], "why": why}
        try:
            figures = figures_in(Path(folder), about["calls"])
        except ValueError as error:
            return {"figures": [], "why": str(error)}
        why = None if figures else "libtpu wrote no schedule of a kernel"
        return {"figures": [dataclasses.asdict(each) for each in figures], "why": why}


def figures_in(folder: Path, calls: Sequence[dict[str, Any]]) -> list[Figure]:
    """The figures of the kernels whose schedules lie in ``folder``: of ``calls``, or of others where there are none.

    Raises:
        ValueError: a schedule does not have the loops that it should.
    """
    figures = []
    for file in sorted(folder.glob("*[0-9]-final_bundles.txt")):
        with file.open(encoding="utf-8", errors="replace") as listing:
            for call in calls:
                if f"ragged_attention_{call['phase']}" in file.name:
                    figures += figures_of_ours(call, listing)
            if not calls:
                figures += figures_of_others(file.name, listing)
    return figures


# The table.


def programs(
    kinds: Sequence[str], geometries: Sequence[str], chosen: Sequence[str] | None, peer: str | None
) -> list[Program]:
    """What is compiled, one after the other."""
    from easydel_ragged_plugin.kernels import ejkernel, pallas_tpu

    kernels: list[tuple[str, str | None]] = [(pallas_tpu.KERNEL.name, None)]
    if ejkernel.unavailable() is None:
        kernels.append((ejkernel.KERNEL.name, None))
    if peer:
        kernels.append(("tpu-inference", peer))
    every = [Program(kind, name, *kernel) for kernel in kernels for name in geometries for kind in kinds]
    return [each for each in every if not chosen or each.kernel in chosen]


def versions() -> dict[str, str]:
    """Versions of what makes the schedules."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def place_of(kernel: str) -> int:
    """Where a kernel stands among the rows, however the report came about: this package's is first."""
    from easydel_ragged_plugin.kernels import ejkernel, pallas_tpu

    names = (pallas_tpu.KERNEL.name, ejkernel.KERNEL.name)
    return names.index(kernel) if kernel in names else len(names)


def rows_of(report: dict[str, Any], phase: str) -> list[str]:
    """The table's rows of one phase: a geometry, a kernel and a kind of block each; a column for each TPU."""
    results, rows = report["programs"], []
    kernels = sorted({each["kernel"] for each in results}, key=place_of)
    for geometry in GEOMETRIES:
        first = True
        for kernel in kernels:
            of_kernel = {
                each["kind"]: each for each in results if (each["geometry"], each["kernel"]) == (geometry, kernel)
            }
            found = {kind: [Figure(**f) for f in each["figures"] if f["phase"] == phase]
                     for kind, each in of_kernel.items()}  # fmt: skip
            for block in dict.fromkeys(figure.block for each in found.values() for figure in each):
                cells = []
                for kind in described.TOPOLOGIES:
                    figure = next((each for each in found.get(kind, ()) if each.block == block), None)
                    cells.append("—" if figure is None else cell(figure))
                label = GEOMETRIES[geometry].label if first else ""
                name = f"`{kernel}`" + ("" if block == "any" else f", {block} blocks")
                rows.append(f"| {label} | {name} | {' | '.join(cells)} |")
                first = False
    return rows


def cell(figure: Figure) -> str:
    """A figure, with the sizes that it is of."""
    sizes = f"{figure.keys}" if figure.phase == "decode" else f"{figure.tokens} x {figure.keys}"
    if figure.phase == "decode":
        return f"{figure.per_key:.2f} ({sizes})"
    return f"{figure.per_key * TILE_KEYS:,.0f} / {figure.per_key:.1f} ({sizes})"


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    head = f"| geometry | kernel | {' | '.join(described.TOPOLOGIES)} |\n|---|---|{'---|' * len(described.TOPOLOGIES)}"
    lines = [
        f"Compiled with {named}; bfloat16 queries, pages of {PAGE_SIZE}.",
        "",
        "Decode: bundles for each key, of all heads (in brackets the keys of a block):",
        "",
        head,
        *rows_of(report, "decode"),
        "",
        f"Prefill: bundles for {TILE_TOKENS} query tokens and {TILE_KEYS} keys, and for {TILE_TOKENS} query tokens and "
        "one key, of all heads (in brackets the query tokens and keys of a block):",
        "",
        head,
        *rows_of(report, "prefill"),
    ]
    missing = sorted((each for each in report["programs"] if each["why"]), key=lambda each: place_of(each["kernel"]))
    if missing:
        lines += ["", "No figure:", ""]
        together: dict[tuple[str, str, str], list[str]] = {}
        for each in missing:
            together.setdefault((each["kernel"], each["geometry"], each["why"]), []).append(each["kind"])
        for (kernel, geometry, why), kinds in together.items():
            lines.append(f"- `{kernel}`, {GEOMETRIES[geometry].label}, on {', '.join(kinds)}: {why}")
    return "\n".join(lines)


def written_into(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers ``name``."""
    begin, end = (each.format(name) for each in MARKERS)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"got a page without the lines {begin} and {end}, wanted each of them once")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def merged(report: dict[str, Any], result: dict[str, Any]) -> None:
    """Put ``result`` in the place of an older one of the same program."""
    own = [each for each in report["programs"] if each["program"] != result["program"]]
    report["programs"] = [*own, result]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--kind", action="append", choices=tuple(described.TOPOLOGIES), help="a TPU (default: all)")
    parser.add_argument("--geometry", action="append", choices=tuple(GEOMETRIES), help="a geometry (default: all)")
    parser.add_argument("--kernel", action="append", help="a kernel by name (default: all)")
    parser.add_argument("--peer", metavar="PATH", help="sources of tpu-inference, to have its kernel in the table, too")
    parser.add_argument(
        "--json", type=Path, help="keep the figures in this file; those that it has of the same versions stay"
    )
    parser.add_argument("--table-only", action="store_true", help="compile nothing: the table of --json's file")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for one program (default: 900)")
    parser.add_argument("--write", action="store_true", help="put the table, and that of block sizes, into docs/tpu.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.one:
        answer(options.one, lambda asked: compile_one(Program(**{name: asked[name] for name in FIELDS})))
        return 0
    report: dict[str, Any] = {"versions": versions(), "programs": []}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        if options.table_only or before["versions"] == report["versions"]:
            report = before
    if "libtpu" not in report["versions"] and not options.table_only:
        print("libtpu is not installed. Install it with JAX: pip install 'jax[tpu]'", file=sys.stderr)
        return 2
    kinds, geometries = options.kind or tuple(described.TOPOLOGIES), options.geometry or tuple(GEOMETRIES)
    chosen = programs(kinds, geometries, options.kernel, options.peer)
    for program in () if options.table_only else chosen:
        print(program.key, file=sys.stderr, flush=True)
        about = {"program": program.key, "kind": program.kind, "geometry": program.geometry, "kernel": program.kernel}
        merged(report, {**about, **measured(program, options.limit)})
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = table(report)
    print(text)
    if options.write:
        jax.config.update("jax_platforms", "cpu")  # block sizes are computed here, and need no TPU
        page = written_into(PAGE.read_text(encoding="utf-8"), "sizes", sizes.table())
        PAGE.write_text(written_into(page, "schedules", text), encoding="utf-8")
    return 0
