"""``easydel-ragged bench --case engine``: what attention costs while a real model is served.

Four engines with the same weights take turns: this package's v3 and v2, EasyDeL's own v2, and the ceiling, which is
the same engine with an operation that returns its queries. No attention can be faster than none, so each is shown
as a share of the ceiling. The ceiling's tokens are nonsense, and have to differ; the others' are to agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from easydel_ragged_plugin import host
from easydel_ragged_plugin.demo import model as models
from easydel_ragged_plugin.demo import run as demo
from easydel_ragged_plugin.demo.engine import Engine, Settings, import_host, interleaved, median
from easydel_ragged_plugin.demo.workers import Workers
from easydel_ragged_plugin.interrupt import interruptible
from easydel_ragged_plugin.terminal import hushed, stage, usable_cache_dir

__all__ = ["ABOUT", "Plan", "run", "show"]

ABOUT = "SmolLM2-135M through EasyDeL's engine: tokens per second beside the same engine without attention (minutes)"

CEILING = "ceiling"

VARIANTS: dict[str, dict[str, Any]] = {
    "this package's v3": {"mechanism": "ragged_page_attention_v3"},
    "this package's v2": {"mechanism": "ragged_page_attention_v2"},
    "EasyDeL's v2": {"mechanism": "ragged_page_attention_v2", "host_kernels": True},
    CEILING: {"mechanism": "ragged_page_attention_v3", "ceiling": True},
}

SHORT_PROMPT = 32
"""Tokens of a prompt without a context."""

TEXT = (
    "The harbor wakes before the town does. Boats come in on the tide with their lamps still burning, and the men on "
    "the quay count crates, argue about the price of ice, and drink coffee from tin cups while gulls walk past. "
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        contexts: tokens of each request's prompt before its answer is timed; 0 for a short one.
        prompt_tokens: tokens of the prompt whose time is taken; 0 leaves this out.
        requests: requests served at once.
        answer_tokens: tokens of an answer that are timed.
        page_size: tokens in a page.
        chunk: tokens of a step while the prompts of ``contexts`` are read.
    """

    contexts: tuple[int, ...] = (0, 1200)
    prompt_tokens: int = 1000
    requests: int = 4
    answer_tokens: int = 64
    page_size: int = 128
    chunk: int = 64

    def decode_settings(self) -> Settings:
        """An engine for short steps. The engine keeps ``requests`` tokens in reserve."""
        longest = max(max(self.contexts), SHORT_PROMPT)
        needed = longest + self.answer_length(longest) + 2 * self.requests
        return Settings(
            mechanism="",
            max_model_len=-(-needed // self.page_size) * self.page_size,
            max_requests=self.requests,
            decode_bucket=_power_of_two(self.requests),
            tokens_per_step=self.chunk,
            page_size=self.page_size,
        )

    def prompt_settings(self) -> Settings:
        """An engine that reads the prompt in one step, with one program."""
        step = _power_of_two(self.prompt_tokens)
        return Settings(
            mechanism="",
            max_model_len=-(-(step + 8) // self.page_size) * self.page_size,
            max_requests=1,
            decode_bucket=step,
            tokens_per_step=step,
            page_size=self.page_size,
        )

    def answer_length(self, context: int) -> int:
        """Tokens to request: the first request answers while the others' prompts are still being read."""
        return self.answer_tokens + -(-self.requests * context // self.chunk)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _text_of(tokenizer: Any, tokens: int) -> str:
    """Text of exactly so many tokens, or as near as whole words allow."""
    text = TEXT
    while len(tokenizer(text)["input_ids"]) < tokens:
        text += TEXT
    ids = tokenizer(text)["input_ids"]
    for extra in range(8):  # a cut in the middle of a word may tokenize differently
        cut = str(tokenizer.decode(ids[: tokens + extra]))
        if len(tokenizer(cut)["input_ids"]) >= tokens:
            return cut
    return text


@contextlib.contextmanager
def _engines(
    console: Console, source: str, settings: Settings, tokenizer: Any, workers: Workers, labels: Sequence[str]
) -> Iterator[tuple[dict[str, Engine], dict[str, float]]]:
    """A running engine for each label, and the seconds that each took to start."""
    with contextlib.ExitStack() as running:
        engines, starts = {}, {}
        for label in labels:
            started = time.perf_counter()
            engine = demo.start_engine(console, label, source, settings.replace(**VARIANTS[label]), tokenizer, workers)
            starts[label] = time.perf_counter() - started
            engines[label] = running.enter_context(engine)
            engine.pause()
        yield engines, starts


def _measure(
    console: Console, name: str, engines: Mapping[str, Engine], texts: Sequence[str], max_tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """For each engine the medians of ``repeats`` interleaved rounds; one round before them is not counted."""
    with stage(console, f"warming up ({name})"):
        interleaved(engines, texts, min(max_tokens, 2), 1, full_length=True)
    with stage(console, f"measuring {name}, {repeats} rounds") as update:
        measured = interleaved(engines, texts, max_tokens, repeats, full_length=True, done=update)
    answers = {label: [answer.token_ids for answer in rounds[-1].answers] for label, rounds in measured.items()}
    first = next(iter(answers.values()))
    return {
        label: {
            "decode_tokens_per_s": median(rounds, "decode_tokens_per_s"),
            "tokens_per_s": median(rounds, "tokens_per_s"),
            "seconds": median(rounds, "seconds"),
            "same_tokens": answers[label] == first,
            "rounds": [
                {key: value for key, value in dataclasses.asdict(each).items() if key != "answers"} for each in rounds
            ],
        }
        for label, rounds in measured.items()
    }


def run(plan: Plan, *, repeats: int, with_host: bool) -> dict[str, Any]:
    """Measure, and return what ``--json`` holds under ``engine``."""
    labels = [label for label, changes in VARIANTS.items() if with_host or not changes.get("host_kernels")]
    workloads: list[dict[str, Any]] = []
    starts: dict[str, dict[str, float]] = {}
    kernels: dict[str, list[str]] = {}
    log = usable_cache_dir() / "bench.log"
    with interruptible(at_once=False), hushed(log) as console, contextlib.ExitStack() as stack:
        source = demo.prepare_model(console, None)
        with stage(console, "importing EasyDeL"):
            import_host()
        tokenizer = models.load_tokenizer(source)
        workers = stack.enter_context(Workers(source))
        setup = (console, source)
        if plan.contexts:
            with _engines(*setup, plan.decode_settings(), tokenizer, workers, labels) as (engines, starts["decode"]):
                for context in plan.contexts:
                    text = _text_of(tokenizer, context or SHORT_PROMPT)
                    tokens = len(tokenizer(text)["input_ids"])
                    name = f"{plan.requests} requests, {tokens} tokens of context"
                    length = plan.answer_length(tokens)
                    measured = _measure(console, name, engines, [text] * plan.requests, length, repeats)
                    workloads.append({"name": name, "unit": "tokens/s", "context": tokens, "engines": measured})
                kernels = {label: list(engine.kernels) for label, engine in engines.items()}
        if plan.prompt_tokens:
            with _engines(*setup, plan.prompt_settings(), tokenizer, workers, labels) as (engines, starts["prompt"]):
                text = _text_of(tokenizer, plan.prompt_tokens)
                tokens = len(tokenizer(text)["input_ids"])
                name = f"a prompt of {tokens} tokens"
                measured = _measure(console, name, engines, [text], 1, repeats)
                workloads.append({"name": name, "unit": "s", "context": tokens, "engines": measured})
                kernels = kernels or {label: list(engine.kernels) for label, engine in engines.items()}
    for workload in workloads:
        field = "seconds" if workload["unit"] == "s" else "decode_tokens_per_s"
        ceiling = workload["engines"][CEILING][field]
        for each in workload["engines"].values():
            each["result"] = each[field]
            each["of_ceiling"] = each[field] / ceiling if ceiling and each[field] else None
    return {
        "model": models.MODEL_NAME,
        "dtype": "float32",
        "easydel": host.host_version(),
        "plan": dataclasses.asdict(plan),
        "repeats": repeats,
        "start_s": starts,
        "kernels": kernels,
        "workloads": workloads,
    }


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print what :func:`run` returned."""
    title = f"{report['model']} {report['dtype']} on EasyDeL {report['easydel']}: medians of {report['repeats']} rounds"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("engine", no_wrap=True)
    for workload in report["workloads"]:
        table.add_column(f"{workload['name']}\n{workload['unit']}", justify="right")
        table.add_column("of the\nceiling" if workload["unit"] != "s" else "times the\nceiling", justify="right")
    for part in report["start_s"]:
        table.add_column(f"start, s\n({part})", justify="right", no_wrap=True)
    table.add_column("same\ntokens", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for label in next(iter(report["start_s"].values()), {}):
        cells = []
        for workload in report["workloads"]:
            each = workload["engines"][label]
            seconds = workload["unit"] == "s"
            cells.append(
                "-" if each["result"] is None else f"{each['result']:.2f}" if seconds else f"{each['result']:.1f}"
            )
            share = each["of_ceiling"]
            cells.append("-" if share is None else f"{share:.2f} x" if seconds else f"{100 * share:.0f} %")
        cells += [f"{starts[label]:.1f}" for starts in report["start_s"].values()]
        kernel = ", ".join(report["kernels"].get(label, ())) or ("none" if label == CEILING else "EasyDeL's own")
        same = all(workload["engines"][label]["same_tokens"] for workload in report["workloads"])
        table.add_row(label, *cells, "yes" if same else "no", kernel)
    console.print(table)
