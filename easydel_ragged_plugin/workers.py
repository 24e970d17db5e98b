"""What must be equal on all workers that serve one model, and who differs.

Workers of one job compile one program each, and the programs must match: a worker with other kernels, another
configuration or without this package gives other numbers, or waits forever for a collective that the others do not
run. :func:`fingerprint` says what this process has, as text. :func:`check_fingerprints` compares workers and names the
odd ones out.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from . import api, hooks, host, select, startup
from .config import RaggedPageConfig, current_override, from_environment
from .errors import Unsupported
from .layout import page_shape

__all__ = [
    "DISTRIBUTIONS",
    "VARIABLES",
    "FingerprintMismatch",
    "check_fingerprints",
    "explain_probes",
    "fingerprint",
    "hook_plugins",
    "versions",
]

DISTRIBUTIONS = ("easydel-ragged-plugin", "easydel", "ejkernel", "jax", "jaxlib")
"""What computes: this package, EasyDeL and its kernels, JAX."""

VARIABLES = (
    "EASYDEL_RAGGED_PLUGIN",
    "EASYDEL_RAGGED_KERNEL",
    "EASYDEL_RAGGED_CHECK",
    "EASYDEL_RAGGED_ISA",
    "FORCE_NATIVE_RUNTIME",
)
"""Environment variables that change programs. What other variables lead to (``EASYDEL_RAGGED_CACHE``: tuned sizes,
``EASYDEL_RAGGED_NATIVE_LIBRARY``: a library) is in the kernels' own fingerprints: paths may differ between workers.
``EASYDEL_RAGGED_HUGE_PAGES`` changes no numbers, so workers may differ in it."""


class FingerprintMismatch(RuntimeError):
    """Workers of one job do not have the same package, kernels or configuration. The text says who and what."""


def fingerprint() -> dict[str, str]:
    """What decides about the numbers that this process computes: names and values, all text.

    Versions, JAX's platform, the classes that serve the operations, hook plugins, what each kernel says of itself, the
    configuration, and what selection makes of some fixed requests: kernel and configuration, that of hooks included.
    Imports EasyDeL's operations where EasyDeL is installed, and starts JAX's backend.
    """
    import jax

    found = {name: version or "not installed" for name, version in versions().items()}
    found["platform"] = jax.default_backend()
    if host.host_version() is not None:
        registry = host.registry()
        for name in host.OPERATION_NAMES:
            found[f"operation {name}"] = _path(registry.get(name))
        found["plugin"] = "active" if startup.status().active else "off"
    found["hooks"] = ", ".join(hook_plugins()) or "none"
    for name, kernel in select.kernels().items():
        found[f"kernel {name}"] = kernel.fingerprint()
    found["config"] = str(_config())
    found |= {f"selection of {name}": _outcome(each) for name, each in explain_probes().items()}
    found |= {name: os.environ.get(name, "unset") for name in VARIABLES}
    return found


def check_fingerprints(fingerprints: Mapping[Any, Mapping[str, str] | None] | None = None) -> None:
    """Compare workers, and raise when they do not all have the same.

    Args:
        fingerprints: what :func:`fingerprint` gave on each worker, by the worker's name; None for a worker that could
            not say, because the package is not installed there. Without the argument the processes of
            ``jax.distributed`` are compared: a collective, so all of them must call it.

    Raises:
        FingerprintMismatch: at least one worker differs from most of the others.
        ValueError: an empty mapping.
    """
    if fingerprints is None:
        fingerprints = _of_all_processes()
    if not fingerprints:
        raise ValueError("fingerprints: got none, wanted at least one worker's.")
    groups: dict[str, list[Hashable]] = {}
    for worker, each in fingerprints.items():
        groups.setdefault(json.dumps(each, sort_keys=True), []).append(worker)
    if len(groups) == 1 and None not in fingerprints.values():
        return
    # A worker without the package is never what the others are measured by.
    known = {text: workers for text, workers in groups.items() if text != "null"}
    most = max(known, key=lambda text: len(known[text]), default="null")
    wanted = json.loads(most) or {}
    lines = []
    for text, workers in groups.items():
        if text == most and text != "null":
            continue
        difference = _difference(json.loads(text), wanted)
        lines += [f"  {worker}: {difference}" for worker in workers]
    measured = f", measured by {_names(groups[most])}" if most != "null" else ""
    raise FingerprintMismatch(
        f"{len(lines)} of {len(fingerprints)} workers differ{measured}:\n"
        + "\n".join(lines)
        + "\nInstall the same versions and set the same variables on all workers, then start them again; "
        "'easydel-ragged doctor' shows a worker's own."
    )


def _difference(got: Mapping[str, str] | None, wanted: Mapping[str, str]) -> str:
    if got is None:
        return "has no easydel-ragged-plugin; install it there, from the same checkout or wheel as on the others"
    names = [name for name in {**wanted, **got} if got.get(name) != wanted.get(name)]
    return "; ".join(f"{name} is {got.get(name, 'missing')}, not {wanted.get(name, 'missing')}" for name in names)


def _names(workers: list[Hashable]) -> str:
    shown = ", ".join(map(str, workers[:3]))
    return shown if len(workers) <= 3 else f"{shown} and {len(workers) - 3} more"


def _of_all_processes() -> dict[Hashable, Mapping[str, str] | None]:
    """This process's fingerprint and those of the others, by ``process <index>``."""
    import jax
    from jax.experimental import multihost_utils

    own = json.dumps(fingerprint()).encode()
    if jax.process_count() == 1:
        return {"process 0": json.loads(own)}
    sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    texts = multihost_utils.process_allgather(padded)
    return {
        f"process {index}": json.loads(bytes(np.asarray(text, np.uint8)[: int(size)]))
        for index, (text, size) in enumerate(zip(texts, np.asarray(sizes).reshape(-1), strict=True))
    }


def _config() -> RaggedPageConfig:
    """The part of the configuration that does not depend on a call."""
    return dataclasses.replace(from_environment() or RaggedPageConfig(), **current_override())


def explain_probes() -> dict[str, select.Selection | Exception]:
    """What :func:`.api.explain` says about a decode step and a prompt, with v2 and v3: ``{"v2 decode": ..., ...}``.

    8 requests, 32 q heads, 8 kv heads, head_dim 128, pages of 128, bfloat16; the prompt has 512 tokens in a step. An
    exception stands for a request that nothing takes, or that names a kernel that is not there.
    """
    import jax
    import jax.numpy as jnp

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    index = [array(*shape, dtype=jnp.int32) for shape in ((8,), (8, 64), (9,))]
    v2, v3 = (array(*page_shape(version, 512, 128, 8, 128, np.dtype(jnp.bfloat16))) for version in ("v2", "v3"))
    calls: dict[str, tuple[Any, ...]] = {}
    for name, tokens in (("decode", 8), ("prefill", 512)):
        queries, new = array(tokens, 32, 128), array(tokens, 8, 128)
        calls[f"v2 {name}"] = (api.ragged_page_attention_v2, queries, v2, *index, array(1, dtype=jnp.int32))
        calls[f"v3 {name}"] = (api.ragged_page_attention_v3, queries, new, new, v3, *index, array(3, dtype=jnp.int32))
    found: dict[str, select.Selection | Exception] = {}
    for name, call in calls.items():
        try:
            found[name] = api.explain(*call)
        except (Unsupported, ValueError) as error:
            found[name] = error
    return found


def _outcome(found: select.Selection | Exception) -> str:
    if isinstance(found, Exception):
        return str(found)
    config = found.config
    given = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return " ".join([found.kernel, *given])


def versions(distributions: Sequence[str] = DISTRIBUTIONS) -> dict[str, str | None]:
    """The version of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hook_plugins() -> list[str]:
    """Name, origin and version of each hook plugin, in the order of registration: it decides whose answer counts."""
    owners = metadata.packages_distributions()
    described = []
    for name, plugin in hooks.manager().list_name_plugin():
        if plugin is None:  # a name that was blocked
            continue
        if inspect.ismodule(plugin):
            module = where = plugin.__name__
        else:
            cls = plugin if inspect.isclass(plugin) else type(plugin)
            module, where = cls.__module__, f"{cls.__module__}:{cls.__qualname__}"
        owning = sorted(set(owners.get(module.partition(".")[0], ())))
        origin = [f"{distribution} {version}" for distribution, version in versions(owning).items()]
        # pluggy names an object without a name after its address.
        shown = "" if name == str(id(plugin)) else f"{name} = "
        described.append(f"{shown}{where}" + (f" ({', '.join(origin)})" if origin else ""))
    return described


def _path(cls: type | None) -> str:
    return "nothing" if cls is None else f"{cls.__module__}.{cls.__qualname__}"
