"""``easydel-ragged doctor``: what is installed, what is active, which kernel would run, and is its answer right."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from easydel_ragged_plugin import host, startup
from easydel_ragged_plugin.config import KERNEL_VARIABLE
from easydel_ragged_plugin.terminal import facts_as_text, hushed

if TYPE_CHECKING:
    from easydel_ragged_plugin.select import Selection

__all__ = ["Report", "examine", "run"]

IMPORTED_BY_EASYDEL = ("eformer", "transformers", "torch")
OTHER_VARIABLES = ("EJKERNEL_AUTOTUNE_POLICY", "FORCE_NATIVE_RUNTIME", "JAX_PLATFORMS", "XLA_FLAGS")
"""Shown where they are set, as are this package's own."""


@dataclasses.dataclass
class Report:
    """What the command found; ``--json`` prints these fields.

    Attributes:
        versions: distribution to version, None where it is not installed.
        devices: JAX's devices.
        environment: the variables that are set.
        activation: None without EasyDeL; else ``status()`` as text and the classes that serve the operations.
        kernels: each kernel's own facts: whether it is available, else the reason, and what else it says of itself.
        selection: for v2 and v3, the kernel a typical decode step gets and why each other one is passed over.
        self_check: for v2 and v3, "ok" with the largest error, or what went wrong. Without a kernel it is not run.
        without: kernels that would be chosen, and are not available.
        hooks: registered hook plugins.
        fingerprint: what must be equal on all workers that serve one model.
        notes: what a user should know, none of it an error.
        problems: why the exit code is not 0.
    """

    python: str
    versions: dict[str, str | None]
    devices: list[str]
    environment: dict[str, str]
    activation: dict[str, Any] | None
    kernels: dict[str, dict[str, Any]]
    selection: dict[str, dict[str, Any]]
    self_check: dict[str, str]
    without: list[str]
    hooks: list[str]
    fingerprint: dict[str, str]
    notes: list[str]
    problems: list[str]

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
            "Run: pip install 'easydel-ragged-plugin[host]'"
        )
        return None
    if version not in host.SUPPORTED:
        notes.append(f"EasyDeL {version} is not one of the tested versions ({', '.join(host.SUPPORTED)}).")
    registry = host.registry()
    status = startup.status()
    if not status.active:
        problems.append(f"the plugin is not active in EasyDeL: {str(status).splitlines()[0]}")
    return {
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
            if not known[name].facts()["available"]:
                names.append(name)
    return list(dict.fromkeys(names))


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
    if backend == "cpu" and host_version == "0.2.0.2":
        notes.append(
            "EasyDeL 0.2.0.2 can't size its cache on CPU (per_device_hbm_budget_bytes raises AttributeError); "
            "'easydel-ragged demo' works around it."
        )
    return notes


def examine(say: Any = lambda text: None) -> Report:
    """Run all checks.

    Args:
        say: called with a line of text before each step.
    """
    problems: list[str] = []
    notes: list[str] = []
    # Before EasyDeL is imported, which adds to XLA_FLAGS.
    own = sorted(name for name in os.environ if name.startswith("EASYDEL_RAGGED_"))
    environment = {name: os.environ[name] for name in (*own, *OTHER_VARIABLES) if name in os.environ}
    say("importing EasyDeL (10 to 20 seconds)" if host.host_version() else "importing JAX")
    activation = _activation(problems, notes)
    import jax

    from easydel_ragged_plugin import select, workers

    say("selecting kernels")
    kernels = select.kernels()
    probes = workers.explain_probes()
    selection = _selection(probes, problems)
    self_check = {}
    for version in ("v2", "v3"):
        if selection[version]["kernel"] is None:
            self_check[version] = "not run: no kernel takes the call"
            continue
        say(f"checking {version} against the reference")
        # Whatever a kernel raises here is the finding that this command exists to report.
        try:
            self_check[version] = _self_check(version)
        except Exception as error:
            self_check[version] = f"FAILED: {type(error).__name__}: {error}"
        if not self_check[version].startswith("ok"):
            problems.append(f"self-check of {version}: {self_check[version]}")
    platform_name = jax.default_backend()
    kernel_notes = [note for kernel in kernels.values() for note in kernel.notes(platform_name)]
    return Report(
        python=platform.python_version(),
        versions=workers.versions((*workers.DISTRIBUTIONS, *IMPORTED_BY_EASYDEL)),
        devices=[f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        environment=environment,
        activation=activation,
        kernels={name: kernel.facts() for name, kernel in kernels.items()},
        selection=selection,
        self_check=self_check,
        without=_without(probes),
        hooks=workers.hook_plugins(),
        fingerprint=workers.fingerprint(),
        notes=notes + _notes(platform_name, host.host_version()) + kernel_notes,
        problems=problems,
    )


def _print(console: Console, report: Report) -> None:
    def section(title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]")

    def line(text: str, style: str | None = None) -> None:
        console.print(f"  {text}", style=style, markup=False, highlight=False, soft_wrap=True)

    section("versions")
    line(f"python {report.python} ({sys.executable})")
    for name, version in report.versions.items():
        line(f"{name} {version or 'not installed'}")
    section("devices")
    for device in report.devices:
        line(device)
    if report.environment:
        section("environment")
        for name, value in report.environment.items():
            line(f"{name}={value}")
    section("activation")
    if report.activation is None:
        line("no EasyDeL: functions only")
    else:
        for text in report.activation["status"].splitlines():
            line(text)
    section("kernels")
    for name, facts in report.kernels.items():
        line(f"{name}: {facts_as_text(facts)}")
    section("chosen for a decode step (8 requests, 32/8 heads, head_dim 128, pages of 128, bfloat16)")
    for versions, chosen in _alike(report.selection).items():
        line(f"{versions}: {chosen['kernel'] or 'none, see problems'}")
        for name, reason in chosen["refusals"].items():
            line(f"    not {name}: {'not available' if reason == report.kernels[name].get('reason') else reason}")
    if report.hooks:
        section("hook plugins")
        line(", ".join(report.hooks))
    section("self-check")
    for version, outcome in report.self_check.items():
        ok = outcome.startswith("ok")
        shown = outcome if ok else f"{outcome.partition(':')[0]}, see problems"
        line(f"{version}: {shown}", "green" if ok else "red")
    if report.notes:
        section("notes")
        for note in report.notes:
            line(note)
    console.print()
    color = "red" if report.problems else "yellow" if report.without else "green"
    console.print(report.verdict, style=f"bold {color}", highlight=False, soft_wrap=True)
    for problem in report.problems:
        line(problem, "red")


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


def run(*, as_json: bool, verbose: bool) -> int:
    """See ``easydel-ragged doctor --help``. Returns the exit code."""
    with _scratch_log() as log, hushed(None if verbose else log) as console:
        if as_json:
            report = examine()
            fields = {**dataclasses.asdict(report), "verdict": report.verdict}
            console.file.write(json.dumps(fields, indent=2) + "\n")
            console.file.flush()
        else:
            with console.status("starting") as status:
                report = examine(status.update)
            _print(console, report)
    return report.exit_code
