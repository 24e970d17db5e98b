"""``easydel-ragged bench --case soak``: whether an engine that serves for long keeps its memory and its answers.

Requests of mixed lengths go through EasyDeL's engine, more of them at once than it serves at once. Some are cancelled:
while they wait, while their prompt is read, or in the middle of the answer. A few prompts come back again and again
among the others, and their answers must not change. After each interval the engine is idle, and its process's memory
and the arrays that JAX holds are noted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from easydel_ragged_plugin import host
from easydel_ragged_plugin.demo import model as models
from easydel_ragged_plugin.demo import run as demo
from easydel_ragged_plugin.demo import tiny
from easydel_ragged_plugin.demo.engine import Engine, Settings, import_host
from easydel_ragged_plugin.demo.workers import Workers
from easydel_ragged_plugin.interrupt import interruptible
from easydel_ragged_plugin.terminal import CommandError, Update, hushed, stage, usable_cache_dir

__all__ = ["ABOUT", "TINY", "Interval", "Plan", "Request", "requests_of", "run", "show", "verdict"]

ABOUT = "1000 requests through EasyDeL's engine, some cancelled: do memory and answers stay (minutes)"

TINY = "tiny"
"""``Plan.model`` for a random model of two layers, which is made on the spot."""

ALLOWED_GROWTH_BYTES = 32 << 20
"""Growth of the process that is no drift: a tenth of that comes and goes with the C library's free lists."""

SETTLE_S = 0.2
"""After the last answer of an interval the engine ends its step, and lets go of that step's arrays."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to serve.

    Attributes:
        requests: in all.
        intervals: after each of these parts the engine is idle and memory is noted.
        model: :data:`TINY`, ``SmolLM2-135M-Instruct``, a folder or a hub id.
        mechanism: the operation.
        at_once: requests that the engine serves at once.
        clients: requests that are there at once; those beyond ``at_once`` wait.
        prompt_tokens, answer_tokens: the longest ones; lengths are random.
        references: prompts that come back in each interval.
        cancel_every: one request of so many is cancelled.
        seed: of lengths and texts.
    """

    requests: int = 1000
    intervals: int = 10
    model: str = TINY
    mechanism: str = "ragged_page_attention_v3"
    at_once: int = 8
    clients: int = 12
    prompt_tokens: int = 100
    answer_tokens: int = 32
    references: int = 8
    cancel_every: int = 5
    seed: int = 0

    @property
    def warm_up(self) -> int:
        """Intervals whose memory does not count: programs, buffers and the host's records of requests grow there."""
        return max(1, self.intervals // 5)

    def settings(self) -> Settings:
        """An engine with steps of up to 32 tokens, so that a long prompt goes in chunks."""
        page_size = 16
        longest = self.prompt_tokens + self.answer_tokens + 2 * self.at_once
        return Settings(
            mechanism=self.mechanism,
            max_model_len=-(-longest // page_size) * page_size,
            max_requests=self.at_once,
            decode_bucket=8,
            tokens_per_step=32,
            page_size=page_size,
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        words: of its prompt.
        max_tokens: of its answer.
        cancel_after: tokens after which it is cancelled, 0 for at once; None for a request that runs to its end.
        reference: which of the reference prompts it is; None for none.
    """

    words: tuple[int, ...]
    max_tokens: int
    cancel_after: int | None = None
    reference: int | None = None


@dataclasses.dataclass(frozen=True)
class Interval:
    """What an interval was like.

    Attributes:
        requests: those that ended in it.
        cancelled: those among them that the engine reports as aborted.
        tokens: of all answers.
        seconds: it took.
        resident_bytes: of the process, at its end.
        array_bytes, arrays: what JAX holds, at its end.
        threads: of the process.
        wrong: what differs from the first answers, as text.
    """

    requests: int
    cancelled: int
    tokens: int
    seconds: float
    resident_bytes: int
    array_bytes: int
    arrays: int
    threads: int
    wrong: tuple[str, ...]


def requests_of(plan: Plan) -> tuple[list[Request], list[list[Request]]]:
    """The reference prompts, and the requests of each interval. The same for equal plans."""
    draw = random.Random(plan.seed)

    def new(cancel: bool) -> Request:
        words = tuple(draw.randrange(len(tiny.SPECIAL), tiny.WORDS) for _ in range(draw.randint(1, plan.prompt_tokens)))
        length = draw.randint(1, plan.answer_tokens)
        return Request(words, length, draw.randrange(length) if cancel else None)

    references = [dataclasses.replace(new(False), reference=place) for place in range(plan.references)]
    count, rest = divmod(plan.requests, plan.intervals)
    parts = []
    for place in range(plan.intervals):
        size = count + (place < rest)
        part = [*references[:size], *(new(index % plan.cancel_every == 0) for index in range(size - len(references)))]
        draw.shuffle(part)
        parts.append(part)
    return references, parts


def _resident_bytes() -> int:
    """Memory of this process that is in RAM. Where the system does not tell, the most that it ever was."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _page_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _page_bytes() -> int:
    import resource

    return resource.getpagesize()


def _text(words: Sequence[int], tokenizer: Any) -> str:
    """Text of the first words, as many as give no more tokens than there are words: one each in the tiny model."""
    count = len(words)
    while True:
        text = " ".join(f"w{word}" for word in words[:count])
        if count == 1 or len(tokenizer(text)["input_ids"]) <= len(words):
            return text
        count = max(1, 3 * count // 4)


class _Client:
    """Sends requests of one interval, and keeps what is wrong with the answers."""

    def __init__(self, engine: Engine, plan: Plan, references: Mapping[int, tuple[int, ...]]) -> None:
        self.engine, self.plan, self.references = engine, plan, references
        self.tokens = self.cancelled = 0
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def send(self, request: Request) -> None:
        """Send one request and check what comes back."""
        text = _text(request.words, self.engine.tokenizer)
        answer = self.engine.answer(text, request.max_tokens, cancel_after=request.cancel_after)
        with self._lock:
            self.tokens += len(answer.token_ids)
            self.cancelled += answer.cancelled
            if not answer.cancelled and answer.generated != request.max_tokens:
                got = f"{answer.generated} tokens, wanted {request.max_tokens}"
                self.wrong.append(f"an answer of {got}: {text[:40]}")
            if request.reference is not None and answer.token_ids != self.references[request.reference]:
                first = self.references[request.reference]
                self.wrong.append(f"reference {request.reference}: got {answer.token_ids}, wanted {first}")


def _interval(
    engine: Engine, plan: Plan, part: Sequence[Request], references: Mapping[int, tuple[int, ...]], update: Update
) -> Interval:
    import jax

    client = _Client(engine, plan, references)
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(plan.clients) as pool:
        sent = [pool.submit(client.send, request) for request in part]
        for count, future in enumerate(concurrent.futures.as_completed(sent), 1):
            future.result()
            update(count, len(part))
    seconds = time.perf_counter() - started
    time.sleep(SETTLE_S)
    gc.collect()
    arrays = jax.live_arrays()
    return Interval(
        requests=len(part),
        cancelled=client.cancelled,
        tokens=client.tokens,
        seconds=seconds,
        resident_bytes=_resident_bytes(),
        array_bytes=sum(array.nbytes for array in arrays),
        arrays=len(arrays),
        threads=threading.active_count(),
        wrong=tuple(client.wrong),
    )


def verdict(plan: Plan, intervals: Sequence[Interval]) -> dict[str, Any]:
    """Whether memory or answers drifted, and the figures that it follows from.

    Growth is the least of the last third of the intervals minus the least of the first third, without those of the
    warm-up: what the engine still holds of its last step only adds.
    """
    counted = intervals[plan.warm_up :] or intervals[-1:]
    third = max(1, len(counted) // 3)

    def growth(field: str) -> int:
        first, last = (min(getattr(each, field) for each in part) for part in (counted[:third], counted[-third:]))
        return int(last - first)

    grown = {field: growth(field) for field in ("resident_bytes", "array_bytes", "arrays", "threads")}
    wrong = [text for each in intervals for text in each.wrong]
    findings = [
        *([f"{len(wrong)} wrong answers, the first: {wrong[0]}"] if wrong else []),
        *(
            [f"the process grew by {grown['resident_bytes'] / 2**20:.0f} MiB"]
            if grown["resident_bytes"] > ALLOWED_GROWTH_BYTES
            else []
        ),
        *([f"JAX holds {grown['arrays']} arrays more"] if grown["arrays"] > 0 else []),
    ]
    return {"drift": bool(findings), "findings": findings, "wrong": len(wrong), "grown": grown}


@contextlib.contextmanager
def _model(console: Console, plan: Plan) -> Iterator[str]:
    if plan.model == TINY:
        with tempfile.TemporaryDirectory(prefix="easydel-ragged-soak-") as folder:
            with stage(console, "writing a random model of two layers"):
                source = tiny.save(Path(folder), positions=plan.settings().max_model_len)
            yield source
    else:
        yield demo.prepare_model(console, None if plan.model == models.MODEL_NAME else plan.model)


def run(plan: Plan) -> dict[str, Any]:
    """Serve, and return what ``--json`` holds under ``soak``."""
    if plan.requests < plan.intervals * (plan.references + 1):
        raise CommandError(
            f"--soak-requests: got {plan.requests}, wanted at least {plan.intervals * (plan.references + 1)}: each of "
            f"the {plan.intervals} intervals has {plan.references} reference prompts and others."
        )
    log = usable_cache_dir() / "bench.log"
    references, parts = requests_of(plan)
    intervals: list[Interval] = []
    with interruptible(at_once=False), hushed(log) as console, contextlib.ExitStack() as stack:
        source = stack.enter_context(_model(console, plan))
        with stage(console, "importing EasyDeL"):
            import_host()
        tokenizer = models.load_tokenizer(source)
        workers = stack.enter_context(Workers(source))
        label = plan.mechanism
        engine = stack.enter_context(demo.start_engine(console, label, source, plan.settings(), tokenizer, workers))
        with stage(console, f"answering the {plan.references} reference prompts, one at a time"):
            alone = {
                place: engine.answer(_text(each.words, tokenizer), each.max_tokens).token_ids
                for place, each in enumerate(references)
            }
        served = 0
        for part in parts:
            with stage(console, f"requests {served + 1} to {served + len(part)}") as update:
                intervals.append(_interval(engine, plan, part, alone, update))
            served += len(part)
            last = intervals[-1]
            console.print(
                f"  {last.resident_bytes / 2**20:.0f} MiB resident, {last.arrays} arrays of "
                f"{last.array_bytes / 2**20:.1f} MiB, {len(last.wrong)} wrong",
                highlight=False,
            )
        kernels = list(engine.kernels)
    return {
        "model": plan.model,
        "easydel": host.host_version(),
        "plan": dataclasses.asdict(plan),
        "kernels": kernels,
        "intervals": [dataclasses.asdict(each) for each in intervals],
        "verdict": verdict(plan, intervals),
    }


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print what :func:`run` returned."""
    plan = report["plan"]
    title = (
        f"{plan['requests']} requests, {plan['mechanism']} ({', '.join(report['kernels'])}), model {report['model']}, "
        f"EasyDeL {report['easydel']}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("requests", "cancelled", "tokens", "seconds", "resident, MiB", "arrays, MiB", "arrays", "wrong"):
        table.add_column(heading, justify="right", no_wrap=True)
    served = 0
    for each in report["intervals"]:
        served += each["requests"]
        table.add_row(
            str(served),
            str(each["cancelled"]),
            str(each["tokens"]),
            f"{each['seconds']:.1f}",
            f"{each['resident_bytes'] / 2**20:.1f}",
            f"{each['array_bytes'] / 2**20:.2f}",
            str(each["arrays"]),
            str(len(each["wrong"])),
        )
    console.print(table)
    found = report["verdict"]
    grown = found["grown"]["resident_bytes"] / 2**20
    if found["drift"]:
        console.print(f"[red]drift:[/red] {'; '.join(found['findings'])}", highlight=False, soft_wrap=True)
    else:
        console.print(
            f"[green]no drift:[/green] every answer as at first; the process grew by {grown:.1f} MiB after the "
            f"warm-up ({ALLOWED_GROWTH_BYTES >> 20} MiB are allowed), and JAX holds no more arrays",
            highlight=False,
            soft_wrap=True,
        )
