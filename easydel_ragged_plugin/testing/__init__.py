"""Contract kits for anyone who writes a kernel, or an operation of EasyDeL.

:class:`KernelContract` tests a kernel and needs no EasyDeL. :class:`RaggedPageAttentionContract` tests an operation in
EasyDeL. The cases and the oracle also serve alone: they need NumPy only.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = [
    "CASES",
    "Batch",
    "Capabilities",
    "Case",
    "KernelContract",
    "RaggedPageAttentionContract",
    "Row",
    "build_batch",
    "case_named",
    "oracle_operation",
]

# The contract's assertions are to explain themselves, as those in test files do. Only pytest can arrange that, and only
# before the modules are imported.
if "pytest" in sys.modules:
    _MODULES = ("compare", "contract_base", "contract_calls", "contract_laws", "kernel_contract")
    sys.modules["pytest"].register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES))

_KITS = {"KernelContract": "kernel_contract", "RaggedPageAttentionContract": "contract"}
_HOMES = {**_KITS, "Capabilities": "capabilities", "oracle_operation": "oracle"}


def _require_pytest(name: str) -> None:
    """Raise ModuleNotFoundError, with what to install, where the kits can't run."""
    import importlib.util

    missing = [each for each in ("pytest", "hypothesis") if importlib.util.find_spec(each) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{__name__}.{name} is a pytest class with hypothesis' tests, and this environment lacks "
            f"{' and '.join(missing)}. Run: pip install {' '.join(missing)} (the extra 'testing' has both)",
            name=missing[0],
        )


def __getattr__(name: str) -> Any:
    # Lazy: the cases are wanted without pytest, hypothesis and the host (by the benchmark, for one).
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _KITS:
        _require_pytest(name)
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'cases')}"), name)
