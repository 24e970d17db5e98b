"""Run by test_processes.py: EasyDeL in Ray actors whose code names no plugin.

``python ray_engine.py folder`` serves the model of tiny_model.py in one actor, then split over two actors.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = ["w11 w12 w13 w14 w15", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30"]
OPERATIONS = ("easydel.operations", "easydel.layers.operations")


class Serving:
    """One worker, as a user of EasyDeL would write it. With ``port`` it is one of two that share a model."""

    def __init__(self, folder: str, port: int | None = None, process: int = 0) -> None:
        import jax

        self.folder, self.shares, self.leads = folder, port is not None, process == 0
        self.options: dict[str, Any] = {}
        if port is not None:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
            find = socket.getaddrinfo

            def both(name: Any, *arguments: Any, **options: Any) -> Any:
                """Two addresses of this machine in place of a DNS entry for two machines."""
                if name != "two-actors":
                    return find(name, *arguments, **options)
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", 0)) for last in (1, 2)]

            socket.getaddrinfo = both  # type: ignore[assignment]
            self.options = {
                "distributed_mode": True,
                "distributed_service_name": "two-actors",
                "distributed_world_size": 2,
                "distributed_control_port": port + 1,
                "distributed_auth_token": "secret",
                "distributed_connect_timeout_s": 240.0,
                "distributed_step_timeout_s": 240.0,
            }

    def serve(self) -> list[tuple[int, ...]]:
        """Greedy answers to the prompts; a follower gives none."""
        import easydel
        import jax.numpy as jnp
        from easydel.inference.esurge import eSurge
        from easydel.inference.sampling_params import SamplingParams
        from transformers import PreTrainedTokenizerFast

        caching: Any = sys.modules.get("easydel.caching.ragged_page.cache")
        caching = caching or sys.modules["easydel.layers.caching.ragged_page.cache"]
        caching.per_device_hbm_budget_bytes = lambda *args, **kwargs: 1 << 20  # a CPU tells no memory
        model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
            self.folder,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            sharding_axis_dims=(1, 1, 1, -1, 1),
            auto_shard_model=True,
            config_kwargs=easydel.EasyDeLBaseConfigDict(
                attn_mechanism="ragged_page_attention_v3",
                attn_dtype=jnp.float32,
                kvdtype=jnp.float32,
                freq_max_position_embeddings=32,
                mask_max_position_embeddings=32,
            ),
        )
        engine = eSurge(
            model=model,
            tokenizer=PreTrainedTokenizerFast.from_pretrained(self.folder),
            dtype=jnp.float32,
            max_model_len=32,
            max_num_seqs=2,
            max_num_seq_buckets=[2],
            min_input_pad=2,
            min_token_pad=16,
            max_num_batched_tokens=16,
            page_size=4,
            enable_prefix_caching=False,
            overlap_execution=False,
            **self.options,
        )
        finished = Path(self.folder) / "finished"
        answers: list[tuple[int, ...]] = []
        try:
            if self.leads:
                params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
                outputs = engine.generate(PROMPTS, params)
                answers = [tuple(int(token) for token in output.outputs[0].token_ids) for output in outputs]
                if self.shares:
                    finished.touch()
            while self.shares and not finished.exists():
                time.sleep(0.2)
        finally:
            engine.terminate()
        return answers

    def classes(self) -> list[str]:
        """What serves the two operations in this process."""
        operations = next(sys.modules[name] for name in OPERATIONS if name in sys.modules)
        registry = operations.OperationRegistry
        return [registry.get(f"ragged_page_attention_{version}").__module__ for version in ("v2", "v3")]


def main(folder: str) -> None:
    import ray

    # Ray copies the working directory and sets the number of threads otherwise; neither is wanted here.
    ray.init(num_cpus=3, include_dashboard=False, configure_logging=False, log_to_driver=True)
    try:
        actor = ray.remote(num_cpus=1)(Serving)
        alone = actor.remote(folder)
        print("alone", ray.get(alone.serve.remote()), flush=True)
        print("alone", ray.get(alone.classes.remote()), flush=True)
        ray.kill(alone)
        if importlib.util.find_spec("easydel.inference.esurge.distributed") is None:
            return  # EasyDeL 0.2.0.2: its engine knows one process
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        pair = [actor.remote(folder, port, process) for process in (0, 1)]
        print("shared", ray.get([each.serve.remote() for each in pair])[0], flush=True)
        print("shared", ray.get([each.classes.remote() for each in pair]), flush=True)

        # The one thing here that knows the plugin: the comparison of the workers.
        from easydel_ragged_plugin import check_fingerprints, fingerprint

        def of(serving: Any) -> dict[str, str]:
            return fingerprint()

        found_by_actor = {str(i): ray.get(each.__ray_call__.remote(of)) for i, each in enumerate(pair)}
        check_fingerprints(found_by_actor)
        print("fingerprints agree", flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(*sys.argv[1:])
