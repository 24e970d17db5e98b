"""Which kernel runs a request, and the reasons against the others.

:data:`ORDER` has the order of each platform. With ``kernel="auto"`` the first kernel runs that does not refuse, and for
which nothing says that it runs only by name (``types.Kernel.only_by_name``). A kernel that is named runs, or
:class:`~easydel_ragged_plugin.errors.Unsupported` is raised.
"""

from __future__ import annotations

import dataclasses
import logging

from . import hooks
from .config import RaggedPageConfig, current_override, from_environment
from .errors import Unsupported
from .kernels import cpu_native, ejkernel, pallas_gpu, pallas_mosaic_gpu, pallas_tpu, turboquant, xla
from .types import AttentionRequest, Kernel

__all__ = ["ORDER", "Refusal", "Selection", "kernels", "resolve_config", "select"]

logger = logging.getLogger("easydel_ragged_plugin")

BUILT_IN: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        cpu_native.KERNEL,
        pallas_gpu.KERNEL,
        pallas_mosaic_gpu.KERNEL,
        pallas_tpu.KERNEL,
        xla.KERNEL,
        turboquant.KERNEL,
        ejkernel.KERNEL,
    )
}

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu_native", "xla", "turboquant", "ejkernel"),
    # The host's kernels come after the portable one: in their v3 padding tokens can overwrite live pages.
    "gpu": ("pallas_mosaic_gpu", "pallas_gpu", "xla", "turboquant", "ejkernel"),
    "tpu": ("pallas_tpu", "xla", "turboquant", "ejkernel"),
}
"""Kernels of this package to try on each platform, best first. Kernels of hooks come before them."""

ELSEWHERE = ("xla", "turboquant")
"""The order on a platform that is not in :data:`ORDER`."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kernel that did not run, and why.

    Attributes:
        kernel: its name.
        reason: as text.
    """

    kernel: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """The choice for one request.

    Attributes:
        kernel: name of the kernel that runs.
        config: its configuration, all sources merged.
        refusals: every other kernel, with the reason.
        request: the request of one device, with the soft cap of the configuration.
    """

    kernel: str
    config: RaggedPageConfig
    refusals: tuple[Refusal, ...]
    request: AttentionRequest

    def __str__(self) -> str:
        width = max(len(name) for name in (self.kernel, *(refusal.kernel for refusal in self.refusals)))
        lines = [self.request.describe(), f"  {self.kernel:<{width}}  chosen"]
        return "\n".join([*lines, *(f"  {refusal.kernel:<{width}}  {refusal.reason}" for refusal in self.refusals)])


def kernels() -> dict[str, Kernel]:
    """Every known kernel by name: those of hooks first, then this package's.

    Raises:
        ValueError: a hook returns an object that is not a kernel, or two kernels have one name.
    """
    known: dict[str, Kernel] = {}
    for group in hooks.manager().hook.ragged_kernels():
        for kernel in group:
            if not isinstance(kernel, Kernel):
                raise ValueError(
                    f"hook ragged_kernels: got {kernel!r}, wanted an object with name, platforms, technologies, "
                    "features, refuses and forward, of a class derived from easydel_ragged_plugin.types.Kernel."
                )
            if kernel.name in known or kernel.name in BUILT_IN:
                raise ValueError(
                    f"hook ragged_kernels: the name {kernel.name!r} is taken; give the kernel another name."
                )
            known[kernel.name] = kernel
    return known | BUILT_IN


def resolve_config(request: AttentionRequest, call: RaggedPageConfig | None = None) -> RaggedPageConfig:
    """Merge the sources of ``config.py``, field by field. A field at its default counts as not set.

    Raises:
        ValueError: a hook returned something other than a RaggedPageConfig.
    """
    hooked = hooks.manager().hook.ragged_config(request=request)
    if hooked is not None and not isinstance(hooked, RaggedPageConfig):
        raise ValueError(f"hook ragged_config: got {type(hooked).__name__}, wanted RaggedPageConfig or None.")
    merged: dict[str, object] = {}
    for source in (from_environment(), call, hooked):  # weakest first
        if source is not None:
            merged |= {
                field.name: getattr(source, field.name)
                for field in dataclasses.fields(source)
                if getattr(source, field.name) != field.default
            }
    return RaggedPageConfig(**{**merged, **current_override()})


def select(request: AttentionRequest, call: RaggedPageConfig | None = None) -> tuple[Kernel, Selection]:
    """The kernel for ``request`` and the record of the choice.

    Raises:
        ValueError: the config names a kernel that does not exist, or a soft cap that is not the call's.
        Unsupported: the kernel that was named refuses, or every kernel does.
    """
    config = resolve_config(request, call)
    request = _with_soft_cap(request, config)
    known = kernels()
    if config.kernel == "auto":
        order = [name for name in known if name not in BUILT_IN]
        order += list(ORDER.get(request.platform, ELSEWHERE))
    elif config.kernel in known:
        order = [config.kernel]
    else:
        raise ValueError(
            f"kernel {config.kernel!r} is unknown. Known: {', '.join(known)}. A kernel can be named in the call's "
            "config, in the host's operation_configs, by override_config or through EASYDEL_RAGGED_KERNEL."
        )
    reasons = {name: why_not(kernel, request, config) for name, kernel in known.items()}
    by_name = {
        name: f"only by name: {why}"
        for name, kernel in known.items()
        if reasons[name] is None and (why := kernel.only_by_name(request)) is not None
    }
    if config.kernel == "auto":
        reasons |= by_name
    chosen = next((name for name in order if reasons[name] is None), None)
    if chosen is None:
        listing = "; ".join(f"{name}: {reasons[name]}" for name in order)
        raise Unsupported(f"{listing}. Request: {request.describe()}.")
    refusals = tuple(
        Refusal(name, reason or by_name.get(name, "later in the order"))
        for name, reason in reasons.items()
        if name != chosen
    )
    selection = Selection(chosen, config, refusals, request)
    hooks.manager().hook.ragged_selected(request=request, selection=selection)
    for name in order[: order.index(chosen)]:
        # What a kernel improves on comes after it: that one runs, or is named in a warning of its own.
        if name not in by_name and known[name].improves_on is None:
            warn_once(f"{name} was passed over for {chosen}: {reasons[name]}")
    logger.debug("%s", selection)
    return known[chosen], selection


def _with_soft_cap(request: AttentionRequest, config: RaggedPageConfig) -> AttentionRequest:
    """``request`` with the configuration's soft cap. One that the call passes is never replaced."""
    passed, cap = request.options.logits_soft_cap, config.logits_soft_cap
    if cap is None or cap == passed:
        return request
    if passed is not None:
        raise ValueError(
            f"logits_soft_cap: the call passes {passed}, and the config has {cap}. Take it out of the config: it is "
            "for calls that pass none."
        )
    return dataclasses.replace(request, options=dataclasses.replace(request.options, logits_soft_cap=cap))


def why_not(kernel: Kernel, request: AttentionRequest, config: RaggedPageConfig) -> str | None:
    """Why ``kernel`` can't run ``request`` under ``config``, or None when it can."""
    if request.platform not in kernel.platforms:
        return f"runs on {', '.join(sorted(kernel.platforms))}, not on {request.platform}"
    lacking = kernel.features.lacks(request)
    if lacking is not None:
        return lacking
    if config.kernel_config is not None and not isinstance(config.kernel_config, kernel.config_type or ()):
        return f"the config holds {type(config.kernel_config).__name__}, the knobs of another kernel"
    if config.platform != "auto" and config.platform not in kernel.technologies:
        return f"is {', '.join(sorted(kernel.technologies))}; the config names platform {config.platform!r}"
    return kernel.refuses(request)


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a fallback at WARNING, each distinct one once in a process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
