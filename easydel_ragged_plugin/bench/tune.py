"""``easydel-ragged tune``: which tile sizes are fastest on this machine's GPU.

Every candidate must give the right answer before it is timed. Decoding and prefill are measured apart: the winner of
each makes one entry of the user's cache file, which later processes read (``kernels/pallas_gpu/tiles.py``).
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from easydel_ragged_plugin.terminal import CommandError
from easydel_ragged_plugin.testing.cases import Row

from .cases import workload
from .problem import Problem, build, check, few_rows
from .timing import copies_beyond_cache, seconds_per_call
from .work import work

__all__ = ["Geometry", "run"]

Part = Literal["decode", "prefill"]

LEAST_GAIN = 0.98
"""A candidate takes the place of the present tiles when it needs no more than this part of their time."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is tuned: the parts of a request that decide how a tile runs."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str | None = None

    def problem(self, part: Part, platform: str, small: bool) -> Problem:
        """A decode step of 32 requests of 500 to 8000 tokens, or a prompt of 4096. ``small``: for an interpreter."""
        if part == "decode":
            rows = tuple(Row(500 + 242 * index, 1) for index in range(32))
            rows = (Row(40, 1), Row(7, 1)) if small else rows
        else:
            rows = (Row(24, 20),) if small else (Row(4096, 4096),)
        case = workload(f"tune-{part}", rows, **dataclasses.asdict(self))
        return build(case, "v2", copies=1 if small else copies_beyond_cache(case), platform=platform)


def candidates(part: Part, problem: Problem, small: bool) -> Iterator[Any]:
    """Tiles to measure, the present ones first: those of the other part stay as they are."""
    from easydel_ragged_plugin.config import RaggedPageConfig
    from easydel_ragged_plugin.kernels.pallas_gpu import tiles

    request = problem.request
    _, card = tiles.card()
    now = tiles.choose(request, RaggedPageConfig())
    yield now
    group = tiles.power_of_two(request.group_size)
    rows = sorted({max(16, group)} if part == "decode" else {max(each, group) for each in (32, 64, 128)})
    keys = (16, 32) if small else (32, 64, 128)
    warps = (4,) if small else (2, 4, 8) if part == "decode" else (4, 8)
    stages = (1,) if small else (2, 3, 4)
    waves = (4,) if small or part == "prefill" else (2, 4, 8)
    for sizes in itertools.product(rows, keys, warps, stages, waves):
        tile = tiles.Tile(*sizes[:4])
        if not tile.fits(request, card):
            continue
        changes: dict[str, Any] = {part: tile}
        if part == "decode":
            changes["programs"] = card.multiprocessors * sizes[4]
        found = dataclasses.replace(now, **changes)
        if found != now:
            yield found


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate: microseconds of a call, or why it has none."""

    tiles: Any
    us: float | None
    problem: str | None = None


def measure(problem: Problem, sizes: Any, interpret: bool) -> Measured:
    """Check a candidate's answer, then time it."""
    import jax

    from easydel_ragged_plugin.config import RaggedPageConfig
    from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU

    kernel = PallasGPU(interpret=interpret, tiles=sizes)

    def step(operands: Any) -> Any:
        return kernel.forward(problem.request, RaggedPageConfig(), operands)[:2]

    # A compiler may refuse a candidate in ways of its own (registers, shared memory): that is one that has lost.
    try:
        output, pages = jax.block_until_ready(jax.jit(step)(problem.operands))
        error, right = check(problem, output, pages, few_rows(problem.case))
        if not right:
            return Measured(sizes, None, f"wrong answer, off by up to {error:.3g}")
        expected = work(problem.case).seconds(1e12, 1e14)
        seconds, _ = seconds_per_call(
            problem, step, expected_s=1.0 if interpret else max(expected, 1e-5), repeats=1 if interpret else 3
        )
    except jax.errors.JaxRuntimeError as error:
        return Measured(sizes, None, str(error).splitlines()[0][:120])
    return Measured(sizes, 1e6 * seconds)


def write_entry(file: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry to the file of tuned tiles. The file appears whole or not at all; other entries stay."""
    from easydel_ragged_plugin.kernels.pallas_gpu import tiles

    entries: dict[str, Any] = {}
    if file.exists():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] == tiles.FORMAT:
                entries = dict(content["entries"])
        except (ValueError, KeyError, TypeError):
            entries = {}  # unreadable, which readers have been warning of: replaced
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": tiles.FORMAT, "entries": {**entries, key: entry}}, indent=2, sort_keys=True)
    descriptor, staged = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        os.replace(staged, file)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


def run(geometry: Geometry, *, interpret: bool = False) -> None:
    """See ``easydel-ragged tune --help``."""
    import jax

    from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU, tiles

    console = Console()
    backend = jax.default_backend()
    if backend != "gpu" and not interpret:
        raise CommandError(
            f"There is no GPU to tune for: JAX's default backend is {backend!r}. Tile sizes are of the kernel "
            "pallas_gpu alone. On a machine with a GPU, install JAX for it (pip install 'jax[cuda12]') and see what "
            "'easydel-ragged doctor' finds.",
            exit_code=1,
        )
    name, _ = tiles.card()
    name = name or "interpreter"
    best: dict[Part, Any] = {}
    key = ""
    entry: dict[str, Any] = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    for part in ("decode", "prefill"):
        problem = geometry.problem(part, "cpu" if interpret and backend == "cpu" else "gpu", interpret)
        refusal = PallasGPU(interpret=interpret).refuses(problem.request)
        if refusal is not None:
            raise CommandError(f"pallas_gpu does not take this: {refusal}", exit_code=1)
        key = tiles.tuned_key(name, problem.request)
        sizes = list(candidates(part, problem, interpret))
        results = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"{part} on {name}", total=len(sizes))
            for each in sizes:
                results.append(measure(problem, each, interpret))
                progress.advance(task)
        _show(console, part, results)
        first = results[0]
        if first.us is None:
            raise CommandError(f"the present tiles fail: {first.problem}. Nothing is written.", exit_code=1)
        best[part] = min(results, key=lambda each: math.inf if each.us is None else each.us)
        if best[part].us > LEAST_GAIN * first.us:
            best[part] = first
        entry[part] = {"us": best[part].us, "before_us": first.us, "case": problem.case.name}
    decode, prefill = best["decode"].tiles, best["prefill"].tiles
    winner = dataclasses.replace(decode, prefill=prefill.prefill)
    entry["tiles"] = dataclasses.asdict(winner)
    file = tiles.tuned_file()
    write_entry(file, key, entry)
    console.print(f"[green]✓[/green] written to {file}\n  {key}", highlight=False, soft_wrap=True)
    if interpret:
        console.print("  timed in an interpreter: these sizes say nothing about a GPU, and no GPU has this key")


def _show(console: Console, part: Part, results: list[Measured], most: int = 8) -> None:
    table = Table(title=part, title_justify="left")
    for column in ("rows", "keys", "warps", "stages", "programs", "us", ""):
        table.add_column(column, justify="left" if not column else "right")
    done = sorted((each for each in results if each.us is not None), key=lambda each: each.us or 0.0)
    failed = [each for each in results if each.us is None]
    for each in [*done[:most], *failed[:most]]:
        tile = getattr(each.tiles, part)
        sizes = (tile.rows, tile.keys, tile.warps, tile.stages, each.tiles.programs)
        note = each.problem or ("present" if each is results[0] else "")
        table.add_row(*map(str, sizes), "-" if each.us is None else f"{each.us:.1f}", note)
    console.print(table)
    if len(done) > most or len(failed) > most:
        console.print(f"  of {len(results)} candidates, {len(failed)} failed", highlight=False)
