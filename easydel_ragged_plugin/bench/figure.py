"""The figure of a benchmark: how close each kernel comes to the machine's limit, for each workload."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easydel_ragged_plugin.terminal import CommandError

__all__ = ["draw", "require"]

OTHER_COLORS = ("#8c6bb1", "#6b7280", "#b5838d")
"""Of kernels that name none."""
LIMITS = {"read": "memory", "gemm": "float32 GEMM"}
INK, FAINT = "#1f2933", "#6b7785"

LONGEST = 1.25
"""Longer bars are cut, with an arrow: a bfloat16 product can be several times as fast as the float32 one."""

DPI = 160
WIDTH, FOOTER, BAR = 10.0, 0.6, 0.2
"""Inches: of the picture, below the axes, of a bar."""
GAP = 1.2
"""Between workloads, in bars."""


def require(file: Path) -> None:
    """Raise CommandError, with what to do, where there is no matplotlib, or it can't write such a file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--figure needs matplotlib, which this environment lacks. Run: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix and file.suffix[1:].lower() not in formats:
        raise CommandError(f"--figure {file}: got {file.suffix}, wanted one of {', '.join(formats)}.")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def _kernels(report: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """(label, color) of each kernel that has a bar, in the order of the legend."""
    names = {timing["kernel"] for each in results for timing in each["timings"]}
    others = itertools.cycle(OTHER_COLORS)
    return {
        name: (known["label"], known["color"] or next(others))
        for name, known in report["kernels"].items()
        if name in names
    }


def _subtitle(report: Mapping[str, Any]) -> str:
    if "subtitle" in report:
        return report["subtitle"]
    machine, limits = report["machine"], report["limits"]
    count = machine["processors"]
    isas = {known["facts"]["isa"] for known in report["kernels"].values() if "isa" in known["facts"]}
    first = (
        f"{', '.join([machine['device'], *sorted(isas)])}, {count} processor{'s' * (count != 1)}: reads "
        f"{limits['read_bytes_per_s'] / 1e9:.1f} GB/s, float32 GEMM {limits['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    versions = (f"{name} {version}" for name, version in machine["versions"].items())
    return f"{first}\n{' · '.join([*versions, machine['date']])}"


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Write the picture of ``report`` (the content of ``bench --json``) to ``file``.

    ``report["kernels"]`` has label and color of each kernel, in the order of the legend. A report of other origin has a
    ``subtitle`` of its own and ``limit_names``. ``dry_run`` writes across the picture that its figures mean nothing.

    Raises:
        CommandError: there is no matplotlib, or the report holds no workload with a limit.
    """
    require(file)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    results = [each for each in report["results"] if each["limit_us"] is not None and each["timings"]]
    if not results:
        raise CommandError("figure: got no workload with a limit, wanted one at least; 'tiny' and 'engine' have none.")
    limit_names = report.get("limit_names", LIMITS)
    kernels = _kernels(report, results)
    starts, rows = [], 0.0  # the first bar of each workload, counted in bars
    for each in results:
        starts.append(rows)
        rows += len(each["timings"]) + GAP
    columns = min(4, len(kernels))
    header = 1.15 + 0.2 * (-(-len(kernels) // columns) - 1)
    height = header + BAR * rows + FOOTER
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.265, FOOTER / height, 0.70, BAR * rows / height))
    top = 1.0
    for place, (kernel, (label, color)) in enumerate(kernels.items()):
        shares, positions = [], []
        for start, each in zip(starts, results, strict=True):
            order = sorted((timing["kernel"] for timing in each["timings"]), key=list(kernels).index)
            found = [timing["share"] for timing in each["timings"] if timing["kernel"] == kernel]
            if found:
                shares.append(found[0])
                positions.append(start + order.index(kernel))
        bars = [min(share, LONGEST) for share in shares]
        axes.barh(positions, bars, 0.86, color=color, label=label, zorder=2)
        for share, position in zip(shares, positions, strict=True):
            cut = share > LONGEST
            axes.annotate(
                f"{_percent(share)} \u2192" if cut else _percent(share),
                (min(share, LONGEST), position),
                xytext=(-5 if cut else 4, 0),
                textcoords="offset points",
                ha="right" if cut else "left",
                va="center",
                fontsize=8,
                color="white" if cut else INK,
                fontweight="bold" if place == 0 else "normal",
                # White behind it, where it lies over the line at 100 %.
                bbox={"facecolor": color if cut else "white", "edgecolor": "none", "pad": 0.8},
                zorder=3,
            )
        top = max([top, *bars])
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(0, 1.09 * top)
    axes.set_ylim(rows - GAP / 2 - 0.5, -GAP / 2 - 0.5)
    middles = [start + (len(each["timings"]) - 1) / 2 for start, each in zip(starts, results, strict=True)]
    axes.set_yticks(middles, [f"{name}\n" for name in _row_labels(results)])
    for row, each in zip(middles, results, strict=True):
        axes.annotate(
            f"limit: {limit_names[each['bound']]}",
            (0, row),
            xytext=(-3.5, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=FAINT,
            annotation_clip=False,
        )
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_xlabel("share of the limit: time at the machine's read or GEMM rate / time taken", color=FAINT, fontsize=9)
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
    axes.tick_params(axis="x", length=0, labelsize=8.5, labelcolor=FAINT)
    axes.grid(axis="x", color="#e4e8ec", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    title = f"Ragged page attention {'/'.join(dict.fromkeys(each['version'] for each in results))}"
    dtypes = {each["dtype"] for each in results}
    if len(dtypes) == 1:
        title += f", {dtypes.pop()}"
    figure.text(
        0.02, 1 - 0.32 / height, f"{title}: how close to the machine's limit", fontsize=14, weight="bold", color=INK
    )
    figure.text(0.02, 1 - 0.45 / height, _subtitle(report), fontsize=8.5, color=FAINT, va="top", linespacing=1.45)
    if report.get("dry_run"):
        axes.text(
            0.5, 0.5, "dry run: these bars mean nothing", transform=axes.transAxes, rotation=30, fontsize=26,
            ha="center", va="center", color="#b42318", alpha=0.22, weight="bold", zorder=4,
        )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.012, 1 - 0.82 / height),
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
        handleheight=0.9,
        columnspacing=1.6,
    )
    figure.savefig(file, dpi=DPI)


def _row_labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    several_versions = len({each["version"] for each in results}) > 1
    several_dtypes = len({each["dtype"] for each in results}) > 1
    labels = []
    for each in results:
        name = each["case"]
        if several_versions:
            name += f" {each['version']}"
        if several_dtypes:
            name += f" {each['dtype'].replace('float', 'f')}"
        labels.append(name)
    return labels
