"""Hooks: how another package adds kernels, chooses configurations and observes the choice.

A plugin is an object or a module with functions marked by :data:`hookimpl`, registered with
:func:`register` or through the entry-point group ``easydel_ragged_plugin.hooks``::

    from easydel_ragged_plugin import hookimpl

    @hookimpl
    def ragged_config(request):
        if request.platform == "cpu" and request.options.sliding_window:
            return RaggedPageConfig(num_kv_pages_per_block=1)

Implementations are called while a call is traced, never while it runs. The machinery is pluggy's.
"""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING, Any

import pluggy

from .config import RaggedPageConfig
from .types import AttentionRequest, Kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ENTRY_POINT_GROUP", "HookWarning", "hookimpl", "manager", "register", "unregister"]

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


def manager() -> pluggy.PluginManager:
    """The plugin manager. The first call loads the entry-point group."""
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
        return _register(manager(), plugin, name)


def unregister(plugin: Any) -> None:
    """Remove a plugin.

    Args:
        plugin: the object, or its name.

    Raises:
        ValueError: no such plugin is registered.
    """
    plugins = manager()
    known = plugins.get_plugin(plugin) if isinstance(plugin, str) else plugin
    if known is None or not plugins.is_registered(known):
        names = ", ".join(name for name, _ in plugins.list_name_plugin()) or "none"
        raise ValueError(f"hook plugin {plugin!r} is not registered. Registered: {names}.")
    plugins.unregister(known)


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
            _register(plugins, entry.load(), entry.name)
        except Exception as error:
            warnings.warn(
                f"{owner}: entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} was left out: "
                f"{type(error).__name__}: {error}",
                HookWarning,
                stacklevel=2,
            )
