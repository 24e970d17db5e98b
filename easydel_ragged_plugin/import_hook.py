"""Wraps the loader of a module, so that a function is called when the module has been executed.

It is imported inside of a finder, so it imports built-in modules alone: ``startup.py`` has the reason.
"""

import _thread
import sys

TYPE_CHECKING = False  # what type checkers take for typing.TYPE_CHECKING
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["find_and_wrap"]

_searches: "set[tuple[str, int]]" = set()  # what is searched, by which thread


def find_and_wrap(
    own_finder: object,
    fullname: str,
    path: "Any",
    target: "ModuleType | None",
    executed: "Callable[[ModuleType], None]",
) -> "ModuleSpec | None":
    """The spec that the finders on ``sys.meta_path`` give for a module, with its loader wrapped.

    Args:
        own_finder: the caller, which is left out.
        fullname: as the other two, what ``find_spec`` of a finder gets.
        executed: called with the module when the module has been executed.
    """
    # Another finder may call each finder on sys.meta_path in turn, the caller included.
    search = (fullname, _thread.get_ident())
    if search in _searches:
        return None
    _searches.add(search)
    try:
        spec = _find(own_finder, fullname, path, target)
    finally:
        _searches.discard(search)
    if spec is not None and hasattr(spec.loader, "exec_module"):
        spec.loader = _Loader(spec.loader, executed)  # type: ignore[assignment]
    return spec


def _find(own_finder: object, fullname: str, path: "Any", target: "ModuleType | None") -> "ModuleSpec | None":
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if finder is own_finder or find_spec is None:
            continue
        spec: ModuleSpec | None = find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Loader:
    """Every attribute but ``exec_module`` is the wrapped loader's."""

    def __init__(self, loader: "Any", executed: "Callable[[ModuleType], None]") -> None:
        self._loader = loader
        self._executed = executed

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # on a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        # The module must have its real loader: importlib.resources, inspect, pickle and reload use it.
        loader = self._loader
        for holder, attribute in ((module, "__loader__"), (module.__spec__, "loader")):
            if getattr(holder, attribute, None) is self:
                setattr(holder, attribute, loader)
        loader.exec_module(module)
        self._executed(module)
