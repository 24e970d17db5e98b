"""Sharded equals unsharded, on virtual CPU devices, through the public functions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from easydel_ragged_plugin import explain, ragged_page_attention_v3, select, sharding
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.testing.cases import Case, Row, build_batch, case_named
from easydel_ragged_plugin.types import Operands


def run_program(what: str, devices: int = 8) -> str:
    """What ``sharded_calls.py`` prints; simulated devices must be asked for before JAX starts."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("sharded_calls.py")), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "all sharded calls agree" in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    "what", [pytest.param("functions", marks=pytest.mark.once), pytest.param("few", marks=pytest.mark.host)]
)
def test_sharded_equals_unsharded(what: str) -> None:
    """Every kernel, on 2, 4 and 8 devices: heads, pages, both, sinks, what does not divide; and the collectives.

    Without the host's kernel all of it, and with it a part.
    """
    printed = run_program(what)
    assert ("ok v3 xla Geometry(q_heads=16, kv_heads=8, head_dim=32, tp=8" in printed) == (what == "functions")
    assert "ok a gather of pages is seen" in printed
    if cpu_native.availability() is None:
        assert "ok v3 cpu_native" in printed


def test_callers_with_meshes_of_their_own() -> None:
    """Inside of shard_map with its defaults, under strict settings of JAX, and with explicit meshes."""
    printed = run_program("callers")
    assert "ok v3 xla: inside of shard_map" in printed
    assert "ok v3 xla: strict settings" in printed
    assert "ok v2 xla: explicit (1, 1), sharded, mesh=none" in printed
    assert "ok: another mesh than that of the arrays is refused" in printed


@pytest.mark.host
def test_operations_on_the_hosts_meshes() -> None:
    """The same through the host's own cache configuration, placement and partition manager."""
    run_program("operations")


def request_of(q_heads: int, kv_heads: int, cache_dtype: str = "float32") -> tuple[Any, Any]:
    """A v3 request and what ``plan`` reads of its operands."""
    case = Case("plan", (Row(3, 1),), q_heads=q_heads, kv_heads=kv_heads, cache_dtype=cache_dtype)
    batch = build_batch(case, "v3")
    index: Any = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    selection = explain(ragged_page_attention_v3, batch.queries, batch.keys, batch.values, batch.pages, *index)
    arrays: Any = (batch.queries, batch.keys, batch.values, batch.pages, *index, None)
    return selection.request, Operands(*arrays)


def specs_v3(queries: PartitionSpec | None, pages: PartitionSpec) -> tuple[PartitionSpec | None, ...]:
    """Specs of the eight positional arguments of ``ragged_page_attention_v3``."""
    return (queries, None, None, pages, None, None, None, None)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dtype", "pages_axis", "message"),
    [
        (
            6,
            3,
            "float32",
            None,
            r"every shard of \('tp',\) computes all heads: 3 kv heads do not divide among 2 shards",
        ),
        (5, 5, "float32", "tp", r"its pages are split over \('tp',\) and gathered on every call: 5 query heads do not"),
        (4, 2, "float32", None, r"split over \('tp',\), those of the pages over nothing"),
        (
            4,
            2,
            "float8_e4m3fn",
            "tp",
            "1 head groups of a float8_e4m3fn cache with 2 kv heads can't be split into 2 shards",
        ),
        (4, 1, "float32", "tp", "the one kv head has no parts; its pages are split"),
    ],
)
def test_heads_that_cannot_be_split_are_told(
    q_heads: int, kv_heads: int, dtype: str, pages_axis: str | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    select._warned.clear()
    mesh = AbstractMesh((2,), ("tp",))
    request, operands = request_of(q_heads, kv_heads, dtype)
    for _ in range(2):
        specs = specs_v3(PartitionSpec(None, "tp", None), PartitionSpec(None, None, pages_axis))
        shards = sharding.plan(request, operands, mesh, specs)
    assert not shards.head_axes
    assert shards.query_only_axes == (("tp",) if kv_heads == 1 else ())
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert re.search(message, record.getMessage()), record.getMessage()


def test_heads_that_divide_are_split_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    select._warned.clear()
    request, operands = request_of(8, 4)
    mesh = AbstractMesh((2, 2), ("dp", "tp"))
    specs = specs_v3(PartitionSpec(None, "tp", None), PartitionSpec("dp", None, "tp", None, None))
    shards = sharding.plan(request, operands, mesh, specs)
    assert (shards.head_axes, shards.page_axes) == (("tp",), ("dp",))
    local = sharding.local_request(request, operands, shards)
    assert (local.num_q_heads, local.num_kv_heads, local.num_rows, local.num_pages) == (4, 2, 4, 32)
    assert not caplog.records


@pytest.mark.parametrize(
    ("starts", "total", "expected"),
    [
        ((0, 1, 2, 3, 9), 4, [3, 3, 4]),  # decode rows first, as the host orders a batch
        ((0, 6, 7, 7, 8), 4, [0, 0, 4]),  # as data parallelism orders it
        ((0, 1, 1, 2, 2), 3, [1, 1, 3]),  # an idle row ends the run of decodes and hides nobody
        ((0, 0, 0, 0, 0), 0, [0, 0, 0]),
    ],
)
def test_bounds_of_a_shards_rows(starts: tuple[int, ...], total: int, expected: list[int]) -> None:
    """What the TPU kernel takes its three kinds of rows from."""
    ends = jnp.array([0, *(100 for _ in range(3)), *(100 + start for start in starts)], jnp.int32)  # 4 rows before ours
    operands = Operands(
        queries=jnp.zeros((1, 1, 1)),
        keys=None,
        values=None,
        pages=jnp.zeros((2, 1, 2, 1)),
        context_lens=jnp.ones(4, jnp.int32),
        block_tables=jnp.zeros((4, 1), jnp.int32),
        query_start_loc=ends,
        distribution=jnp.array([7, 7, 4 + total]),
        sinks=None,
    )
    shards = sharding.Shards(page_axes=("dp",))
    local = jax.vmap(lambda _: sharding.local_rows(operands, shards), axis_name="dp")(jnp.arange(2))
    np.testing.assert_array_equal(local.distribution[1], expected)
    np.testing.assert_array_equal(local.query_start_loc[1], 100 + np.array(starts))


def test_pages_that_do_not_divide_are_refused() -> None:
    batch = build_batch(case_named("mixed"), "v3")
    mesh = AbstractMesh((3,), ("dp",))
    page_spec = PartitionSpec("dp", None, None, None, None)
    arrays = (batch.queries, batch.keys, batch.values, batch.pages, batch.context_lens, batch.block_tables)

    def call(*arguments: Any) -> Any:
        return ragged_page_attention_v3(*arguments, mesh=mesh, in_specs=specs_v3(None, page_spec))

    with pytest.raises(ValueError, match="8 rows of the block table do not divide among 3 shards"):
        jax.eval_shape(call, *arrays, batch.query_start_loc, batch.distribution)


def test_one_device_is_not_sharded() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))
    shards = sharding.plan(*request_of(8, 4), mesh, specs_v3(PartitionSpec(None, "tp"), PartitionSpec("tp")))
    assert shards.is_single
