"""What an engine meets beside five prompts at once: a second turn, requests that arrive late, too few pages."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_model
from zoo import reference
from zoo.families import Family
from zoo.serve import SETTINGS, answers_of, message_of, running

from easydel_ragged_plugin.demo.engine import Engine, Settings
from easydel_ragged_plugin.demo.workers import Workers

FAMILIES = ("Llama, head_dim 64", "Mistral")

WRONG_IN_EASYDEL = "too few pages, asynchronous scheduler"
"""Gives wrong tokens in EasyDeL 0.3.0, whatever the kernel."""

Answers = tuple[list[str], list[tuple[int, ...]]]
"""Prompts, and the tokens that came."""


def second_turn(engine: Engine, tokenizer: Any) -> Answers:
    """Prompts, then the same with their answers and more words: their pages are found in the prefix cache."""
    first = reference.prompts((33, 40))
    answers = answers_of(engine, first, tokenizer.eos_token_id)
    said = [" ".join(tokenizer.convert_ids_to_tokens(list(tokens))) for tokens in answers]
    more = reference.prompts((5, 9), seed=1)
    again = [" ".join(turns) for turns in zip(first, said, more, strict=True)]
    with seen(engine, "kv_cache_manager", "get_computed_pages", lambda found: found[1]) as hits:
        answers += answers_of(engine, again, tokenizer.eos_token_id)
    if sorted(hits) != [32, 48]:
        raise AssertionError(f"second turn: got {hits} tokens from the prefix cache, wanted 32 and 48")
    return first + again, answers


def late(engine: Engine, tokenizer: Any) -> Answers:
    """Two prompts, and two more when the first two have three tokens."""
    first, then = reference.prompts((25, 3)), reference.prompts((40, 17), seed=1)
    decoding = [threading.Event() for _ in first]
    early: list[tuple[int, ...]] = []

    def grew(index: int, text: str) -> None:
        if len(text.split()) >= 3:
            decoding[index].set()

    def ask() -> None:
        measured = engine.measure(first, reference.NEW_TOKENS, grew, full_length=True)
        early.extend(answer.token_ids for answer in measured.answers)

    thread = threading.Thread(target=ask)
    thread.start()
    if not all(event.wait(120) for event in decoding):
        raise AssertionError("late: got no three tokens of the first prompts within two minutes")
    if not thread.is_alive():
        raise AssertionError("late: the first prompts were answered before the others arrived; nothing was tested")
    answers = answers_of(engine, then, tokenizer.eos_token_id)
    thread.join()
    eos = tokenizer.eos_token_id
    early = [tokens if len(tokens) == reference.NEW_TOKENS else (*tokens, eos) for tokens in early]
    return first + then, early + answers


def too_few_pages(engine: Engine, tokenizer: Any) -> Answers:
    """Four prompts that fit, and answers that do not: a request is put off and computed again."""
    texts = reference.prompts((12, 13, 14, 11))
    with seen(engine, None, "schedule", lambda output: len(output.preempted_req_ids)) as preempted:
        answers = answers_of(engine, texts, tokenizer.eos_token_id)
    if not any(preempted):
        raise AssertionError("too few pages: no request was put off; nothing was tested")
    return texts, answers


SCENARIOS: dict[str, tuple[Callable[[Engine, Any], Answers], dict[str, Any]]] = {
    "a second turn, from the prefix cache": (second_turn, {"prefix_caching": True}),
    "requests that arrive while others decode": (late, {}),
    "too few pages, `async_scheduling=False`": (too_few_pages, {"pages": 7, "async_scheduling": False}),
    WRONG_IN_EASYDEL: (too_few_pages, {"pages": 7}),
}
"""What is asked, and the settings that differ."""


@contextlib.contextmanager
def seen(engine: Engine, part: str | None, method: str, what: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """``what`` of each result of a method of the engine's scheduler, or of a part of it."""
    scheduler = engine._engine.scheduler
    owner = scheduler if part is None else getattr(scheduler, part)
    replaced = getattr(owner, method)
    found: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = replaced(*args, **kwargs)
        found.append(what(result))
        return result

    with mock.patch.object(owner, method, noted):
        yield found


def play(family: Family, folder: str, version: str, workers: Workers) -> dict[str, str]:
    """Each scenario's verdict."""
    network = reference.save(family, Path(folder))
    tokenizer = tiny_model.load_tokenizer(folder)
    verdicts = {}
    for name, (scenario, changes) in SCENARIOS.items():
        settings: Settings = SETTINGS.replace(mechanism=f"ragged_page_attention_{version}", **changes)
        try:
            with running(Engine(folder, settings, tokenizer, workers)) as engine:
                texts, answers = scenario(engine, tokenizer)
            verdict = reference.judge(network, tokenizer, texts, answers)
            with reference.rounded_rotary_tables(network):
                rounded = reference.judge(network, tokenizer, texts, answers)
            verdicts[name] = "equal (1)" if rounded.equal and not verdict.equal else str(verdict)
        except Exception as error:
            traceback.print_exc()
            verdicts[name] = f"fails: {message_of(error)}"
    return verdicts
