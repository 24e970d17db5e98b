"""Sharded equals unsharded, on virtual CPU devices, through the public functions."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from easydel_ragged_plugin import ragged_page_attention_v3, sharding
from easydel_ragged_plugin.testing.cases import build_batch, case_named

PROGRAM = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from easydel_ragged_plugin import ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.testing.cases import Case, Row, build_batch

assert len(jax.devices()) == 4
rows = (Row(9, 1), Row(0, 0), Row(17, 6), Row(8, 8), Row(30, 1), Row(25, 5))

def batch_of(version, q_heads, kv_heads, head_dim, sinks):
    case = Case("sharded", rows, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, sinks=sinks)
    return build_batch(case, version, poison="finite")

def split_rows(batch, shards):
    # What a data-parallel host does: rows of a shard have pages of that shard alone.
    pages = batch.pages if batch.version == "v3" else batch.updated_pages
    per_rows, per_pages = len(batch.context_lens) // shards, len(pages) // shards
    tables, new_pages = batch.block_tables.copy(), pages.copy()
    taken = [shard * per_pages + 1 for shard in range(shards)]
    for row, lens in enumerate(batch.case.rows):
        shard = row // per_rows
        for entry in range(-(-lens.context // batch.case.page_size)):
            new_pages[taken[shard]] = pages[batch.block_tables[row, entry]]
            tables[row, entry] = taken[shard]
            taken[shard] += 1
    return tables, new_pages

for version in ("v2", "v3"):
    for q_heads, kv_heads, head_dim, tp, dp in (
        (8, 4, 32, 2, 1), (8, 4, 32, 4, 1), (4, 1, 32, 2, 1), (6, 3, 32, 2, 1), (8, 4, 64, 2, 1),
        (4, 2, 32, 1, 2), (8, 2, 32, 2, 2), (4, 4, 32, 1, 4),
    ):
        for sinks in (None, "heads"):
            mesh = Mesh(np.array(jax.devices()[: tp * dp]).reshape(dp, tp), ("dp", "tp"))
            batch = batch_of(version, q_heads, kv_heads, head_dim, sinks)
            tables, pages = split_rows(batch, dp)
            heads = "tp" if kv_heads % tp == 0 else None
            q_spec, page_spec = P(None, "tp", None), P("dp", None, heads, *[None] * (pages.ndim - 3))
            index = (batch.context_lens, tables, batch.query_start_loc)
            outputs = []
            for sharded in (False, True):
                def call(pages, queries, keys, values, *index):
                    options = dict(mesh=mesh, in_specs=(q_spec, page_spec, *[None] * 4) if version == "v2"
                                   else (q_spec, None, None, page_spec, *[None] * 4)) if sharded else {}
                    sink = None if batch.sinks is None else jnp.asarray(batch.sinks)
                    if version == "v2":
                        num_seqs = jnp.asarray(batch.num_seqs)
                        return ragged_page_attention_v2(queries, pages, *index, num_seqs, sink, **options), pages
                    return ragged_page_attention_v3(
                        queries, keys, values, pages, *index, jnp.asarray(batch.distribution), sink, **options)
                given = jnp.asarray(pages)
                if sharded:
                    given = jax.device_put(given, NamedSharding(mesh, page_spec))
                compiled = jax.jit(call).lower(given, batch.queries, batch.keys, batch.values, *index).compile()
                output, new_pages = compiled(given, batch.queries, batch.keys, batch.values, *index)
                if sharded and (heads or dp > 1) and not (heads is None and tp > 1):
                    shape = ",".join(map(str, pages.shape))
                    lines = compiled.as_text().splitlines()
                    assert not [line for line in lines if "all-gather" in line and f"[{shape}]" in line]
                    assert new_pages.sharding.is_equivalent_to(NamedSharding(mesh, page_spec), pages.ndim)
                outputs.append((np.asarray(output), np.asarray(new_pages)))
            np.testing.assert_allclose(outputs[0][0], batch.expected()[0], rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(outputs[1][0], outputs[0][0], rtol=1e-5, atol=1e-5)
            assert (outputs[1][1].view(np.uint8) == outputs[0][1].view(np.uint8)).all()
            print("ok", version, q_heads, kv_heads, head_dim, f"tp={tp} dp={dp}", sinks)
print("all sharded calls agree")
"""


def test_sharded_equals_unsharded() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "all sharded calls agree" in done.stdout


def test_pages_that_do_not_divide_are_refused() -> None:
    batch = build_batch(case_named("mixed"), "v3")
    mesh = AbstractMesh((3,), ("dp",))
    page_spec = PartitionSpec("dp", None, None, None, None)
    arrays = (batch.queries, batch.keys, batch.values, batch.pages, batch.context_lens, batch.block_tables)

    def call(*arguments: Any) -> Any:
        specs = (None, None, None, page_spec, None, None, None, None)
        return ragged_page_attention_v3(*arguments, mesh=mesh, in_specs=specs)

    with pytest.raises(ValueError, match="8 rows of the block table do not divide among 3 shards"):
        jax.eval_shape(call, *arrays, batch.query_start_loc, batch.distribution)


def test_one_device_is_not_sharded() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))
    shards = sharding.plan(None, None, mesh, PartitionSpec(), PartitionSpec())  # type: ignore[arg-type]
    assert shards.is_single
