"""``easydel-ragged doctor``: what is installed, what is active, which kernel would run, and is its answer right.

Text shows what a user needs. ``--json`` and ``--markdown`` have the whole report, for support.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from easydel_ragged_plugin import cache_folder, host, startup, system
from easydel_ragged_plugin.config import KERNEL_VARIABLE, cache_dir
from easydel_ragged_plugin.terminal import CommandError, facts_as_text, fields_as_text, hushed, in_unit, markdown_block

if TYPE_CHECKING:
    from easydel_ragged_plugin.select import Selection

__all__ = ["Report", "as_markdown", "examine", "run"]

IMPORTED_BY_EASYDEL = ("eformer", "transformers", "torch")
BESIDE = ("numpy", "flax", "ray", "libtpu")
"""Further distributions of the whole report, as are the plugins of JAX."""

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""A setting of the C library: it requests huge pages of memory for what is allocated."""
OLDEST_GLIBC = (2, 35)
"""From then on the C library has it."""

Line = tuple[str, str | None]
"""A line of text and its style in a terminal."""


@dataclasses.dataclass
class Report:
    """What the command found; ``--json`` prints these fields.

    No value is in it that may be a secret: see :func:`.system.environment`.

    Attributes:
        versions: distribution to version, None where it is not installed.
        environment: the variables of this package, EasyDeL and JAX that are set.
        activation: None without EasyDeL; else whether it can be imported, ``status()`` as text and the classes that
            serve the operations.
        hooks: registered hook plugins.
        machine: see :func:`.system.machine`.
        jax: JAX's settings, those that EasyDeL makes included.
        cache: the cache folder, what of this package lies in it, and the number of other things; or why it can't be
            read.
        notes: what a user should know, none of it an error.
        problems: why the exit code is not 0.
        devices: JAX's devices. Where JAX does not start there are none, and what follows is empty.
        kernels: each kernel's own facts: whether it is available, else the reason, and what else it says of itself.
        selection: for v2 and v3, the kernel a typical decode step gets and why each other one is passed over.
        self_check: for v2 and v3, "ok" with the largest error, or what went wrong. Without a kernel it is not run.
        without: kernels that would be chosen, and are not available.
        fingerprint: what must be equal on all workers that serve one model. Empty where EasyDeL can't be imported.
    """

    python: str
    versions: dict[str, str | None]
    environment: dict[str, str]
    activation: dict[str, Any] | None
    hooks: list[str]
    machine: dict[str, dict[str, Any]]
    jax: dict[str, Any]
    cache: dict[str, Any]
    notes: list[str]
    problems: list[str]
    devices: list[str] = dataclasses.field(default_factory=list)
    kernels: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    selection: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    self_check: dict[str, str] = dataclasses.field(default_factory=dict)
    without: list[str] = dataclasses.field(default_factory=list)
    fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 when nothing is wrong."""
        return 1 if self.problems else 0

    @property
    def verdict(self) -> str:
        """The report in one line."""
        if self.problems:
            return "problems"
        if self.without:
            return f"works, without the fast kernel: {', '.join(self.without)} is not available (see kernels)"
        return "all is well"


def _activation(problems: list[str], notes: list[str]) -> dict[str, Any] | None:
    version = host.host_version()
    if version is None:
        notes.append(
            "EasyDeL is not installed: the functions work, there is no engine to serve with. "
            f"Run: pip install {' '.join(host.PACKAGES)}"
        )
        return None
    if version not in host.SUPPORTED:
        notes.append(f"EasyDeL {version} is not one of the tested versions ({', '.join(host.SUPPORTED)}).")
    # Whatever EasyDeL raises here is a finding, too.
    try:
        registry = host.registry()
    except Exception as error:
        problems.append(f"EasyDeL {version} can't be imported: {type(error).__name__}: {error}")
        text = "EasyDeL can't be imported, see problems"
        return {"imported": False, "active": False, "status": text, "operations": {}, "replaced": {}, "failures": []}
    status = startup.status()
    if not status.active:
        problems.append(f"the plugin is not active in EasyDeL: {str(status).splitlines()[0]}")
    return {
        "imported": True,
        "active": status.active,
        "status": str(status),
        "operations": {name: _path(registry.get(name)) for name in host.OPERATION_NAMES},
        "replaced": {name: _path(startup.original(name)) for name in host.OPERATION_NAMES},
        "failures": [str(failure) for failure in status.failures],
    }


def _path(cls: type | None) -> str | None:
    return None if cls is None else f"{cls.__module__}.{cls.__qualname__}"


def _selection(probes: Mapping[str, Selection | Exception], problems: list[str]) -> dict[str, dict[str, Any]]:
    """For v2 and v3, what a decode step would get. What keeps both from a kernel is one problem."""
    found: dict[str, dict[str, Any]] = {}
    errors: dict[str, list[str]] = {}
    for version in ("v2", "v3"):
        chosen = probes[f"{version} decode"]
        if isinstance(chosen, Exception):
            found[version] = {"kernel": None, "refusals": {}, "error": str(chosen)}
            errors.setdefault(str(chosen).partition(" Request: ")[0], []).append(version)
        else:
            refusals = {each.kernel: each.reason for each in chosen.refusals}
            found[version] = {"kernel": chosen.kernel, "refusals": refusals}
    named = os.environ.get(KERNEL_VARIABLE)
    for text, versions in errors.items():
        problems.append(f"{' and '.join(versions)}{f' with {KERNEL_VARIABLE}={named}' if named else ''}: {text}")
    return found


def _without(probes: Mapping[str, Selection | Exception]) -> list[str]:
    """Kernels that come before the chosen one on this platform, and are not available: what makes calls slower."""
    from easydel_ragged_plugin import select

    known, names = select.kernels(), []
    for chosen in probes.values():
        if isinstance(chosen, Exception) or chosen.config.kernel != "auto":
            continue
        for name in select.ORDER.get(chosen.request.platform, ()):
            if name == chosen.kernel:
                break
            # One that improves on another is missed by nobody who has not tried it; where it was, its notes say so.
            if known[name].improves_on is None and not known[name].facts()["available"]:
                names.append(name)
    return list(dict.fromkeys(names))


def _cache() -> dict[str, Any]:
    """What this package keeps on disk. Files of others are counted, their names are nobody's business."""
    folder = cache_dir()
    try:
        found = cache_folder.entries(folder)
    except CommandError as error:
        return {"folder": str(folder), "error": str(error)}
    ours = [each for each in found if each.kind is not None]
    return {"folder": str(folder), "entries": cache_folder.as_fields(ours), "others": len(found) - len(ours)}


def _self_check(version: Any) -> str:
    """Compare a small batch (a prompt, decodes, a chunk, padding, a dead row) with the float64 oracle."""
    import jax.numpy as jnp
    import numpy as np

    from easydel_ragged_plugin import api
    from easydel_ragged_plugin.options import Options
    from easydel_ragged_plugin.testing.batches import Case, Row, build_batch
    from easydel_ragged_plugin.testing.tolerances import tolerance_for

    rows = (Row(11, 1), Row(5, 1), Row(9, 9), Row(14, 6))
    window = Options(sliding_window=10)
    case = Case("doctor", rows, options=window, num_tokens=20, num_rows=5, num_pages=24)
    batch = build_batch(case, version)
    index: Any = [jnp.asarray(a) for a in (batch.context_lens, batch.block_tables, batch.query_start_loc)]
    queries, keys, values = (jnp.asarray(a) for a in (batch.queries, batch.keys, batch.values))
    options = case.options.keywords()
    pages: Any
    if version == "v2":
        pages = jnp.asarray(batch.updated_pages)
        arguments: Any = (queries, pages, *index, jnp.asarray(batch.num_seqs))
        output = api.ragged_page_attention_v2(*arguments, **options)
    else:
        arguments = (queries, keys, values, jnp.asarray(batch.pages), *index, jnp.asarray(batch.distribution))
        output, pages = api.ragged_page_attention_v3(*arguments, **options)
    expected, expected_pages = batch.expected()
    difference = np.abs(np.asarray(output, np.float64) - expected)
    bound = tolerance_for(case)
    if not (difference <= bound.atol + bound.rtol * np.abs(expected)).all():
        return f"WRONG: the answer is off by up to {difference.max():.3g}"
    if np.asarray(pages).tobytes() != expected_pages.tobytes():
        return "WRONG: the pages after the call are not the right ones"
    return f"ok (largest error {difference.max():.1e})"


def _notes(backend: str, host_version: str | None) -> list[str]:
    notes = []
    if os.environ.get(KERNEL_VARIABLE):
        notes.append(f"{KERNEL_VARIABLE} is set: that kernel runs or raises, nothing else is tried.")
    if backend == "gpu" and host_version:
        notes.append(
            "On GPU EasyDeL prefers unified_attention: ask for attn_mechanism='ragged_page_attention_v3' explicitly."
        )
    if backend == "cpu" and host_version:
        notes.append(
            "On CPU EasyDeL's page update for v2 converts the whole bfloat16 cache to float32 and back in each "
            "layer of each step. Serve with v3, or with a float16 or float32 cache."
        )
    if backend == "cpu" and host_version == "0.2.0.2":
        notes.append(
            "EasyDeL 0.2.0.2 can't size its cache on CPU (per_device_hbm_budget_bytes raises AttributeError); "
            "'easydel-ragged demo' works around it."
        )
    return notes


def _huge_pages(backend: str, kernels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """That the cache could lie in huge pages, where the system gives them on request and no kernel moves it there.

    Args:
        kernels: the facts of each.
    """
    libc = re.fullmatch(r"glibc (\d+)\.(\d+)", system.operating_system()["libc"] or "")
    if (
        backend != "cpu"
        or any(facts.get("huge_pages") == "used" for facts in kernels.values())
        or system.huge_pages()["transparent"] != "madvise"
        or libc is None
        or (int(libc[1]), int(libc[2])) < OLDEST_GLIBC
        or HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", "").split(":")
    ):
        return []
    return [
        "Linux gives huge pages of memory only on request here. A server with "
        f"GLIBC_TUNABLES={HUGE_PAGES} in its environment decodes up to 1.4 times as fast."
    ]


def examine(say: Any = lambda text: None) -> Report:
    """Run all checks.

    Args:
        say: called with a line of text before each step.
    """
    problems: list[str] = []
    notes: list[str] = []
    # Before EasyDeL is imported, which adds to XLA_FLAGS.
    environment = system.environment(os.environ)
    say("importing EasyDeL (10 to 20 seconds)" if host.host_version() else "importing JAX")
    activation = _activation(problems, notes)
    import jax

    from easydel_ragged_plugin import select, workers

    versions = workers.versions((*workers.DISTRIBUTIONS, *IMPORTED_BY_EASYDEL, *BESIDE, *system.jax_plugins()))
    report = Report(
        python=platform.python_version(),
        versions=versions,
        environment=environment,
        activation=activation,
        hooks=workers.hook_plugins(),
        machine=system.machine(),
        jax=system.jax_settings(),
        cache=_cache(),
        notes=notes,
        problems=problems,
    )
    try:
        report.devices = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:  # of a platform that is named and not there, or a driver
        problems.append(f"JAX does not start: {error}")
        return report
    say("selecting kernels")
    kernels = select.kernels()
    probes = workers.explain_probes()
    report.selection = _selection(probes, problems)
    for version in ("v2", "v3"):
        if report.selection[version]["kernel"] is None:
            report.self_check[version] = "not run: no kernel takes the call"
            continue
        say(f"checking {version} against the reference")
        # Whatever a kernel raises here is the finding that this command exists to report.
        try:
            report.self_check[version] = _self_check(version)
        except Exception as error:
            report.self_check[version] = f"FAILED: {type(error).__name__}: {error}"
        if not report.self_check[version].startswith("ok"):
            problems.append(f"self-check of {version}: {report.self_check[version]}")
    report.kernels = {name: kernel.facts() for name, kernel in kernels.items()}
    report.without = _without(probes)
    if activation is None or activation["imported"]:
        report.fingerprint = workers.fingerprint()
    platform_name = jax.default_backend()
    notes += _notes(platform_name, host.host_version())
    notes += _huge_pages(platform_name, report.kernels)
    notes += [note for kernel in kernels.values() for note in kernel.notes(platform_name)]
    return report


def _sections(report: Report) -> dict[str, list[Line]]:
    """What a user needs, by title."""
    shown: dict[str, list[Line]] = {}

    def add(title: str, *lines: str) -> None:
        if lines:
            shown[title] = [(line, None) for line in lines]

    first = {name: report.versions[name] for name in report.versions if name not in _further(report)}
    versions = (f"{name} {version or 'not installed'}" for name, version in first.items())
    add("versions", f"python {report.python} ({sys.executable})", *versions)
    add("devices", *report.devices)
    add("environment", *(f"{name}={value}" for name, value in report.environment.items()))
    active = report.activation
    add("activation", *(["no EasyDeL: functions only"] if active is None else active["status"].splitlines()))
    add("kernels", *(f"{name}: {facts_as_text(facts)}" for name, facts in report.kernels.items()))
    choice = []
    for versions_alike, chosen in _alike(report.selection).items():
        choice.append(f"{versions_alike}: {chosen['kernel'] or 'none, see problems'}")
        for name, reason in chosen["refusals"].items():
            known = "not available" if reason == report.kernels[name].get("reason") else reason
            choice.append(f"    not {name}: {known}")
    add("chosen for a decode step (8 requests, 32/8 heads, head_dim 128, pages of 128, bfloat16)", *choice)
    if report.hooks:
        add("hook plugins", ", ".join(report.hooks))
    for version, outcome in report.self_check.items():
        ok = outcome.startswith("ok")
        known = outcome if ok else f"{outcome.partition(':')[0]}, see problems"
        shown.setdefault("self-check", []).append((f"{version}: {known}", "green" if ok else "red"))
    add("notes", *report.notes)
    return shown


def _further(report: Report) -> list[str]:
    """Distributions that only the whole report shows."""
    from easydel_ragged_plugin import workers

    return [name for name in report.versions if name not in (*workers.DISTRIBUTIONS, *IMPORTED_BY_EASYDEL)]


def _surroundings(report: Report) -> dict[str, list[str]]:
    """The rest of the report, by title: what support asks for."""
    cache = report.cache
    if "error" in cache:
        kept = [cache["error"]]
    else:
        kept = [f"{each['name']}: {each['kind']}, {in_unit(each['size_bytes'])}" for each in cache["entries"]]
        kept += [f"things of others: {cache['others']}"] if cache["others"] else []
    further = _further(report)
    missing = [name for name in further if report.versions[name] is None]
    installed = [f"{name} {report.versions[name]}" for name in further if name not in missing]
    return {
        "machine": [
            f"{title.replace('_', ' ')}: {fields_as_text(fields) or 'not known'}"
            for title, fields in report.machine.items()
        ],
        "further packages": [*installed, *([f"not installed: {', '.join(missing)}"] if missing else [])],
        "JAX's settings": [f"{name}: {value}" for name, value in report.jax.items()],
        f"cache folder {cache['folder']}": kept or ["nothing there"],
        "fingerprint": [f"{name}: {value}" for name, value in report.fingerprint.items()],
    }


def _print(console: Console, report: Report) -> None:
    def line(text: str, style: str | None = None) -> None:
        console.print(f"  {text}", style=style, markup=False, highlight=False, soft_wrap=True)

    for title, lines in _sections(report).items():
        console.print(f"\n[bold]{title}[/bold]")
        for text, style in lines:
            line(text, style)
    console.print()
    color = "red" if report.problems else "yellow" if report.without else "green"
    console.print(report.verdict, style=f"bold {color}", highlight=False, soft_wrap=True)
    for problem in report.problems:
        line(problem, "red")
    console.print("\nto report a problem: easydel-ragged doctor --markdown", style="dim", highlight=False)


def as_markdown(report: Report, home: str) -> str:
    """The whole report, to paste into an issue: a heading, what a user needs, and the rest folded.

    Args:
        home: the user's home folder, whose name is not shown.
    """
    needed = {"problems": report.problems} if report.problems else {}
    needed |= {title: [text for text, _ in lines] for title, lines in _sections(report).items()}
    return f"""\
### easydel-ragged doctor: {report.verdict}

{markdown_block(needed, home)}

<details><summary>machine, packages, settings, cache, fingerprint</summary>

{markdown_block(_surroundings(report), home)}

</details>
"""


def _alike(selection: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The choices by versions, those with the same choice together; an error is told with the problems."""
    found: dict[str, dict[str, Any]] = {}
    for version, chosen in selection.items():
        shown = {name: chosen[name] for name in ("kernel", "refusals")}
        same = next((versions for versions, other in found.items() if other == shown), None)
        found[version if same is None else f"{same} and {version}"] = shown if same is None else found.pop(same)
    return found


@contextlib.contextmanager
def _scratch_log() -> Iterator[Path]:
    """A file for the host's log, gone afterwards. A report is wanted where the disk is full, too."""
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        except OSError:
            folder = None
        yield Path(os.devnull) if folder is None else folder / "doctor.log"


def run(*, as_json: bool, markdown: bool, verbose: bool) -> int:
    """See ``easydel-ragged doctor --help``. Returns the exit code."""
    if as_json and markdown:
        raise CommandError("--json and --markdown: got both, wanted one of them.")
    with _scratch_log() as log, hushed(None if verbose else log) as console:
        if as_json or markdown:
            report = examine()
            if as_json:
                text = json.dumps({**dataclasses.asdict(report), "verdict": report.verdict}, indent=2) + "\n"
            else:
                text = as_markdown(report, os.path.expanduser("~"))
            console.file.write(text)
            console.file.flush()
        else:
            with console.status("starting") as status:
                report = examine(status.update)
            _print(console, report)
    return report.exit_code
