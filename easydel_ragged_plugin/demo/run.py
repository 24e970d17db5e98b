"""``easydel-ragged demo``: a real model answers through EasyDeL's engine on this package's operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from easydel_ragged_plugin import host, select, startup
from easydel_ragged_plugin.config import KERNEL_VARIABLE, from_environment
from easydel_ragged_plugin.interrupt import ends_like_ctrl_c, interruptible
from easydel_ragged_plugin.terminal import CommandError, count_compilations, hushed, stage, usable_cache_dir

from . import model as models
from .engine import Answer, Engine, Settings, import_host, interleaved, median
from .serve import About, listen, serve
from .workers import Workers

__all__ = ["DEFAULT_PROMPTS", "check_environment", "prepare_model", "run", "run_server", "start_engine"]

DEFAULT_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List five animals that live in the forest.",
)
"""The first is the default; a comparison takes all of them, in one batch."""

SERVED_AT_ONCE = 4
"""Requests that the server answers at once; others wait. EasyDeL keeps as many tokens of the context back."""

CONTEXT = 2048
"""Tokens of the server's longest conversation, where the model has so many positions."""

PROMPT_TOKENS_PER_STEP = 64
"""Tokens of the server's largest step: conversations are longer than the demo's prompts."""


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _settings(prompt_tokens: Sequence[int], max_tokens: int, page_size: int, dtype: str) -> Settings:
    """Engine settings that fit these prompts with few compilations."""
    # At least 4: a step of 4 tokens takes as long as one of 1, and two programs less are compiled.
    requests = max(4, _power_of_two(len(prompt_tokens)))
    # The engine keeps `requests` tokens in reserve.
    needed = max(prompt_tokens) + max_tokens + requests
    return Settings(
        mechanism="ragged_page_attention_v3",
        max_model_len=-(-needed // page_size) * page_size,
        max_requests=requests,
        decode_bucket=requests,
        tokens_per_step=4 * requests,
        page_size=page_size,
        dtype=dtype,
    )


def check_environment(what: str, *, converts: bool) -> None:
    """Raise CommandError, with what to install, where the engine can't run, or SmolLM2 not be converted for it.

    Args:
        what: needs the engine, for the message.
        converts: whether it serves SmolLM2.
    """
    missing = models.missing_packages(converts=converts and models.converted() is None)
    if missing:
        raise CommandError(
            f"{what} needs {', '.join(missing)}, which this environment lacks. Run: pip install {' '.join(missing)}"
        )


def prepare_model(console: Console, model: str | None) -> str:
    """A folder or hub id that the host can load; None is SmolLM2."""
    is_path = model is not None and models.looks_like_path(model)
    if is_path and not (Path(str(model)).expanduser() / "config.json").is_file():
        raise CommandError(
            f"--model {model}: no config.json there. Give a folder of a Hugging Face model, or a hub id."
        )
    try:
        if model is not None:
            with stage(console, f"looking at {model}"):
                source = str(Path(model).expanduser()) if is_path else models.from_hub(model)
                models.check_model(source)
            return source
        ready = models.converted()
        if ready is not None:
            return str(ready)
        models.require_room()
        with stage(console, f"fetching {models.MODEL_NAME} (once, into {models.cache_dir()})", in_bytes=True) as update:
            models.fetch(update)
        with stage(console, "converting it for EasyDeL (once)") as update:
            return str(models.prepare(converted=update))
    except models.FetchError as error:
        raise CommandError(str(error) if model is None else f"--model {error}") from error


def _config(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_length(config: Any, prompt_tokens: Sequence[int], max_tokens: int) -> None:
    """Raise CommandError where the model has no positions for the longest prompt and its answer."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max(prompt_tokens) + max_tokens > positions:
        raise CommandError(
            f"--max-tokens {max_tokens}: a prompt of {max(prompt_tokens)} tokens and such an answer are "
            f"{max(prompt_tokens) + max_tokens}, and the model has {positions} positions."
        )


def _check_kernel_variable() -> None:
    """Raise CommandError where the environment names a kernel that is not there: the engine would die of it late."""
    named, known = from_environment(), select.kernels()
    if named is not None and named.kernel not in known:
        raise CommandError(f"{KERNEL_VARIABLE}: got {named.kernel!r}, wanted one of {', '.join(known)}, or unset it.")


def start_engine(
    console: Console, label: str, model: str, settings: Settings, tokenizer: Any, workers: Workers
) -> Engine:
    _check_kernel_variable()
    with contextlib.ExitStack() as stages:
        loading = stages.enter_context(contextlib.ExitStack())
        loading.enter_context(stage(console, f"loading the model ({label})"))

        def loaded() -> None:
            loading.close()
            update = stages.enter_context(stage(console, f"compiling the engine ({label})"))
            stages.enter_context(count_compilations(update))

        return Engine(model, settings, tokenizer, workers, loaded=loaded)


@contextlib.contextmanager
def _shown_live(console: Console, prompts: Sequence[str]) -> Iterator[Any]:
    """Show several growing answers at once; yields the callback of :meth:`Engine.chat`."""
    texts = [""] * len(prompts)

    def picture() -> Group:
        lines = []
        for prompt, text in zip(prompts, texts, strict=True):
            lines += [Text(f"> {prompt}", style="bold"), Text(text + "\n")]
        return Group(*lines)

    with Live(picture(), console=console, refresh_per_second=8, vertical_overflow="visible") as live:

        def grew(index: int, text: str) -> None:
            texts[index] = text
            live.update(picture())

        yield grew


def _stream_one(console: Console, engine: Engine, prompt: str, max_tokens: int) -> tuple[list[Answer], float]:
    console.print(Text(f"> {prompt}", style="bold"))
    shown = 0

    def grew(index: int, text: str) -> None:
        nonlocal shown
        console.file.write(text[shown:])
        console.file.flush()
        shown = max(shown, len(text))

    answers, seconds = engine.chat([prompt], max_tokens, grew)
    console.file.write("\n\n")
    return answers, seconds


def _answer(console: Console, engine: Engine, prompts: Sequence[str], max_tokens: int) -> None:
    engine.chat(prompts, 2)  # the first steps of a process are slower: buffers, threads, tokenizer
    if len(prompts) == 1:
        answers, seconds = _stream_one(console, engine, prompts[0], max_tokens)
    else:
        with _shown_live(console, prompts) as grew:
            answers, seconds = engine.chat(prompts, max_tokens, grew)
    tokens = sum(len(answer.token_ids) for answer in answers)
    console.print(
        f"{tokens} tokens in {seconds:.1f} s: [bold]{tokens / seconds:.1f} tokens per second[/bold]"
        f" ({len(prompts)} request{'s' * (len(prompts) > 1)}, prompts included)",
        highlight=False,
    )
    console.print(f"operation  {engine.operation}", highlight=False)
    console.print(f"kernel     {_kernel(engine)}", highlight=False)


def _kernel(engine: Engine) -> str:
    if engine.settings.host_kernels:
        return "EasyDeL's own (the class that held the name before this package)"
    return ", ".join(engine.kernels) or "unknown: no call was traced"


def _compare(
    console: Console, engines: dict[str, Engine], prompts: Sequence[str], max_tokens: int, repeats: int
) -> None:
    for label, engine in engines.items():
        with stage(console, f"warming up ({label})"):
            engine.resume()
            engine.chat(prompts, 2)
            engine.pause()
    tokenizer = next(iter(engines.values())).tokenizer
    texts = [Engine.as_chat(tokenizer, prompt) for prompt in prompts]
    with stage(console, f"asking {len(prompts)} prompts, {repeats} rounds") as update:
        measured = interleaved(engines, texts, max_tokens, repeats, done=update)
    answers = {label: each[-1].answers for label, each in measured.items()}
    first = next(iter(answers.values()))
    for prompt, answer in zip(prompts, first, strict=True):
        console.print(Text(f"> {prompt}", style="bold"))
        console.print(Text(f"{answer.text}\n"))
    table = Table(title=f"median of {repeats} interleaved rounds, {len(prompts)} requests at once, prompts included")
    for heading in ("", "tokens per second", "all rounds", "kernel", "same tokens"):
        table.add_column(heading, justify="right" if heading in ("tokens per second", "all rounds") else "left")
    for label, engine in engines.items():
        same = [a.token_ids for a in answers[label]] == [a.token_ids for a in first]
        rounds = " ".join(f"{each.tokens_per_s:.1f}" for each in measured[label])
        kernel = "EasyDeL's own" if engine.settings.host_kernels else _kernel(engine)
        table.add_row(label, f"{median(measured[label], 'tokens_per_s'):.1f}", rounds, kernel, "yes" if same else "no")
    console.print(table)


@contextlib.contextmanager
def _console(verbose: bool) -> Iterator[Console]:
    log = usable_cache_dir() / "demo.log"
    with interruptible(at_once=False), hushed(None if verbose else log) as console:
        yield console


def _import_host(console: Console) -> None:
    with stage(console, "importing EasyDeL"):
        import_host()
    if not startup.status().active:
        console.print(
            "[yellow]note:[/yellow] the plugin was not active in this process; this run activates it by hand. "
            "'easydel-ragged doctor' says why.",
            highlight=False,
        )


def _introduce(console: Console, model: str | None, dtype: str) -> None:
    console.print(
        f"[bold]{models.MODEL_NAME if model is None else model}[/bold] on EasyDeL {host.host_version()}, {dtype}"
    )


def run(
    *,
    mechanism: str,
    prompts: Sequence[str],
    model: str | None,
    host_kernels: bool,
    max_tokens: int,
    compare: bool,
    repeats: int,
    page_size: int,
    dtype: str,
    verbose: bool,
) -> None:
    """See ``easydel-ragged demo --help``."""
    check_environment("the demo", converts=model is None)
    prompts = list(prompts) or list(DEFAULT_PROMPTS if compare else DEFAULT_PROMPTS[:1])
    with _console(verbose) as console, contextlib.ExitStack() as running:
        source = prepare_model(console, model)
        _import_host(console)
        tokenizer = models.load_tokenizer(source)
        lengths = [len(tokenizer(Engine.as_chat(tokenizer, prompt))["input_ids"]) for prompt in prompts]
        config = _config(source)
        _check_length(config, lengths, max_tokens)
        base = _settings(lengths, max_tokens, page_size, dtype)
        variants = _variants(mechanism, host_kernels, compare, _head_dim(config))
        _introduce(console, model, dtype)
        workers = running.enter_context(Workers(source))
        engines = {}
        for label, changes in variants.items():
            engine = start_engine(console, label, source, base.replace(**changes), tokenizer, workers)
            engines[label] = running.enter_context(engine)
            if compare:
                engine.pause()
        console.print()
        if compare:
            _compare(console, engines, prompts, max_tokens, repeats)
        else:
            _answer(console, next(iter(engines.values())), prompts, max_tokens)


def run_server(
    *,
    mechanism: str,
    model: str | None,
    host_kernels: bool,
    context: int | None,
    page_size: int,
    dtype: str,
    verbose: bool,
    host_name: str,
    port: int,
) -> None:
    """See ``easydel-ragged demo --help``: ``--serve``."""
    check_environment("the server", converts=model is None)
    if not host.streams_whole_answers():
        raise CommandError(
            f"--serve needs EasyDeL 0.3.0 or newer: the server of {host.host_version()} leaves words out of answers "
            "that it streams. Run: pip install --upgrade easydel"
        )
    with (
        ends_like_ctrl_c(),
        _console(verbose) as console,
        contextlib.ExitStack() as running,
    ):
        # First, because it may fail, and what follows takes a minute.
        listening = running.enter_context(listen(host_name, port))
        source = prepare_model(console, model)
        _import_host(console)
        tokenizer = models.load_tokenizer(source)
        config = _config(source)
        ((label, changes),) = _variants(mechanism, host_kernels, False, _head_dim(config)).items()
        settings = _server_settings(config, context, page_size, dtype).replace(**changes)
        _introduce(console, model, dtype)
        workers = running.enter_context(Workers(source))
        engine = running.enter_context(start_engine(console, label, source, settings, tokenizer, workers))
        with stage(console, "warming up"):
            engine.chat(DEFAULT_PROMPTS[:1], 2)
        console.print()
        name = models.MODEL_NAME if model is None else _name(model)
        end_answers = serve(console, engine, About.of(engine, name, _kernel(engine)), listening, host_name)
        with stage(console, "stopping"):
            end_answers()
            running.close()


def _server_settings(config: Any, context: int | None, page_size: int, dtype: str) -> Settings:
    """Engine settings for conversations.

    Args:
        context: tokens of the longest one; None for :data:`CONTEXT`, or as many as the model allows.

    Raises:
        CommandError: the model has too few positions for it.
    """
    positions = getattr(config, "max_position_embeddings", None)
    pages = -(-((context or CONTEXT) + SERVED_AT_ONCE) // page_size)
    if positions is not None:  # whole pages: more than was wanted, and never more than the model has
        most = positions // page_size * page_size - SERVED_AT_ONCE
        if most < 1:
            raise CommandError(f"--page-size {page_size}: the model has {positions} positions. Give a smaller page.")
        if context is not None and context > most:
            raise CommandError(
                f"--context {context}: the model has {positions} positions, of which pages of {page_size} tokens and "
                f"the {SERVED_AT_ONCE} tokens that EasyDeL keeps back leave {most}. Give at most {most}."
            )
        pages = min(pages, positions // page_size)
    return Settings(
        mechanism="ragged_page_attention_v3",
        max_model_len=pages * page_size,
        max_requests=SERVED_AT_ONCE,
        decode_bucket=SERVED_AT_ONCE,
        tokens_per_step=PROMPT_TOKENS_PER_STEP,
        page_size=page_size,
        dtype=dtype,
        prefix_caching=True,  # each message comes with all that was said before
    )


def _name(model: str) -> str:
    """What requests call a model: its hub id, or the name of its folder."""
    return Path(model).expanduser().resolve().name if models.looks_like_path(model) else model


def _variants(mechanism: str, host_kernels: bool, compare: bool, head_dim: int) -> dict[str, dict[str, Any]]:
    """Label and settings of each engine to run."""
    v2: dict[str, Any] = {"mechanism": "ragged_page_attention_v2"}
    v3: dict[str, Any] = {"mechanism": "ragged_page_attention_v3"}
    theirs = {"host_kernels": True}
    host_v3_runs = head_dim != 64
    if compare:
        engines = {"this package's v3": v3, "this package's v2": v2, "EasyDeL's v2": {**v2, **theirs}}
        return {**engines, "EasyDeL's v3": {**v3, **theirs}} if host_v3_runs else engines
    if host_kernels and mechanism == "v3" and not host_v3_runs:
        raise CommandError("EasyDeL's own v3 does not run with head_dim 64, which this model has. Add --mechanism v2.")
    chosen = v2 if mechanism == "v2" else v3
    return {f"EasyDeL's {mechanism}": {**chosen, **theirs}} if host_kernels else {f"this package's {mechanism}": chosen}
