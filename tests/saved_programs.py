"""Run by test_saved_programs.py: one process saves programs, others load and run them.

``python saved_programs.py save FOLDER`` writes programs, their arguments and their results. ``... load FOLDER HOW``
runs them after nothing but the preparation that ``HOW`` names, and compares.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import easydel_ragged_plugin

if TYPE_CHECKING:
    from easydel_ragged_plugin.layout import Version

VERSIONS: tuple[Version, ...] = ("v2", "v3")


def save(folder: Path) -> None:
    """Programs of both versions with each kernel, by ``jax.export`` and by ``serialize_executable``."""
    import jax
    import numpy as np
    from jax.experimental import serialize_executable

    from easydel_ragged_plugin.kernels import cpu_native
    from easydel_ragged_plugin.testing.cases import build_batch, case_named

    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in easydel_ragged_plugin.CUSTOM_CALLS]
    for version in VERSIONS:
        batch = build_batch(case_named("sinks"), version)
        index = (batch.context_lens, batch.block_tables, batch.query_start_loc)
        if version == "v2":
            function: Any = easydel_ragged_plugin.ragged_page_attention_v2
            arguments: Any = (batch.queries, batch.updated_pages, *index, batch.num_seqs, batch.sinks)
        else:
            function = easydel_ragged_plugin.ragged_page_attention_v3
            arguments = (batch.queries, batch.keys, batch.values, batch.pages, *index, batch.distribution, batch.sinks)
        call = jax.jit(lambda *arrays, function=function: function(*arrays, config="cpu_native"))
        result = jax.tree.map(np.asarray, call(*arguments))
        exported = jax.export.export(call, disabled_checks=allowed)(*arguments)
        executable = serialize_executable.serialize(call.lower(*arguments).compile())
        saved = {"exported": exported.serialize(), "executable": executable, "arguments": arguments, "result": result}
        for what, target in (("older", cpu_native.TARGETS[-2]), ("newer", "easydel_ragged_attention_v99")):
            jax.clear_caches()
            with mock.patch.object(cpu_native, "TARGET", target):
                check = jax.export.DisabledSafetyCheck.custom_call(target)
                saved[what] = jax.export.export(call, disabled_checks=[check])(*arguments).serialize()
        jax.clear_caches()
        (folder / version).write_bytes(pickle.dumps(saved))


def prepare(how: str) -> None:
    """What a process does before it loads a program."""
    if how == "register":
        easydel_ragged_plugin.register_ffi_targets()
    elif how == "function":
        _ = easydel_ragged_plugin.ragged_page_attention_v3
    elif how == "host":
        import easydel.layers.attention  # noqa: F401
    elif how == "running":  # a backend that runs already
        import jax

        jax.devices()
        easydel_ragged_plugin.register_ffi_targets()
    else:
        assert how == "nothing"


def load(folder: Path, how: str) -> None:
    prepare(how)
    import jax
    import numpy as np
    from jax.experimental import serialize_executable

    for version in VERSIONS:
        saved = pickle.loads((folder / version).read_bytes())
        for name in ("exported", "executable", "older", "newer"):
            try:
                if name == "executable":
                    call = serialize_executable.deserialize_and_load(*saved[name])
                else:
                    call = jax.jit(jax.export.deserialize(saved[name]).call)
                result = jax.tree.leaves(jax.block_until_ready(call(*saved["arguments"])))
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                print(f"refused {version} {name}: {error}".replace("\n", " "))
            else:
                for got, wanted in zip(result, jax.tree.leaves(saved["result"]), strict=True):
                    assert np.asarray(got).tobytes() == wanted.tobytes(), name
                print(f"ok {version} {name}")


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    commands: dict[str, Any] = {"save": save, "load": load}
    commands[what](Path(place), *rest)
