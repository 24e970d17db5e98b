"""Run twice by test_processes.py: the two processes of one job of ``jax.distributed``, two devices in each.

``python two_processes.py calls|odd port process``; see the functions of these names.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import easydel_ragged_plugin
from easydel_ragged_plugin import ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.testing.cases import Case, Row, build_batch
from easydel_ragged_plugin.testing.shards import local_pages
from easydel_ragged_plugin.testing.tolerances import tolerance_for

ROWS = (Row(9, 1), Row(0, 0), Row(17, 6), Row(8, 8), Row(30, 1), Row(25, 5))


def placed(array: Any, mesh: Mesh, spec: P) -> jax.Array:
    """``array``, which every process has, as one array of the whole mesh."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def call(version: Any, dp: int, tp: int) -> None:
    """One call on a mesh of all devices; the parts that this process has are compared with the oracle's."""
    mesh = Mesh(np.array(jax.devices()).reshape(dp, tp), ("dp", "tp"))
    case = Case("processes", ROWS, q_heads=8, kv_heads=4, num_pages=96, sinks="heads", decode_first=False)
    batch = local_pages(build_batch(case, version), dp)
    page_spec = P("dp", None, "tp", *[None] * (batch.pages.ndim - 3))
    before = () if version == "v2" else (None, None)
    options: Any = {"mesh": mesh, "in_specs": (P(None, "tp", None), *before, page_spec, *[None] * 5)}
    pages = placed(batch.pages if version == "v3" else batch.updated_pages, mesh, page_spec)
    last = batch.num_seqs if version == "v2" else batch.distribution
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, last, batch.sinks)
    arrays = [placed(each, mesh, P()) for each in (batch.queries, batch.keys, batch.values, *index)]

    def program(pages: Any, queries: Any, keys: Any, values: Any, *index: Any) -> Any:
        if version == "v2":
            return ragged_page_attention_v2(queries, pages, *index, **options), pages
        return ragged_page_attention_v3(queries, keys, values, pages, *index, **options)

    compiled = jax.jit(program).lower(pages, *arrays).compile()
    text = compiled.as_text()
    assert text is not None
    assert "all-gather" not in text
    output, new_pages = compiled(pages, *arrays)
    expected, expected_pages = batch.expected()
    bound = tolerance_for(case)
    for shard in output.addressable_shards:
        np.testing.assert_allclose(shard.data, expected[shard.index], rtol=bound.rtol, atol=bound.atol)
    for shard in new_pages.addressable_shards:
        assert np.asarray(shard.data).tobytes() == expected_pages[shard.index].tobytes()


def calls() -> None:
    """Heads split inside a process and across processes, pages across processes."""
    for dp, tp in ((1, 4), (4, 1), (2, 2)):
        for version in ("v2", "v3"):
            call(version, dp, tp)
            print(f"ok {version} dp={dp} tp={tp}")


def odd() -> None:
    """The test gives process 1 another configuration, and the plugin switched off where there is a host."""
    try:
        easydel_ragged_plugin.check_fingerprints()
    except easydel_ragged_plugin.FingerprintMismatch as error:
        print(f"refused: {error}")
    for name in ("EASYDEL_RAGGED_KERNEL", "EASYDEL_RAGGED_PLUGIN"):
        os.environ.pop(name, None)
    easydel_ragged_plugin.activate()
    easydel_ragged_plugin.check_fingerprints()
    print("ok after the repair")


def main(what: str, port: str, process: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    assert len(jax.devices()) == 4
    assert len(jax.local_devices()) == 2
    {"calls": calls, "odd": odd}[what]()
    jax.distributed.shutdown()
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
