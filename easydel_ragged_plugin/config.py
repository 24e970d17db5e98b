"""Configuration of one call, and where it comes from.

For each field the first source that sets it wins:

1. :func:`override_config`, a context manager for the code that it encloses
2. a hook, ``ragged_config`` (see ``hooks.py``)
3. the call: the host's ``operation_configs[name]``, or ``config=`` of the functions
4. the environment: ``EASYDEL_RAGGED_KERNEL``
5. tile sizes that ``easydel-ragged tune`` found for this card (kernel ``pallas_gpu``)
6. the defaults of :class:`RaggedPageConfig`, which leave sizes to the kernel

A call is configured while it is traced. The first source is part of the key under which JAX keeps traced and compiled
functions, so a function that is called inside of an :func:`override_config` is compiled again for it. The others are
not, but for the registered plugins (see ``hooks.py``): a function keeps what it was compiled with when an environment
variable changes, or when a hook comes to return another configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from .options import Options

__all__ = [
    "CACHE_VARIABLE",
    "KERNEL_VARIABLE",
    "RaggedPageConfig",
    "as_config",
    "cache_dir",
    "current_override",
    "from_environment",
    "override_config",
]

KERNEL_VARIABLE = "EASYDEL_RAGGED_KERNEL"
CACHE_VARIABLE = "EASYDEL_RAGGED_CACHE"

_BLOCK_FIELDS = ("num_kv_pages_per_block", "num_queries_per_block", "chunk_prefill_size", "num_warps", "num_stages")


@dataclasses.dataclass(frozen=True)
class RaggedPageConfig:
    """How to run one operation. None means: let the kernel choose.

    Attributes:
        kernel: a kernel's name, which then runs or raises, or ``"auto"`` for the first that does not refuse.
        num_kv_pages_per_block: pages that one step of the kernel reads.
        num_queries_per_block: query tokens in one tile.
        chunk_prefill_size: tokens of a prefill chunk (TPU kernel of ``ejkernel``).
        num_warps: warps of a Triton program.
        num_stages: pipeline stages of a Triton program.
        platform: a technology (``"xla"``, ``"triton"``, ``"pallas"``, ``"cuda"``, ``"cute"``), under the name that the
            host's config classes have for it; only kernels of it are chosen. ``"auto"`` for any.
        backend: passed to ``ejkernel``; ``"any"`` or the name of a platform.
        from_host: whether it was made from one of the host's config classes. Then the kernel ``ejkernel`` is called
            with such a class, even where no field is set: without one it tunes block sizes.
        kernel_config: settings that only one kernel has, an object of its ``config_type`` (``pallas_gpu``: ``Tiles``);
            only that kernel is chosen.
        logits_soft_cap: the option of this name, for calls that do not pass it: EasyDeL passes none, and a model may
            need one. A call that passes another one is a ValueError.
    """

    kernel: str = "auto"
    num_kv_pages_per_block: int | None = None
    num_queries_per_block: int | None = None
    chunk_prefill_size: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    platform: str = "auto"
    backend: str = "any"
    from_host: bool = False
    kernel_config: Any = None
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("kernel", "platform", "backend"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}: got {value!r}, wanted a name such as 'auto'.")
        for name in _BLOCK_FIELDS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"{name}: got {value!r}, wanted an int of at least 1, or None to let the kernel choose."
                )
        if self.kernel_config is not None and not _is_frozen_dataclass(self.kernel_config):
            raise ValueError(
                f"kernel_config: got {self.kernel_config!r}, wanted an object of a kernel's config_type, or None."
            )
        object.__setattr__(self, "logits_soft_cap", Options(logits_soft_cap=self.logits_soft_cap).logits_soft_cap)


def _is_frozen_dataclass(value: Any) -> bool:
    """Whether ``value`` is an object that can be part of the key of a compiled call."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__hash__ is not None


def as_config(value: Any) -> RaggedPageConfig | None:
    """A config from what callers pass: None, a kernel's name, a RaggedPageConfig, or one of ejkernel's config objects.

    ejkernel's classes always have a number of warps and of stages (4 and 1). Where these are the defaults of the class,
    they count as not set, except for the kernel ``ejkernel``.

    Raises:
        ValueError: ``value`` is none of these.
    """
    if value is None or isinstance(value, RaggedPageConfig):
        return value
    if isinstance(value, str):
        return RaggedPageConfig(kernel=value)
    names = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    # ejkernel's classes are recognized by their fields: importing ejkernel to compare types would cost seconds.
    if isinstance(value, type) or not names >= {
        "num_kv_pages_per_block",
        "num_queries_per_block",
        "platform",
        "backend",
    }:
        raise ValueError(
            f"config: got {type(value).__name__}, wanted RaggedPageConfig, a kernel's name, or ejkernel's "
            "RaggedPageAttentionv2Config / RaggedPageAttentionv3Config."
        )
    known = {name: getattr(value, name) for name in names & {*_BLOCK_FIELDS, "platform", "backend"}}
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    known |= {name: None for name in names & {"num_warps", "num_stages"} if known[name] == defaults[name]}
    known["platform"] = known["platform"] or "auto"
    known["backend"] = str(known["backend"] or "any")
    return RaggedPageConfig(**known, from_host=True)


def from_environment(environ: Mapping[str, str] = os.environ) -> RaggedPageConfig | None:
    """The config with the kernel that ``EASYDEL_RAGGED_KERNEL`` names, or None when it is unset or empty."""
    kernel = environ.get(KERNEL_VARIABLE, "").strip()
    return RaggedPageConfig(kernel=kernel) if kernel else None


_override = jax.make_user_context(default_value=None)
"""Fields and their values in order, or None: this thread's, and part of JAX's keys. Made with the module, because JAX
must not be at work in another thread meanwhile."""


@contextlib.contextmanager
def override_config(**fields: Any) -> Iterator[None]:
    """Replace fields of the config for every call inside the ``with`` block, in this thread.

    Jitted functions that are called inside are traced and compiled for these fields, once for each set of values, and
    those that were compiled outside are taken again after the block. That is so for all functions, those without
    attention included. What ``jit(f).lower(...).compile()`` has made stays as it is.

    Args:
        **fields: fields of :class:`RaggedPageConfig`.

    Raises:
        TypeError, ValueError: a field that does not exist, or a value that it can't have.

    Example:
        >>> with override_config(kernel="xla"):
        ...     pass
    """
    RaggedPageConfig(**fields)  # refuses a wrong name or value here, not at the first call
    with _override(tuple(sorted({**current_override(), **fields}.items())) or None):
        yield


def current_override() -> Mapping[str, Any]:
    """Fields set by the enclosing :func:`override_config` blocks."""
    return dict(_override.value or ())


def cache_dir() -> Path:
    """Folder of models and tuned tiles: ``EASYDEL_RAGGED_CACHE``, or else one in the user's cache directory."""
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(override).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "easydel-ragged-plugin"
