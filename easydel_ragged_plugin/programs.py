"""Saved programs: what a process needs to know before it loads one of ``jax.export`` or ``serialize_executable``.

Some kernels call code outside of the program, by a name. XLA has to know the function behind the name in the process
that runs the program. A call of this package makes it known, and so does importing the module of the functions; a
process that only loads a program does neither.
"""

from __future__ import annotations

from .select import BUILT_IN

__all__ = ["CUSTOM_CALLS", "register_available", "register_ffi_targets"]

CUSTOM_CALLS = tuple(dict.fromkeys(name for kernel in BUILT_IN.values() for name in kernel.custom_calls))
"""Names of the custom calls that programs of the built-in kernels hold, beside those that ``jax.export`` allows.

Each names the version of what it expects, so it changes with this package. ``jax.export`` takes them as
``disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]``.
"""


def register_available() -> list[str]:
    """:func:`register_ffi_targets` for the kernels that can. Returns why the others can't."""
    reasons = {kernel.name: kernel.register_ffi_targets() for kernel in BUILT_IN.values()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]


def register_ffi_targets() -> None:
    """Make the functions behind :data:`CUSTOM_CALLS` known to XLA, so that saved programs can be loaded and run.

    Nothing is traced, no device is asked and no backend is started. It may be called before or after JAX has started
    one, and more than once. Importing EasyDeL's operations does it too, and so does the first use of any function or
    operation of this package. ``import easydel_ragged_plugin`` alone does not: it imports nothing, JAX included.

    Raises:
        RuntimeError: the native library is not installed or does not fit this JAX. Programs without calls of
            ``cpu_native`` run nevertheless.
    """
    reasons = register_available()
    if reasons:
        raise RuntimeError(f"FFI targets: not all can be registered. {'. '.join(reasons)}.")
