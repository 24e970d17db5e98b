"""What ``easydel-ragged bench`` found: the results, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from easydel_ragged_plugin.terminal import CommandError, facts_as_text
from easydel_ragged_plugin.types import Kernel

from .peers import Peer

__all__ = ["Result", "Timing", "describe_kernels", "in_unit", "read", "show"]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One kernel on one case.

    Attributes:
        us: median microseconds of a call.
        share: time at the machine's limit / time taken; None where the limit says nothing.
        error: largest deviation of the answer from the float64 oracle, over the sampled queries; None: not finite.
        ratio: time / time on the case of the same work that ``Result.scaled_from`` names.
        samples_us: the timed runs.
        form: how it was called, and what is not counted, where that is a choice.
    """

    kernel: str
    us: float
    share: float | None
    error: float | None
    ratio: float | None
    samples_us: tuple[float, ...]
    form: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        bound: which limit binds: "read", "gemm", or "call" (none: the call's own cost counts).
        limit_us: the time that the machine's limit would allow; None for "call".
        read_bytes_per_s, gemm_flops_per_s: medians measured between the timed runs; the binding one alone.
        timings: this package's kernels, peers, then EasyDeL's.
        notes: why a candidate is missing, or wrong.
    """

    case: str
    version: str
    dtype: str
    bound: str
    limit_us: float | None
    read_bytes_per_s: float | None
    gemm_flops_per_s: float | None
    scaled_from: str | None
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Result:
        """What :func:`dataclasses.asdict` and JSON made of one."""
        timings = (Timing(**{**each, "samples_us": tuple(each["samples_us"])}) for each in fields["timings"])
        return cls(**{**fields, "timings": tuple(timings), "notes": tuple(fields["notes"])})


def in_unit(microseconds: float | None) -> str:
    """Three digits and a unit."""
    if microseconds is None:
        return "-"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.9995 * size:
            amount = microseconds / size
            return f"{amount:.{max(0, 2 - int(math.log10(max(amount, 1))))}f} {unit}"
    return f"{microseconds:.1f} µs"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def describe_kernels(kernels: Iterable[Kernel], peers: Iterable[Peer] = ()) -> dict[str, dict[str, Any]]:
    """What a report holds of each kernel and peer: this package's, peers, EasyDeL's own last."""
    others = list(peers)
    everyone: list[Kernel | Peer] = [*kernels, *others]
    ordered = sorted(everyone, key=lambda each: (each.is_hosts, each in others))
    return {
        each.name: {
            "label": each.label or each.name,
            "color": each.color,
            "is_hosts": each.is_hosts,
            "is_peer": each in others,
            "facts": each.facts(),
        }
        for each in ordered
    }


def _timed(report: Mapping[str, Any]) -> list[str]:
    """Names of the kernels that were timed, in the report's order."""
    names = {timing["kernel"] for result in report["results"] for timing in result["timings"]}
    return [name for name in report["kernels"] if name in names]


def _table(report: Mapping[str, Any], results: Sequence[Result]) -> Table:
    described = report["kernels"]
    kernels = _timed(report)
    of_host = next((name for name in kernels if described[name]["is_hosts"]), None)
    peers = [name for name in kernels if described[name].get("is_peer")]  # older files have no peers
    ours = [name for name in kernels if name != of_host and name not in peers]
    first = ours[0] if ours else None
    with_host = of_host is not None and len(ours) > 0
    title = "medians; share: time at the machine's limit / time taken"
    if peers and first is not None:
        title += f"; ratio: time taken / that of {first}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    for kernel in kernels:
        name = kernel if kernel in ours else described[kernel]["label"]
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
        if with_host and kernel in ours:
            table.add_column("faster", justify="right", no_wrap=True)
        if first is not None and kernel in peers:
            table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for result in results:
        timings = {timing.kernel: timing for timing in result.timings}
        host, own = timings.get(of_host or ""), timings.get(first or "")
        limit = f"{in_unit(result.limit_us)} {result.bound}" if result.limit_us is not None else "-"
        cells = [f"{result.case} {result.version} {result.dtype.replace('float', 'f')}", limit]
        for kernel in kernels:
            timing = timings.get(kernel)
            cells += ["-", "-"] if timing is None else [in_unit(timing.us), _percent(timing.share)]
            if with_host and kernel in ours:
                cells.append("-" if timing is None or host is None else f"{host.us / timing.us:.1f}x")
            if first is not None and kernel in peers:
                cells.append("-" if timing is None or own is None else f"{timing.us / own.us:.2f}")
        errors = [each.error for each in result.timings if each.error is not None and each.kernel in ours]
        table.add_row(*cells, f"{max(errors):.0e}" if errors else "-")
    return table


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print what ``--json`` holds, the engine's part excepted."""
    machine, limits = report["machine"], report["limits"]
    cache = machine["last_level_cache_bytes"]
    parts = [
        f"{machine['device']}, {machine['processors']} processors",
        *([f"{cache >> 20} MiB last-level cache"] if cache else []),
        *([f"reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s"] if limits else []),
        *([f"float32 GEMM {limits['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s"] if limits else []),
    ]
    console.print(", ".join(parts), highlight=False, soft_wrap=True)
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    console.print(", ".join([*versions, machine["date"]]), highlight=False, soft_wrap=True)
    for name in _timed(report):
        console.print(f"{name}: {facts_as_text(report['kernels'][name]['facts'])}", highlight=False, soft_wrap=True)
    results = [Result.from_json(each) for each in report["results"]]
    if results:
        console.print(_table(report, results))
    for result in results:
        for timing in result.timings:
            if timing.form:
                label = report["kernels"][timing.kernel]["label"]
                console.print(f"{result.case} {result.dtype} {label}: {timing.form}", highlight=False, soft_wrap=True)
            if timing.ratio is not None:
                text = f"{timing.ratio:.3f} x the time of {result.scaled_from}, timed in turns"
                console.print(f"{result.case} {result.dtype} {timing.kernel}: {text}", highlight=False, soft_wrap=True)
        for note in result.notes:
            console.print(f"{result.case} {result.dtype}: {note}", highlight=False, soft_wrap=True)


def read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        for each in report["results"]:
            Result.from_json(each)
        _ = report["machine"]["versions"], report["limits"], [report["kernels"][name] for name in _timed(report)]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"--from-json {file}: not a result of this command ({type(error).__name__}: {error}). "
            "Write one with 'easydel-ragged bench --json FILE'."
        ) from error
    return dict(report)
