"""EasyDeL's serving engine, set up small: what the demo, the comparison and the real-model tests run.

The engine compiles one program for each token bucket, so a start costs about as many compilations as there are
powers of two between ``decode_bucket`` and ``tokens_per_step``. Both default to what a handful of short requests
needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from easydel_ragged_plugin import host, startup
from easydel_ragged_plugin.hooks import hookimpl, register, unregister

from .workers import Workers

__all__ = ["Answer", "Engine", "Measurement", "Settings", "import_host", "interleaved", "median"]

CANCEL_S = 0.02
"""When a request that is cancelled before its first token is cancelled: it has been tokenized, and may wait."""

_request_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        mechanism: ``ragged_page_attention_v2`` or ``ragged_page_attention_v3``.
        host_kernels: use the class that held the name before this package.
        ceiling: use an operation that returns its queries: what the engine costs without attention. Its answers
            mean nothing.
        max_model_len: tokens of the longest request, answer included; a multiple of ``page_size``.
        max_requests: requests served at once.
        decode_bucket: tokens of the smallest compiled step, a power of two.
        tokens_per_step: tokens of the largest compiled step, a power of two; longer prompts go in chunks.
        page_size: tokens in a page.
        dtype: dtype of weights, activations and cache.
        data_parallel: devices over which requests and pages are split; the heads are split over all others.
        pages: pages of the cache, the reserved one included; None for as many as the requests need.
        prefix_caching: requests share the pages of equal prefixes. Off: answers must not depend on earlier prompts.
        async_scheduling: schedule a step before the one before it has ended, as EasyDeL does by default. With too few
            ``pages`` its answers are wrong in EasyDeL 0.3.0, whatever the kernel.
    """

    mechanism: str
    host_kernels: bool = False
    ceiling: bool = False
    max_model_len: int = 512
    max_requests: int = 4
    decode_bucket: int = 16
    tokens_per_step: int = 16
    page_size: int = 16
    dtype: str = "float32"
    data_parallel: int = 1
    pages: int | None = None
    prefix_caching: bool = False
    async_scheduling: bool = True

    def replace(self, **changes: Any) -> Settings:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One finished request.

    Attributes:
        text: the answer, special tokens left out.
        token_ids: its tokens, without the end-of-text token (hosts differ in whether they report it).
        cancelled: whether it was cancelled before its end.
        generated: how many tokens the engine has generated. An answer that has no text but end-of-text tokens has none
            in ``token_ids``.
    """

    text: str
    token_ids: tuple[int, ...]
    cancelled: bool = False
    generated: int = 0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one batch of requests took.

    Attributes:
        answers: one for each prompt.
        seconds: from the first request to the last token.
        first_token_s: from the first request until every request had a token.
        tokens_per_s: all tokens / ``seconds``, prompts included.
        decode_tokens_per_s: tokens of the time in which all requests were decoding, over that time; None where
            there was no such time.
    """

    answers: tuple[Answer, ...]
    seconds: float
    first_token_s: float
    tokens_per_s: float
    decode_tokens_per_s: float | None


def _decode_rate(progress: Sequence[Sequence[tuple[float, int]]]) -> float | None:
    """Rate between the moment when the last request began to answer and the moment when the first one ended.

    Args:
        progress: for each request, when it had how many tokens.
    """
    started, ended = max(each[0][0] for each in progress), min(each[-1][0] for each in progress)
    if ended <= started:
        return None
    tokens = 0
    for each in progress:
        counts = [max((count for moment, count in each if moment <= limit), default=0) for limit in (started, ended)]
        tokens += counts[1] - counts[0]
    return tokens / (ended - started) if tokens else None


class _Watcher:
    """Hook that notes which kernels the traced calls got."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    @hookimpl
    def ragged_selected(self, selection: Any) -> None:
        if selection.kernel not in self.kernels:
            self.kernels.append(str(selection.kernel))


def import_host() -> None:
    """Import EasyDeL's serving parts (10 to 20 seconds) and make sure that our operations hold their names."""
    # Read when TensorFlow-style C++ logging and eSurge's workers start, so set before they are imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    host.operations_module()
    importlib.import_module("easydel.inference.esurge")


def _ceiling_class(base: type) -> type:
    """``base`` with attention left out: the queries come back, and the cache is not touched."""
    output = host.load().AttentionOutput

    def returns_queries(self: Any, *, query: Any, **arguments: Any) -> Any:
        return output(attention_weights=None, attention_outputs=query)

    return type(f"{base.__name__}Ceiling", (base,), {"_forward": returns_queries})


@contextlib.contextmanager
def _operations_of(settings: Settings) -> Iterator[str]:
    """Registry state for building one engine: ours, the host's, or the ceiling. Yields the class of the mechanism."""
    was_active = startup.status().active
    if settings.host_kernels:
        startup.deactivate()
    else:
        startup.activate()
    registry = host.registry()
    replaced = registry[settings.mechanism]
    try:
        if settings.ceiling:
            registry[settings.mechanism] = _ceiling_class(replaced)
        yield _class_path(registry.get(settings.mechanism))
    finally:
        if settings.ceiling:
            registry[settings.mechanism] = replaced
        if was_active or not settings.host_kernels:
            startup.activate()


def _class_path(cls: type | None) -> str:
    return "nothing" if cls is None else f"{cls.__module__}.{cls.__qualname__}"


@contextlib.contextmanager
def _page_budget(settings: Settings, slot_bytes: int) -> Iterator[None]:
    """Let the host allocate the pages that these requests need, where it can't see the device's memory.

    On CPU EasyDeL 0.3.0 takes 4 GiB whatever ``hbm_utilization`` says, and 0.2.0.2 crashes because a CPU device has no
    memory statistics. Devices that have them are left to the host.
    """
    import jax

    if any(device.memory_stats() for device in jax.local_devices()):
        yield
        return
    module: Any = sys.modules[host.load().RaggedPagesCacheConfig.__module__]
    # Page 0 is reserved, and a request that finishes holds its pages until the next step.
    pages = settings.pages or 2 * settings.max_requests * -(-settings.max_model_len // settings.page_size) + 8
    budget = pages * settings.page_size * slot_bytes
    replaced = module.per_device_hbm_budget_bytes
    module.per_device_hbm_budget_bytes = lambda *args, **kwargs: budget
    try:
        yield
    finally:
        module.per_device_hbm_budget_bytes = replaced


class Engine:
    """A running engine. Use as a context manager, or call :meth:`close`.

    Attributes:
        settings: how it was set up.
        operation: module and name of the class that serves the mechanism.
        kernels: kernels of this package that its programs were traced with; empty with the host's class.
    """

    def __init__(
        self,
        model: str,
        settings: Settings,
        tokenizer: Any,
        workers: Workers,
        *,
        loaded: Callable[[], None] = lambda: None,
    ):
        import jax
        import jax.numpy as jnp

        easydel = importlib.import_module("easydel")
        esurge = importlib.import_module("easydel.inference.esurge").eSurge
        self.settings = settings
        self.tokenizer = tokenizer
        dtype = jnp.dtype(settings.dtype).type
        watcher = _Watcher()
        with _operations_of(settings) as self.operation:
            network = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
                model,
                dtype=dtype,
                param_dtype=dtype,
                precision=jax.lax.Precision.HIGHEST if settings.dtype == "float32" else jax.lax.Precision.DEFAULT,
                sharding_axis_dims=(settings.data_parallel, 1, 1, -1, 1),
                auto_shard_model=True,
                config_kwargs=easydel.EasyDeLBaseConfigDict(
                    attn_mechanism=settings.mechanism,
                    attn_dtype=dtype,
                    kvdtype=dtype,
                    freq_max_position_embeddings=settings.max_model_len,
                    mask_max_position_embeddings=settings.max_model_len,
                ),
            )
            loaded()
            config = network.config.get_text_config()
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            width = jnp.dtype(dtype).itemsize
            # The host makes a cache of one kv head where the config does not say how many there are.
            kv_heads = getattr(config, "num_key_value_heads", None) or 1
            slot_bytes = 2 * config.num_hidden_layers * kv_heads * head_dim * width
            register(watcher)
            try:
                with _page_budget(settings, slot_bytes):
                    self._engine = esurge(
                        model=network,
                        tokenizer=tokenizer,
                        dtype=dtype,
                        max_model_len=settings.max_model_len,
                        max_num_seqs=settings.max_requests,
                        max_num_seq_buckets=[settings.max_requests],
                        min_input_pad=settings.max_requests,
                        min_token_pad=settings.decode_bucket,
                        max_num_batched_tokens=settings.tokens_per_step,
                        page_size=settings.page_size,
                        enable_prefix_caching=settings.prefix_caching,
                        # 0.2.0.2 has no such argument.
                        **({} if settings.async_scheduling else {"async_scheduling": False}),
                        overlap_execution=False,
                        **workers.endpoints,
                    )
            finally:
                unregister(watcher)
        self.kernels = tuple(watcher.kernels)

    def chat(
        self, prompts: Sequence[str], max_tokens: int, grew: Callable[[int, str], None] = lambda index, text: None
    ) -> tuple[list[Answer], float]:
        """Ask all prompts at once, greedily.

        Args:
            prompts: user messages; the tokenizer's chat template is applied where there is one.
            max_tokens: longest answer.
            grew: called with the prompt's index and its whole answer so far, from one thread for each prompt.

        Returns:
            The answers, and the seconds from the first request to the last token.
        """
        measured = self.measure([self.as_chat(self.tokenizer, prompt) for prompt in prompts], max_tokens, grew)
        return list(measured.answers), measured.seconds

    def measure(
        self,
        texts: Sequence[str],
        max_tokens: int,
        grew: Callable[[int, str], None] = lambda index, text: None,
        *,
        full_length: bool = False,
    ) -> Measurement:
        """Continue all texts at once, greedily, and note when tokens came.

        Args:
            texts: taken as they are, without a chat template.
            max_tokens: longest answer.
            grew: as for :meth:`chat`.
            full_length: go on after an end-of-text token, so that each answer has ``max_tokens`` tokens.
        """
        params = importlib.import_module("easydel.inference.sampling_params").SamplingParams
        answers: list[Answer | None] = [None] * len(texts)
        progress: list[list[tuple[float, int]]] = [[] for _ in texts]
        errors: list[BaseException] = []

        def ask(index: int, text: str) -> None:
            try:
                sampling = params(
                    max_tokens=max_tokens, temperature=0.0, skip_special_tokens=True, ignore_eos=full_length
                )
                for output in self._engine.stream(text, sampling):
                    count = int(output.num_generated_tokens)
                    if count > (progress[index][-1][1] if progress[index] else 0):
                        progress[index].append((time.perf_counter(), count))
                    if output.accumulated_text:
                        grew(index, output.accumulated_text)
                tokens = tuple(int(token) for token in output.outputs[0].token_ids)
                if tokens and tokens[-1] == self.tokenizer.eos_token_id:
                    tokens = tokens[:-1]
                answers[index] = Answer(output.accumulated_text, tokens)
            except BaseException as error:  # raised again in the caller's thread
                errors.append(error)

        threads = [threading.Thread(target=ask, args=item, daemon=True) for item in enumerate(texts)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - started
        if errors:
            raise errors[0]
        finished = tuple(answer for answer in answers if answer is not None)
        spoke = all(progress)  # a request may end before its first token
        return Measurement(
            answers=finished,
            seconds=elapsed,
            first_token_s=max(each[0][0] for each in progress) - started if spoke else elapsed,
            tokens_per_s=sum(len(answer.token_ids) for answer in finished) / elapsed,
            decode_tokens_per_s=_decode_rate(progress) if spoke else None,
        )

    def answer(self, text: str, max_tokens: int, *, cancel_after: int | None = None) -> Answer:
        """Continue one text greedily. Several threads may call this at once.

        Args:
            text: taken as it is.
            max_tokens: tokens of the answer; it goes on after an end-of-text token.
            cancel_after: cancel the request after so many tokens; 0 cancels it while it waits or its prompt is read.
        """
        params = importlib.import_module("easydel.inference.sampling_params").SamplingParams
        sampling = params(max_tokens=max_tokens, temperature=0.0, skip_special_tokens=True, ignore_eos=True)
        request = f"request-{next(_request_numbers)}"
        timer = threading.Timer(CANCEL_S, self._engine.abort_request, (request,))
        if cancel_after == 0:
            timer.start()
        output, cancelled = None, False
        for output in self._engine.stream(text, sampling, request_id=request):
            if not cancelled and cancel_after and cancel_after <= int(output.num_generated_tokens) < max_tokens:
                self._engine.abort_request(request)
                cancelled = True
        timer.cancel()
        if output is None:  # cancelled before the engine had anything to tell
            return Answer("", (), cancelled=True)
        given = output.outputs[0]
        return Answer(
            output.accumulated_text,
            tuple(map(int, given.token_ids)),
            cancelled=given.finish_reason == "abort",
            generated=int(output.num_generated_tokens),
        )

    @staticmethod
    def as_chat(tokenizer: Any, prompt: str) -> str:
        """``prompt`` as the user's message in the tokenizer's chat template, or as it is where there is none."""
        if not tokenizer.chat_template:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    @property
    def esurge(self) -> Any:
        """EasyDeL's engine itself, for what takes one."""
        return self._engine

    def abort(self) -> None:
        """End the requests that the scheduler has, each with the answer that it has so far."""
        for request in tuple(self._engine.scheduler.requests):
            self._engine.abort_request(request)

    def pause(self) -> None:
        """Stop the scheduler thread until :meth:`resume`. It polls when there is nothing to do, and takes a core."""
        self._engine.pause()

    def resume(self) -> None:
        """Start the scheduler thread again."""
        self._engine.resume()

    def close(self) -> None:
        """Stop the scheduler thread."""
        self._engine.terminate()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def interleaved(
    engines: Mapping[str, Engine],
    texts: Sequence[str],
    max_tokens: int,
    rounds: int,
    *,
    full_length: bool = False,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Measurement]]:
    """Measure every engine ``rounds`` times in turns, A B C A B C: a slow moment of the machine hits all alike.

    One engine runs at a time; all are left paused.

    Args:
        engines: by label.
        texts, max_tokens, full_length: see :meth:`Engine.measure`.
        done: called before each measurement with the number of those done and of all.
    """
    measured: dict[str, list[Measurement]] = {label: [] for label in engines}
    for turn in range(rounds):
        for place, (label, engine) in enumerate(engines.items()):
            done(turn * len(engines) + place, rounds * len(engines))
            engine.resume()
            measured[label].append(engine.measure(texts, max_tokens, full_length=full_length))
            engine.pause()
    return measured


def median(measurements: Sequence[Measurement], field: str) -> float | None:
    """Median of a field; None when no measurement has it."""
    values = [value for each in measurements if (value := getattr(each, field)) is not None]
    return statistics.median(values) if values else None
