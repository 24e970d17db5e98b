"""One family served by each engine of the matrix, and its answers compared with transformers'."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_model
from zoo import recorded, reference
from zoo.families import Family

from easydel_ragged_plugin.demo.engine import Engine, Settings
from easydel_ragged_plugin.demo.workers import Workers

EQUAL, DIFFERS, FAILS = "equal", "differs", "fails"
LABELS = ("ours-v2", "ours-v3", "host-v2", "host-v3")

SETTINGS = Settings(
    mechanism="",
    max_model_len=80,
    max_requests=4,  # one prompt fewer than there are: the last one arrives while the others decode
    decode_bucket=32,
    tokens_per_step=32,
    page_size=16,
)


def settings_of(label: str) -> Settings:
    """The engine that a column of the matrix is about."""
    who, version = label.split("-")
    return SETTINGS.replace(mechanism=f"ragged_page_attention_{version}", host_kernels=who == "host")


@contextlib.contextmanager
def no_parsers() -> Iterator[None]:
    """EasyDeL guesses a parser of tool calls from the family, and some want words that the tiny tokenizer lacks."""
    from easydel.inference.esurge import eSurge

    with (
        mock.patch.object(eSurge, "_auto_detect_tool_parser", return_value=None),
        mock.patch.object(eSurge, "_auto_detect_reasoning_parser_name", return_value=None),
    ):
        yield


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    """Close ``engine`` at the end, without the five seconds that EasyDeL waits for a thread that waits for its lock."""
    try:
        yield engine
    finally:
        engine._engine._scheduler_running = False
        engine._engine._scheduler_thread.join(5)
        engine.close()


def answers_of(engine: Engine, texts: list[str], eos: int) -> list[tuple[int, ...]]:
    """Greedy tokens; the engine leaves a last token out that ends the text."""
    found = [answer.token_ids for answer in engine.measure(texts, reference.NEW_TOKENS, full_length=True).answers]
    return [tokens if len(tokens) == reference.NEW_TOKENS else (*tokens, eos) for tokens in found]


def message_of(error: BaseException) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"/\S+/", "", lines[0]) if lines else ""
    return f"{type(error).__name__}: {text[:200]}"


def plain_forward(folder: str, texts: list[str], answers: list[tuple[int, ...]], tokenizer: Any) -> bool:
    """Whether EasyDeL's own forward pass without a cache, with plain attention, gives these answers."""
    import easydel
    import jax
    import jax.numpy as jnp
    import numpy as np

    network = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        folder,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        auto_shard_model=True,
        config_kwargs=easydel.EasyDeLBaseConfigDict(
            attn_mechanism="vanilla",
            attn_dtype=jnp.float32,
            freq_max_position_embeddings=SETTINGS.max_model_len,
            mask_max_position_embeddings=SETTINGS.max_model_len,
        ),
    )
    network.eval()
    ids = np.zeros((len(texts), SETTINGS.max_model_len), np.int32)
    rows = [[*tokenizer(text)["input_ids"], *answer] for text, answer in zip(texts, answers, strict=True)]
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    with network.mesh:
        logits = np.asarray(network(jnp.asarray(ids)).logits, np.float32)
    worst = 0.0
    for row, tokens in enumerate(rows):
        end = len(tokens) - 1
        at = logits[row, end - reference.NEW_TOKENS : end]
        chosen = at[np.arange(reference.NEW_TOKENS), tokens[end - reference.NEW_TOKENS + 1 :]]
        worst = max(worst, float((at.max(1) - chosen).max()))
    return worst < reference.TIE


def compared(
    network: Any, tokenizer: Any, folder: str, texts: list[str], answers: list[tuple[int, ...]]
) -> dict[str, Any]:
    """The outcome of an engine that answered, and in words how far it is from transformers."""
    verdict = reference.judge(network, tokenizer, texts, answers)
    if verdict.equal:
        return {"outcome": EQUAL, "detail": str(verdict)}
    with reference.rounded_rotary_tables(network):
        rounded = reference.judge(network, tokenizer, texts, answers)
    if rounded.equal:
        return {"outcome": EQUAL, "rounded": True, "detail": str(verdict)}
    plain: bool | str
    try:
        plain = plain_forward(folder, texts, answers, tokenizer)
    except Exception as error:
        plain = message_of(error)
    return {"outcome": DIFFERS, "detail": str(verdict), "with_rounded_tables": str(rounded), "as_plain_forward": plain}


def serve(family: Family, folder: str, labels: Sequence[str], workers: Workers) -> dict[str, dict[str, Any]]:
    """For each label, what the matrix says about the family."""
    network = reference.save(family, Path(folder))
    tokenizer = tiny_model.load_tokenizer(folder)
    texts = reference.prompts()
    found: dict[str, Any] = {}
    for label in labels:
        began = time.perf_counter()
        try:
            with running(Engine(folder, settings_of(label), tokenizer, workers)) as engine:
                answers = answers_of(engine, texts, tokenizer.eos_token_id)
                entry = compared(network, tokenizer, folder, texts, answers) | {"kernels": engine.kernels}
                if entry["outcome"] == DIFFERS:
                    alone = [answers_of(engine, [text], tokenizer.eos_token_id)[0] for text in texts]
                    entry["one_at_a_time"] = str(reference.judge(network, tokenizer, texts, alone))
        except Exception as error:
            traceback.print_exc()
            entry = {"outcome": FAILS, "detail": message_of(error)}
        if label.startswith("ours") and entry["outcome"] != EQUAL:
            entry["operation"] = recorded.compare(folder, settings_of(label), tokenizer, workers, texts)
        entry["seconds"] = round(time.perf_counter() - began, 1)
        found[label] = entry
    return found


def with_a_window_too_short(family: Family, folder: str, workers: Workers) -> dict[str, dict[str, Any]]:
    """Our v3 with one token less in its sliding windows: the comparison must find it."""
    from easydel_ragged_plugin import operations

    base = operations._RaggedPageAttention
    forward = base._forward

    def shortened(self: Any, **arguments: Any) -> Any:
        return forward(self, **{**arguments, "sliding_window": arguments["sliding_window"] - 1})

    network = reference.save(family, Path(folder))
    tokenizer = tiny_model.load_tokenizer(folder)
    texts = reference.prompts()
    with mock.patch.object(base, "_forward", shortened):
        engine = Engine(folder, settings_of("ours-v3"), tokenizer, workers)
    with running(engine):
        answers = answers_of(engine, texts, tokenizer.eos_token_id)
    return {"a window too short": compared(network, tokenizer, folder, texts, answers)}
