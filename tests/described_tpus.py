"""TPUs that are described: libtpu compiles for them on any machine.

``jax[tpu]`` of a version of JAX names the libtpu that goes with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from easydel_ragged_plugin import page_shape, ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.layout import Version

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""libtpu knows no single chips of all generations."""

DONATED: tuple[int, ...] = (3,)
"""Place of the pages among the arguments of v3."""

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None

if HAS_LIBTPU:
    # Read by libtpu when it is loaded: there is no metadata server to ask, no other host, and no chip that one process
    # at a time may have.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        os.environ.setdefault(name, value)


@functools.cache
def devices(kind: str) -> tuple[Any, ...]:
    """The devices of a small slice."""
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices)


def call(
    version: Version,
    heads: tuple[int, int],
    head_dim: int,
    *,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    rows: int = 32,
    context: int = 8192,
    page_size: int = 128,
    tokens: int | None = None,
    sinks: bool = False,
    **options: Any,
) -> tuple[Any, list[Any], tuple[int, ...]]:
    """A public function bound to its options, the shapes of its arguments, and the place of the pages that it writes.

    The cache holds the contexts of all rows; ``tokens`` is one for each row unless it is given.
    """
    array, cache = jax.ShapeDtypeStruct, cache or dtype
    ints = functools.partial(array, dtype=jnp.int32)
    width = context // page_size
    pages = array(page_shape(version, rows * width, page_size, heads[1], head_dim, np.dtype(cache)), cache)
    index = [ints((rows,)), ints((rows, width)), ints((rows + 1,))]
    last = [array(heads[:1], jnp.float32)] if sinks else []
    queries, new = (array((tokens or rows, number, head_dim), dtype) for number in heads)
    function: Any = ragged_page_attention_v2 if version == "v2" else ragged_page_attention_v3
    bound = functools.partial(function, platform="tpu", **options)
    if version == "v2":
        return bound, [queries, pages, *index, ints((1,)), *last], ()
    return bound, [queries, new, new, pages, *index, ints((3,)), *last], DONATED


@contextlib.contextmanager
def behaves_as(kind: str) -> Iterator[None]:
    """JAX names the described devices as those of this process: kernels look up the generation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        patch.setattr(jax, "devices", lambda *_: list(devices(kind)))
        yield


def compiled(function: Any, arguments: list[Any], donated: tuple[int, ...], kind: str) -> Any:
    """The program for one described TPU."""
    device = devices(kind)[0]
    there = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=there) for each in arguments]
    return _compiled(function, arguments, donated, Mesh(np.array([device]), ("x",)))


def compiled_on_slice(
    function: Any, arguments: list[Any], donated: tuple[int, ...], kind: str, split: str = "heads"
) -> Any:
    """The program of v3 for four described TPUs, among which heads or pages are split."""
    mesh = Mesh(np.array(devices(kind)[:4]), ("axis",))
    heads, pages = P(None, "axis", None), P(None, None, "axis", None, None)
    if split == "pages":
        heads, pages = P(), P("axis")
    specs = (heads, heads, heads, pages, P(), P(), P(), P())
    arguments = [
        jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(mesh, spec))
        for each, spec in zip(arguments, specs, strict=True)
    ]
    return _compiled(functools.partial(function, mesh=mesh, in_specs=specs), arguments, donated, mesh)


def _compiled(function: Any, arguments: list[Any], donated: tuple[int, ...], mesh: Mesh) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donated).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile()
