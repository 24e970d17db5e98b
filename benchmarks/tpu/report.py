"""A report, read back from its JSON: tables, and the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits
from benchmarks.workloads import draw, ratio

from .table import CONTESTANTS, OURS

__all__ = ["figure", "text", "unmet"]

LIMIT = {"read": "copying", "gemm": "multiplying"}


def limits_of(report: dict[str, Any]) -> Limits | None:
    """The limits before the first workload; None in a dry run."""
    return Limits(**report["limits"][0]) if report["limits"] else None


def least_us(workload: dict[str, Any], found: Limits) -> tuple[float, str]:
    """The least time of a workload at the machine's limits, in microseconds, and which of them binds."""
    moving, computing = (
        1e6 * needed / limit
        for needed, limit in zip((workload["moved_bytes"], workload["flops"]), dataclasses.astuple(found), strict=True)
    )
    return (moving, "read") if moving >= computing else (computing, "gemm")


def timings(report: dict[str, Any], workload: dict[str, Any], found: Limits | None) -> list[dict[str, Any]]:
    """The right answers to a workload, each with its share of the limit where there is one."""
    right = [each for each in report["results"] if each["case"] == workload["case"] and each["status"] == "right"]
    if found is None:
        return [{**each, "share": 0.0} for each in right]
    least, _ = least_us(workload, found)
    return [{**each, "share": least / each["us"]} for each in right]


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts, found = report["machine"], limits_of(report)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{facts['device']}, {versions}, {facts['date']}", ""]
    if found is None:
        lines += ["DRY RUN: short contexts, interpreted. Answers are checked; nothing is timed.", ""]
    else:
        lines += [f"Limits before: {found.text()}"]
        lines += [f"Limits after: {Limits(**each).text()}" for each in report["limits"][1:]]
        lines += [""]
    lines += ["| workload | kernel | us | share of the limit | error |", "|---|---|---|---|---|"]
    for workload in report["workloads"]:
        label = f"{workload['case']} ({workload['geometry']}, {workload['cache']})"
        if found is not None:
            least, bound = least_us(workload, found)
            label += f", {LIMIT[bound]}: {least:.1f} us"
        shares = {(each["kernel"], each["version"]): each["share"] for each in timings(report, workload, found)}
        for each in report["results"]:
            if each["case"] != workload["case"]:
                continue
            name = f"{each['kernel']} {each['version']}"
            if each["status"] != "right":
                lines.append(f"| {label} | {name} | {each['status']} | | {cell(each['why'])} |")
            elif found is None:
                lines.append(f"| {label} | {name} | right | | {each['error']:.1e} |")
            else:
                share = f"{100 * shares[each['kernel'], each['version']]:.0f} %"
                lines.append(f"| {label} | {name} | {each['us']:.1f} | {share} | {each['error']:.1e} |")
            label = ""
    ratios = [] if found is None else ratio_lines(report, found)
    return "\n".join([*lines, *([""] if ratios else []), *ratios])


def cell(words: str) -> str:
    """``words`` in a cell of a table."""
    return words.replace("|", "/")


def ratio_lines(report: dict[str, Any], found: Limits) -> list[str]:
    """The others' times beside those of this package's kernel."""
    results = [{"timings": timings(report, workload, found)} for workload in report["workloads"]]
    lines = []
    for each in CONTESTANTS:
        value = None if each.name == OURS else ratio(results, each, OURS)
        if value is not None:
            lines.append(f"{each.name} {each.version}: {value:.2f} times the time of {OURS}, median")
    return lines


def unmet(report: dict[str, Any]) -> list[str]:
    """Workloads to which this package's kernel has no right answer though it does not refuse them."""
    return [
        f"{each['case']} {each['version']}: {each['status']}, {each['why']}"
        for each in report["results"]
        if each["kernel"] == OURS and each["status"] not in ("right", "refused")
    ]


def figure(report: dict[str, Any], file: Path) -> None:
    """Draw the picture of ``report`` into ``file``. A dry run has none: there is no time."""
    found = limits_of(report)
    if found is None:
        raise ValueError("--figure: got the report of a dry run, which has no times; wanted one of a TPU.")
    results = []
    for workload in report["workloads"]:
        least, bound = least_us(workload, found)
        own = timings(report, workload, found)
        results.append({**workload, "dtype": "bfloat16", "bound": bound, "limit_us": least, "timings": own})
    draw(results, CONTESTANTS, report["machine"], found, False, file)
