"""The functions inside of ``jax.shard_map`` with its defaults, which follow what varies over the mesh.

Here on one device, where types are all that a mesh changes; test_sharding.py has eight. The kernels' own contract has
operands that vary all together.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from turboquant_oracle import random_pages

from easydel_ragged_plugin import ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.testing.cases import build_batch, case_named
from easydel_ragged_plugin.varying import result_type, vary, varying_axes

CASE = case_named("sinks")
KERNELS = [
    pytest.param(
        "cpu_native", marks=pytest.mark.skipif(cpu_native.availability() is not None, reason="no native library")
    ),
    "xla",
    "turboquant",
]
NAMES = {
    "v2": ("queries", "pages", "context_lens", "block_tables", "query_start_loc", "last", "sinks"),
    "v3": ("queries", "keys", "values", "pages", "context_lens", "block_tables", "query_start_loc", "last", "sinks"),
}
HEADS = ("queries", "keys", "values", "pages", "sinks")
SUBSETS = [(), ("queries",), ("pages",), ("values",), ("context_lens",), ("block_tables",), ("last",), HEADS]


def mesh_of_one() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("x", "y"))


def arrays_of(version: Any, kernel: str) -> dict[str, Any]:
    """The positional arguments by name."""
    batch = build_batch(CASE, version)
    arrays = {name: getattr(batch, name) for name in NAMES[version] if hasattr(batch, name)}
    arrays["last"] = batch.num_seqs if version == "v2" else batch.distribution
    if version == "v2":
        arrays["pages"] = batch.updated_pages
    if kernel == "turboquant":
        arrays["pages"] = random_pages(CASE, len(batch.pages))
    return {name: jax.tree.map(jnp.asarray, arrays[name]) for name in NAMES[version]}


@pytest.mark.parametrize("varying", SUBSETS, ids="-".join)
@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_vary_over_the_axes_of_all_operands(kernel: str, version: str, varying: tuple[str, ...]) -> None:
    """Some operands vary over x; the others over nothing, or, for one of them, over y."""
    arrays = arrays_of(version, kernel)
    varying = tuple(name for name in varying if name in arrays)
    function: Any = ragged_page_attention_v2 if version == "v2" else ragged_page_attention_v3
    specs = {name: P("x") if name in varying else P() for name in arrays}
    if varying and "query_start_loc" not in varying:
        specs["query_start_loc"] = P("y")
    axes = {str(name) for spec in specs.values() for name in spec}
    found: list[frozenset[str]] = []

    def call(*operands: Any) -> Any:
        results = function(*operands, config=kernel, return_lse=True)
        found.extend(varying_axes(each) for each in results)
        return results

    out_specs = P(tuple(sorted(axes))) if axes else P()
    split = jax.shard_map(call, mesh=mesh_of_one(), in_specs=tuple(specs.values()), out_specs=out_specs)
    types = jax.eval_shape(split, *arrays.values())
    assert types[0].shape == arrays["queries"].shape
    assert found == [axes] * (2 if version == "v2" else 3)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_helpers_follow_the_axes(check_vma: bool) -> None:
    one, other = jnp.zeros(4), jnp.zeros(())
    seen: list[Any] = []

    def body(one: jax.Array, other: jax.Array) -> jax.Array:
        varied, same = vary((one, other), one)
        seen.extend(map(varying_axes, (one, other, (one, other), varied, same, jnp.zeros(3))))
        result = result_type((2,), jnp.float32, (one, other))
        seen.append(varying_axes(jax.ffi.ffi_call("traced_only", result)(one)))
        return one + other

    split = functools.partial(jax.shard_map, mesh=mesh_of_one(), out_specs=P("x"), check_vma=check_vma)
    jax.eval_shape(split(body, in_specs=(P("x"), P())), one, other)
    x = {"x"} if check_vma else set()
    assert seen == [x, set(), x, x, x, set(), x]


def test_nothing_varies_outside_of_shard_map() -> None:
    one = jnp.zeros(4)
    assert varying_axes(one) == set()
    assert vary(one, one) is one
    assert result_type((2,), jnp.float32, one).sharding is None
