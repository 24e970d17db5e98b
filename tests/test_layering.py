"""Imports point one way (docs: the call path). Checked on the source, so that lazy imports count, too."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import easydel_ragged_plugin

PACKAGE = "easydel_ragged_plugin"
ROOT = Path(easydel_ragged_plugin.__file__).parent

# What each part imports from this package; a folder is one part. Anything that is not listed fails, and so does what
# is listed and not used.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "host": set(),
    "layout": set(),
    "options": set(),
    "formats": {"layout", "options"},
    "turboquant": {"errors", "formats", "layout", "options"},
    "types": {"config", "formats", "layout", "options"},  # config: for annotations alone, see TYPE_ONLY
    "config": {"options"},
    "entries": set(),
    "hooks": {"config", "types"},
    "rows": {"types"},
    "varying": set(),
    "writes": {"rows", "types", "varying"},
    "blockwise": {"rows", "types", "varying"},
    "base2": {"types"},
    "kernels": {
        "base2",
        "blockwise",
        "config",
        "entries",
        "errors",
        "layout",
        "rows",
        "turboquant",
        "types",
        "varying",
        "writes",
    },
    "select": {"config", "errors", "hooks", "kernels", "types"},
    "sharding": {"layout", "select", "types"},
    "programs": {"select"},
    "request": {"formats", "layout", "options", "turboquant", "types"},
    "api": {
        "config",
        "errors",
        "layout",
        "options",
        "programs",
        "request",
        "rows",
        "select",
        "sharding",
        "turboquant",
        "types",
        "varying",
    },
    "reference": {"options"},
    "import_hook": set(),
    "registration": set(),
    "startup_status": {"host", "registration"},
    "startup": {"host", "import_hook", "registration", "startup_status"},
    "views": {"errors", "host", "turboquant"},
    "model_config": {"errors"},
    "operations": {"api", "config", "errors", "host", "model_config", "options", "views"},
    "testing": {"config", "errors", "host", "layout", "options", "reference", "request", "select", "types", "varying"},
    "workers": {"api", "config", "errors", "hooks", "host", "layout", "select", "startup"},
    "encoding": set(),
    "interrupt": set(),
    "terminal": {"config", "encoding", "interrupt"},
    "system": set(),
    "demo": {"config", "hooks", "host", "interrupt", "select", "startup", "terminal"},
    "bench": {
        "api",
        "config",
        "demo",
        "errors",
        "formats",
        "host",
        "interrupt",
        "layout",
        "options",
        "reference",
        "select",
        "system",
        "terminal",
        "testing",
        "types",
        "workers",
    },
    "cache_folder": {"config", "demo", "terminal"},
    "cli": {
        "__init__",  # its version
        "api",
        "bench",
        "cache_folder",
        "config",
        "demo",
        "encoding",
        "host",
        "interrupt",
        "options",
        "select",
        "startup",
        "system",
        "terminal",
        "testing",
        "workers",
    },
    "__main__": {"cli"},
    "__init__": {"api", "config", "errors", "hooks", "layout", "operations", "programs", "startup", "types", "workers"},
}
# Imports that exist for type checkers only: they may point the other way.
TYPE_ONLY = {("types", "config")}

# One kernel that is made of another one's parts: (who, whose).
MADE_OF = {("pallas_mosaic_gpu", "pallas_gpu")}

HOST_PACKAGES = {"easydel", "eformer", "spectrax"}
MAY_IMPORT_HOST = {"host.py", "operations.py"}
MAY_IMPORT_EJKERNEL = {"kernels/ejkernel.py", "config.py", "host.py", "operations.py"}
# These drive the host, its engine included, when they are called; importing them must not import it.
MAY_DRIVE_HOST = {"demo", "testing"}


class Import:
    """One import statement, or one call of ``import_module`` with a literal name."""

    def __init__(self, module: str, names: list[str], line: int, type_only: bool, lazy: bool) -> None:
        self.module, self.names, self.line, self.type_only, self.lazy = module, names, line, type_only, lazy


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import in ``source``; ``module`` is its dotted name below the package, packages with ``.__init__``."""
    parents = module.split(".")[:-1]

    def walk(node: ast.AST, type_only: bool, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner_type_only, inner_lazy = type_only, lazy
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), True, lazy)
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), type_only, lazy)
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner_lazy = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, [], child.lineno, type_only, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    kept = parents[: len(parents) - (child.level - 1)]
                    base = ".".join([PACKAGE, *kept, *([base] if base else [])])
                yield Import(base, [alias.name for alias in child.names], child.lineno, type_only, lazy)
            elif (
                isinstance(child, ast.Call)
                and ast.unparse(child.func).rpartition(".")[2] in ("import_module", "__import__")
                and child.args
                and isinstance(child.args[0], ast.Constant)
                and isinstance(child.args[0].value, str)
            ):
                yield Import(child.args[0].value, [], child.lineno, type_only, lazy)
            yield from walk(child, inner_type_only, inner_lazy)

    yield from walk(ast.parse(source), False, False)


def part_of(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def targets(found: Import) -> list[str]:
    """Dotted names below the package that an import reaches; empty for other packages."""
    if found.module != PACKAGE and not found.module.startswith(f"{PACKAGE}."):
        return []
    inner = found.module[len(PACKAGE) + 1 :]
    if not inner:  # from . import config, host
        return found.names or ["__init__"]
    return [f"{inner}.{name}" for name in found.names] if inner == "kernels" else [inner]


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of the file ``path`` (relative to the package)."""
    part = part_of(path)
    module = path.removesuffix(".py").replace("/", ".")
    wrong = []
    for found in imports(source, module):
        where = f"{path}:{found.line}"
        top = found.module.partition(".")[0]
        drives = part in MAY_DRIVE_HOST and found.lazy
        if top in HOST_PACKAGES and path not in MAY_IMPORT_HOST and not found.type_only and not drives:
            wrong.append(f"{where} imports {found.module}: the host is reached through host.py alone")
        if top == "ejkernel" and path not in MAY_IMPORT_EJKERNEL and not drives:
            wrong.append(f"{where} imports {found.module}: only kernels/ejkernel.py calls ejkernel")
        for target in targets(found):
            other = target.partition(".")[0]
            if other == part:
                kernel, whose = (path.removesuffix(".py").split("/")[1:2], target.split(".")[1:2])
                inside = kernel == whose or (*kernel, *whose) in MADE_OF  # a kernel of several files
                if part == "kernels" and path != "kernels/__init__.py" and target.count(".") and not inside:
                    wrong.append(f"{where} imports {target}: kernels never import one another")
                continue
            if found.type_only and (part, other) in TYPE_ONLY:
                continue
            if other not in ALLOWED.get(part, set()) or ((part, other) in TYPE_ONLY and not found.type_only):
                wrong.append(f"{where} imports {target}: {part} may import {sorted(ALLOWED.get(part, set()))}")
    return wrong


def used() -> dict[str, set[str]]:
    """What each part imports today."""
    found: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for path in FILES:
        module = path.removesuffix(".py").replace("/", ".")
        for each in imports((ROOT / path).read_text(encoding="utf-8"), module):
            others = {target.partition(".")[0] for target in targets(each)}
            found[part_of(path)] |= others - {part_of(path)}
    return found


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def test_only_host_py_touches_the_hosts_registry() -> None:
    found = {path for path in FILES if re.search(r"[.\"']_registry\b", (ROOT / path).read_text(encoding="utf-8"))}
    assert found == {"host.py"}, "use host.registry()"


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path: str) -> None:
    assert part_of(path) in ALLOWED, f"{path}: say in ALLOWED what this new part may import"
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_table_allows_exactly_what_is_used() -> None:
    assert used() == ALLOWED


def test_nothing_may_import_what_imports_it() -> None:
    graph = {part: {other for other in parts if (part, other) not in TYPE_ONLY} for part, parts in ALLOWED.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("errors.py", "from .types import Kernel"),
        ("config.py", "from . import api"),
        ("kernels/cpu_native.py", "from ..select import choose"),
        ("kernels/cpu_native.py", "from .ejkernel import forward"),
        ("kernels/cpu_native.py", "from . import ejkernel"),
        ("kernels/pallas_gpu/work.py", "from ..xla import KERNEL"),
        ("kernels/pallas_gpu/work.py", "from easydel_ragged_plugin.kernels.xla.turboquant import forward"),
        ("kernels/cpu_native.py", "from .pallas_gpu.work import Column"),
        ("kernels/pallas_gpu/work.py", "from ..pallas_mosaic_gpu.sizes import Sizes"),
        ("kernels/ejkernel.py", "def late():\n    from easydel_ragged_plugin.kernels.cpu_native import forward"),
        ("kernels/cpu_native.py", "import ejkernel"),
        ("kernels/cpu_native.py", "import easydel"),
        ("api.py", "from .operations import RaggedPageAttnV3"),
        ("api.py", "import importlib\nimportlib.import_module('easydel.operations')"),
        ("select.py", "try:\n    from .api import explain\nexcept ImportError:\n    pass"),
        ("types.py", "from .config import RaggedPageConfig"),
        ("startup.py", "from .api import explain"),
        ("registration.py", "def late():\n    from . import startup"),
        ("reference.py", "from .kernels import xla"),
        ("testing/__init__.py", "import easydel.caching"),
        ("demo/run.py", "from ..bench import figure"),
        ("bench/run.py", "from ..cli import app"),
        ("bench/run.py", "def late():\n    import easydel"),
        ("select.py", "def late():\n    import easydel"),
        ("new_part.py", "from . import errors"),
    ],
)
def test_the_checker_sees_violations(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("types.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .config import RaggedPageConfig"),
        ("kernels/ejkernel.py", "import ejkernel\nfrom ..types import Kernel"),
        ("kernels/__init__.py", "from . import xla, ejkernel"),
        ("kernels/pallas_gpu/__init__.py", "from .work import Column\nfrom . import tiles"),
        ("kernels/pallas_mosaic_gpu/__init__.py", "from .. import pallas_gpu\nfrom ..pallas_gpu.work import Column"),
        (
            "kernels/pallas_gpu/work.py",
            "from .tiles import Tiles\nfrom easydel_ragged_plugin.kernels.pallas_gpu import tiles",
        ),
        ("operations.py", "from .host import load\nimport easydel"),
        ("demo/run.py", "from ..host import load\nfrom . import model\ndef late():\n    import easydel"),
    ],
)
def test_the_checker_passes_what_is_right(path: str, source: str) -> None:
    assert violations(path, source) == []


OF_ALL_KERNELS = [
    ROOT / "cache_folder.py",
    ROOT / "workers.py",
    *(path for part in ("cli", "bench", "demo") for path in sorted((ROOT / part).rglob("*.py"))),
    *sorted((Path(__file__).resolve().parents[1] / "benchmarks").rglob("*.py")),
]


def names_of_kernels(source: str) -> list[str]:
    """Every text of a Python file that names a built-in kernel.

    Some kernels share their names with a package, or with a technology: ``DISTRIBUTIONS`` may list the one, and the
    arguments ``platform=`` and ``implementation=`` of other packages' functions may name the other.
    """
    from easydel_ragged_plugin.select import BUILT_IN

    tree = ast.parse(source)
    excused: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_technology = isinstance(node, ast.keyword) and node.arg in ("platform", "implementation")
        if is_technology or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DISTRIBUTIONS"):
            excused.update(ast.walk(node))
    word = re.compile(rf"\b({'|'.join(BUILT_IN)})\b")
    return [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in excused
        if word.search(node.value)
    ]


@pytest.mark.parametrize("path", OF_ALL_KERNELS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_kernel_is_named_where_all_are_treated_alike(path: Path) -> None:
    """Commands and measurements go by what kernels say of themselves, so that those of hooks are no exception."""
    assert names_of_kernels(path.read_text(encoding="utf-8")) == []


def test_names_of_kernels_are_seen() -> None:
    assert names_of_kernels('HOST = "ejkernel"') == ["line 1: 'ejkernel'"]
    assert names_of_kernels('print(f"the kernel pallas_gpu: {x}")') == ["line 1: 'the kernel pallas_gpu: '"]
    assert names_of_kernels('DISTRIBUTIONS = ("jax", "ejkernel")\ncall(platform="xla" if dry else "triton")') == []


def test_importing_the_package_is_cheap() -> None:
    """It happens in every interpreter of the environment."""
    code = (
        f"import sys; sys.path.append({str(ROOT.parent)!r}); before = set(sys.modules); "
        f"import {PACKAGE}; from {PACKAGE} import startup; startup.arm(); "
        "print(*sorted(set(sys.modules) - before))"
    )
    seen = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    # Where the start-up line has run, there is nothing left to import.
    assert set(seen.split()) <= {PACKAGE, f"{PACKAGE}.startup"}


def test_every_public_name_resolves_or_says_why() -> None:
    for name in easydel_ragged_plugin.__all__:
        assert name in dir(easydel_ragged_plugin)
        if name.startswith("RaggedPageAttn"):  # need the host
            continue
        assert getattr(easydel_ragged_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'; its public names are ragged_page_attention_v2,"):
        _ = easydel_ragged_plugin.nothing
