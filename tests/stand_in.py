"""A stand-in host of thirty lines, and distributions that bring operations to it: files, no installs."""

from __future__ import annotations

import textwrap
from pathlib import Path

NAMES = ("ragged_page_attention_v2", "ragged_page_attention_v3")
"""What this package's own entry points are called."""

HOST = """
class OperationImpl:
    pass

class OperationRegistry:
    _registry = {}

    @classmethod
    def register(cls, impl):
        cls._registry[impl.get_impl_name()] = impl
        return impl

    @classmethod
    def get(cls, name):
        return cls._registry[name]

@OperationRegistry.register
class BuiltIn(OperationImpl):
    @classmethod
    def get_impl_name(cls):
        return "op"

@OperationRegistry.register
class Other(OperationImpl):
    @classmethod
    def get_impl_name(cls):
        return "ragged_page_attention_v3"
"""

OPERATION = """
from easydel.operations import OperationImpl

class Op(OperationImpl):
    @classmethod
    def get_impl_name(cls):
        return "op"
"""

HOLDER = "OperationRegistry.get('op').__module__"
"""Code for the module of the class that has the name."""


def stand_in(root: Path, package: str = "operations", source: str = HOST) -> str:
    """A host that has an operations package and nothing else."""
    folder = root / "host" / "easydel" / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    (root / "host" / "easydel" / "__init__.py").touch()
    if "/" in package:
        (folder.parent / "__init__.py").touch()
    return str(root / "host")


def third_party(root: Path, distribution: str, entries: str, **modules: str) -> str:
    """An installed distribution: metadata and modules in a folder of its own."""
    folder = root / distribution
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[easydel.operations]\n{textwrap.dedent(entries)}\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return str(folder)


def warnings_in(output: str, distribution: str) -> list[str]:
    """Each distinct warning about a distribution, without its location."""
    marker = f"EntryPointWarning: {distribution}: "
    return [line.partition("EntryPointWarning: ")[2] for line in output.splitlines() if marker in line]
