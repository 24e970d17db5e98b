"""TPUs that are described: libtpu compiles for them on any machine. For processes of their own, which do nothing else.

``jax[tpu]`` of a version of JAX names the libtpu that goes with it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""libtpu knows no single chips of all generations."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # A program that comes from a cache is not compiled, so nothing is written about it.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # What EasyDeL's kernels take without measuring.
    "EJKERNEL_AUTOTUNE_POLICY": "heuristics",
}
"""Read when JAX and libtpu are loaded: there is no metadata server, no other host, and no chip that one process at a
time may have."""


def dumping(folder: str) -> dict[str, str]:
    """The variables of a process whose libtpu writes what it compiles into ``folder``."""
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    return {**ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}


@functools.cache
def devices(kind: str) -> tuple[Any, ...]:
    """The devices of a small slice."""
    from jax.experimental import topologies

    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices)


def behave_as_on(kind: str) -> None:
    """Have JAX tell whoever asks in this process that its devices are the described ones."""
    import jax

    module, real = jax, jax.devices
    of_kind = list(devices(kind))
    replaced: dict[str, Any] = {
        "default_backend": lambda: "tpu",
        "devices": lambda backend=None: of_kind if backend in (None, "tpu") else real(backend),
    }
    for name, function in replaced.items():
        setattr(module, name, function)


def compiled(function: Any, arguments: Sequence[Any], donated: tuple[int, ...], kind: str) -> Any:
    """The program of ``function`` for one described TPU."""
    import jax
    from jax.sharding import Mesh, SingleDeviceSharding

    device = devices(kind)[0]
    there = SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=there) for each in arguments]
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        traced = jax.jit(function, donate_argnums=donated).trace(*placed)
        return traced.lower(lowering_platforms=("tpu",)).compile()
