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

_FROM_CONTRACT = ("Capabilities", "RaggedPageAttentionContract")


def __getattr__(name: str) -> Any:
    # Lazy: the cases are wanted without pytest, hypothesis and the host (by the benchmark, for one).
    if name in _FROM_CONTRACT:
        from . import contract

        return getattr(contract, name)
    if name == "KernelContract":
        from .kernel_contract import KernelContract

        return KernelContract
    if name == "oracle_operation":
        from . import oracle

        return oracle.oracle_operation
    if name in __all__:
        from . import cases

        return getattr(cases, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
