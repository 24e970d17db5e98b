"""Ragged page attention, v2 and v3, for EasyDeL and for JAX alone.

Every public name is imported when it is first used: the start-up line imports this package in each interpreter of the
environment, so the package imports nothing itself, not even ``typing`` and ``__future__``.
"""

__version__ = "0.1.0.dev0"

TYPE_CHECKING = False  # type checkers treat it as typing.TYPE_CHECKING
if TYPE_CHECKING:
    from typing import Any

    from .api import explain, prepare, ragged_page_attention_v2, ragged_page_attention_v3
    from .config import RaggedPageConfig, override_config
    from .errors import Unsupported
    from .hooks import hookimpl
    from .layout import page_shape
    from .operations import RaggedPageAttnV2, RaggedPageAttnV3
    from .programs import CUSTOM_CALLS, register_ffi_targets
    from .startup import activate, deactivate, status
    from .types import Prepared
    from .workers import FingerprintMismatch, check_fingerprints, fingerprint

__all__ = [
    "ragged_page_attention_v2",
    "ragged_page_attention_v3",
    "explain",
    "prepare",
    "Prepared",
    "RaggedPageConfig",
    "override_config",
    "Unsupported",
    "RaggedPageAttnV2",
    "RaggedPageAttnV3",
    "activate",
    "deactivate",
    "status",
    "fingerprint",
    "check_fingerprints",
    "FingerprintMismatch",
    "page_shape",
    "hookimpl",
    "CUSTOM_CALLS",
    "register_ffi_targets",
]

_HOMES = {
    "ragged_page_attention_v2": "api",
    "ragged_page_attention_v3": "api",
    "explain": "api",
    "prepare": "api",
    "Prepared": "types",
    "RaggedPageConfig": "config",
    "override_config": "config",
    "Unsupported": "errors",
    "RaggedPageAttnV2": "operations",
    "RaggedPageAttnV3": "operations",
    "activate": "startup",
    "deactivate": "startup",
    "status": "startup",
    "fingerprint": "workers",
    "check_fingerprints": "workers",
    "FingerprintMismatch": "workers",
    "page_shape": "layout",
    "hookimpl": "hooks",
    "CUSTOM_CALLS": "programs",
    "register_ffi_targets": "programs",
}


def __getattr__(name: str) -> "Any":
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    from importlib import import_module

    if home == "operations":
        # The host first: its import registers the operations of this package, and two threads that imported the two
        # modules in opposite order would wait for each other.
        import_module(f"{__name__}.host").operations_module()
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
