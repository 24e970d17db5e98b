"""The arguments that a model passes to our operations, and our answers held against the float64 reference on them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.demo.engine import Engine, Settings
from easydel_ragged_plugin.demo.workers import Workers

TOLERANCE = 2e-5
"""Of an output, relative to the largest value of it; float32 throughout."""


@dataclasses.dataclass
class Calls:
    """What was seen.

    Attributes:
        traced: calls that were compiled, one for each layer and program.
        compared: calls that ran, and whose answers were compared.
        worst: the largest error of an output, relative to the largest value of that output.
        options: the options of each call that was compiled.
    """

    traced: int = 0
    compared: int = 0
    worst: float = 0.0
    options: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        if not self.traced:
            return "is not reached"
        if not self.compared:
            return "never runs"
        right = "right" if self.worst < TOLERANCE else "WRONG"
        return f"{right}: {self.compared} calls, largest error {self.worst:.1e}"


@contextlib.contextmanager
def recording() -> Iterator[Calls]:
    """Compare each call of our operations that is traced inside of this block, when it runs."""
    import jax

    from easydel_ragged_plugin import api, operations

    calls = Calls()
    base = operations._RaggedPageAttention
    forward = base._forward

    def recorded(self: Any, **arguments: Any) -> Any:
        view, metadata = arguments["cache_view"], arguments["cache_metadata"]
        before = view.kv_pages
        with mock.patch.object(api, "attend", side_effect=api.attend) as attend:
            output = forward(self, **arguments)
        # What the operation makes of the arguments and of the model's config.
        (call,) = attend.call_args_list
        options, config = call.args[10], call.kwargs["config"]
        if config is not None and config.logits_soft_cap is not None:
            options = dataclasses.replace(options, logits_soft_cap=config.logits_soft_cap)
        calls.traced += 1
        calls.options.append(options.given())

        def compare(
            queries: Any, key: Any, value: Any, pages: Any, index: Any, sinks: Any, got: Any, after: Any
        ) -> None:
            lens, tables, starts, last = (np.asarray(each) for each in index)
            queries, key, value, pages = (np.asarray(each) for each in (queries, key, value, pages))
            sinks = None if sinks is None else np.asarray(sinks)
            if self.version == "v2":
                wanted = reference.ragged_page_attention_v2(
                    queries, pages, lens, tables, starts, last, sinks, options=options
                )
            else:
                wanted, stored = reference.ragged_page_attention_v3(
                    queries, key, value, pages, lens, tables, starts, last, sinks, options=options
                )
                if not np.array_equal(stored, np.asarray(after)):
                    calls.worst = float("inf")
            error = np.abs(np.asarray(got, np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30)
            calls.compared += 1
            calls.worst = max(calls.worst, float(error))

        index = (
            metadata.context_lens,
            metadata.pages_tables,
            metadata.query_start_loc,
            metadata.num_seqs if self.version == "v2" else metadata.request_distribution,
        )
        jax.debug.callback(
            compare,
            arguments["query"],
            arguments["key"],
            arguments["value"],
            before,
            index,
            arguments.get("softmax_aux"),
            output.attention_outputs,
            view.kv_pages,
        )
        return output

    with mock.patch.object(base, "_forward", recorded):
        yield calls


def compare(folder: str, settings: Settings, tokenizer: Any, workers: Workers, texts: list[str]) -> str:
    """Serve once more with every call of our operation compared, as far as the host gets."""
    import jax

    with recording() as calls:
        try:
            with Engine(folder, settings, tokenizer, workers) as engine:
                engine.measure(texts, 4, full_length=True)
        except Exception as error:
            print(f"while recording: {type(error).__name__}: {error}")
        jax.effects_barrier()
    return str(calls)
