"""Hooks: how another package adds kernels, chooses configurations and observes the choice.

A plugin is an object or a module with functions marked by :data:`hookimpl`, registered with
:func:`register` or through the entry-point group ``easydel_ragged_plugin.hooks``::

    from easydel_ragged_plugin import hookimpl

    @hookimpl
    def ragged_config(request):
        if request.platform == "cpu" and request.options.sliding_window:
            return RaggedPageConfig(num_kv_pages_per_block=1)

Implementations are called while a call is traced, never while it runs. Which plugins are registered is part of the key
under which JAX keeps traced and compiled functions, from JAX 0.10.2 on: functions are compiled again after
:func:`register`. With an older JAX they keep what they were compiled with, and the log says so, once. The machinery is
pluggy's.
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any

import jax
import pluggy

from .config import RaggedPageConfig
from .types import AttentionRequest, Kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ENTRY_POINT_GROUP", "HookWarning", "hookimpl", "manager", "register", "unregister"]

logger = logging.getLogger("easydel_ragged_plugin")

PROJECT = "easydel_ragged_plugin"
ENTRY_POINT_GROUP = "easydel_ragged_plugin.hooks"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin: it implements the hook that has its name. It can be used as a decorator."""


class HookWarning(UserWarning):
    """A hook plugin of another distribution could not be loaded or registered."""


class HookSpecs:
    """The hooks. An implementation takes any subset of the arguments, by these names."""

    @hookspec
    def ragged_kernels(self) -> Sequence[Kernel]:  # type: ignore[empty-body]
        """Kernels to try before the package's own, in order. See ``types.Kernel``."""

    @hookspec(firstresult=True)
    def ragged_config(self, request: AttentionRequest) -> RaggedPageConfig | None:
        """The configuration for ``request``, or None if this plugin has none."""

    @hookspec
    def ragged_selected(self, request: AttentionRequest, selection: Any) -> None:
        """Called once for each traced call, with its ``select.Selection``. Returns nothing."""


_lock = threading.RLock()
_manager: pluggy.PluginManager | None = None
_asked = False
"""Whether the hooks may have been called: a call may have been traced."""

_registered = jax.make_user_context(default_value=())
"""What :data:`_changes` holds: part of JAX's keys, in all threads."""
_changes: dict[str, int] = {}
"""Names of plugins that differ from those of the entry points: a number of its own for each that was registered, 0 for
one that was removed."""
_of_entry_points: set[str] = set()
_numbers = itertools.count(1)


def manager() -> pluggy.PluginManager:
    """The plugin manager. The first call loads the entry-point group."""
    global _asked
    _asked = True
    return _plugins()


def _plugins() -> pluggy.PluginManager:
    global _manager
    with _lock:
        if _manager is None:
            _manager = pluggy.PluginManager(PROJECT)
            _manager.add_hookspecs(HookSpecs)
            _load_entry_points(_manager)
        return _manager


def register(plugin: Any, name: str | None = None) -> str:
    """Register a plugin and return its name.

    Args:
        plugin: a module, or an object, with functions that are marked with :data:`hookimpl`.
        name: its name; None for one that pluggy makes.

    Raises:
        ValueError: it implements a hook that does not exist, takes an argument that the hook does not have, or
            is registered already. The text names plugin, hook and argument. Nothing is registered then.
    """
    with _lock:
        name = _register(_plugins(), plugin, name)
        _changes[name] = next(_numbers)
        _tell_jax(f"hook plugin {name!r} was registered")
        return name


def unregister(plugin: Any) -> None:
    """Remove a plugin.

    Args:
        plugin: the object, or its name.

    Raises:
        ValueError: no such plugin is registered.
    """
    with _lock:
        plugins = _plugins()
        known = plugins.get_plugin(plugin) if isinstance(plugin, str) else plugin
        name = None if known is None else plugins.get_name(known)
        if name is None:
            names = ", ".join(name for name, _ in plugins.list_name_plugin()) or "none"
            raise ValueError(f"hook plugin {plugin!r} is not registered. Registered: {names}.")
        plugins.unregister(known)
        if name in _of_entry_points:
            _changes[name] = 0
        else:
            del _changes[name]
        _tell_jax(f"hook plugin {name!r} was removed")


_told = False


def _tell_jax(change: str) -> None:
    """Have functions compiled again that were compiled before ``change``; log where this JAX can't."""
    global _told
    set_global = getattr(_registered, "set_global", None)
    if set_global is not None:
        set_global(tuple(sorted(_changes.items())))
    elif _asked and not _told:
        _told = True
        logger.warning(
            "%s after kernels had been chosen. Functions that are compiled already keep their kernel and configuration "
            "with JAX %s: register plugins before the first call, or call jax.clear_caches().",
            change,
            jax.__version__,
        )


def _register(plugins: pluggy.PluginManager, plugin: Any, name: str | None) -> str:
    name = name or plugins.get_canonical_name(plugin)
    known = sorted(hook for hook in vars(HookSpecs) if hook.startswith("ragged_"))
    marked = [attribute for attribute in dir(plugin) if plugins.parse_hookimpl_opts(plugin, attribute) is not None]
    unknown = [hook for hook in marked if hook not in known]
    if unknown:
        raise ValueError(f"hook plugin {name!r}: no hook is called {', '.join(unknown)}. Hooks: {', '.join(known)}.")
    if not marked:
        raise ValueError(
            f"hook plugin {name!r}: nothing in it is marked with @hookimpl. Mark functions named {', '.join(known)}."
        )
    try:
        plugins.register(plugin, name=name)
    except pluggy.PluginValidationError as error:
        if plugins.is_registered(plugin):  # pluggy keeps the hooks that it checked before the bad one
            plugins.unregister(plugin)
        raise ValueError(f"hook plugin {name!r}: {error}") from error
    return name


def _load_entry_points(plugins: pluggy.PluginManager) -> None:
    from importlib import metadata

    for entry in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)):
        owner = entry.dist.name if entry.dist is not None else "unknown distribution"
        # Code of other packages runs here. Its errors must not stop attention, and must be reported.
        try:
            _of_entry_points.add(_register(plugins, entry.load(), entry.name))
        except Exception as error:
            warnings.warn(
                f"{owner}: entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} was left out: "
                f"{type(error).__name__}: {error}",
                HookWarning,
                stacklevel=2,
            )
