"""Run by test_engine.py with two simulated devices: eSurge with heads split, or with requests and pages split.

``python engine_on_devices.py folder v3:1 v3:2``: versions, and over how many devices requests are split.
"""

from __future__ import annotations

import sys

import tiny_model

from easydel_ragged_plugin.demo.engine import Engine, Settings, import_host
from easydel_ragged_plugin.demo.workers import Workers


def main(folder: str, *engines: str) -> None:
    import_host()
    tokenizer = tiny_model.load_tokenizer(folder)
    with Workers(folder) as workers:
        for each in engines:
            version, data_parallel = each.split(":")
            settings = Settings(
                f"ragged_page_attention_{version}",
                max_model_len=32,
                page_size=4,
                data_parallel=int(data_parallel),
            )
            with Engine(folder, settings, tokenizer, workers) as engine:
                answers = engine.measure(tiny_model.PROMPTS, 6, full_length=True).answers
            print(each, engine.operation.rpartition(".")[2], *engine.kernels, flush=True)
            print(each, [answer.token_ids for answer in answers], flush=True)


if __name__ == "__main__":  # the engine starts tokenizer processes
    main(*sys.argv[1:])
