"""What a call requests beside its arrays: :class:`Options`.

An option is one field here, with its check in the metadata. One that never changes a result is a hint. A kernel
declares the options that it honors (``types.Features``), and selection refuses, by name, what is set and not declared.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["NO_OPTIONS", "Options", "Window", "is_wide_float"]

Window = int | tuple[int, int] | None

LARGEST_MASK_VALUE = -1e9
"""A mask value up to this one leaves a masked key no weight in float32, which is what the kernels compute."""


def is_wide_float(dtype: Any) -> bool:
    """Whether ``dtype`` is a float of at least 16 bits: the shorter ones store keys and values, and compute nothing."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize >= 2


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool | str, jax.core.Tracer)) or np.ndim(value) != 0:
        raise ValueError(f"{name}: got {value!r}, wanted one Python number, known while tracing.")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{name}: got {result}, wanted a finite number.")
    return result


def _positive(name: str, value: Any) -> float:
    result = _number(name, value)
    if result <= 0:
        raise ValueError(f"{name}: got {result}, wanted a number above 0, or None to switch it off.")
    return result


def _window(name: str, value: Any) -> int | tuple[int, int]:
    integral = (int, np.integer)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, integral) for part in value):
        left, right = (int(part) for part in value)
        if left < -1 or right < -1:
            raise ValueError(f"{name}: got {value!r}, wanted a pair of token counts, or -1 for no limit.")
        return left, right
    if isinstance(value, bool) or not isinstance(value, integral) or value < 1:
        raise ValueError(
            f"{name}: got {value!r}, wanted an int of at least 1 (the query's own token counts), a pair "
            "(left, right), or None for no window."
        )
    return int(value)


def _mask_value(name: str, value: Any) -> float:
    # -inf is a fine mask value, so _number does not fit.
    if not (isinstance(value, int | float | np.number) and value <= LARGEST_MASK_VALUE):
        raise ValueError(
            f"{name}: got {value!r}, wanted None or a number up to {LARGEST_MASK_VALUE:g}: masked keys have no "
            "weight in these kernels, and a larger value asks for one."
        )
    return float(value)


def _wide_float(name: str, value: Any) -> np.dtype:
    try:
        dtype = np.dtype(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, wanted a float dtype such as jnp.float32, or None.") from None
    if not is_wide_float(dtype):
        raise ValueError(f"{name}: got {dtype.name}, wanted float32, bfloat16, float16 or float64, or None.")
    return dtype


def _bytes(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, wanted a number of bytes of at least 1, or None.")
    return value


def _flag(name: str, value: Any) -> bool:
    return bool(value)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one call, as the caller gave them.

    Attributes:
        softmax_scale: factor on ``query . key``; None for ``head_dim ** -0.5``.
        sliding_window: tokens that a query sees, its own included; or a pair (tokens left of it, tokens right of it),
            of which causality cuts the right part, and where -1 means no limit. See :attr:`window`.
        logits_soft_cap: c of ``c * tanh(logits / c)``, applied to the scaled logits.
        q_scale, k_scale, v_scale: factors that turn stored queries, keys and values into real ones.
        sinks: whether each query head has a sink logit; the logits are an array of the call.
        compute_dtype: dtype in which the operands of the two products are held; None for the queries'.
        vmem_limit_bytes: ceiling on the scoped VMEM of a TPU kernel, in bytes.
        mask_value: logit of a masked key, of which only values are accepted that say what the kernels do in any case.
        optimized: hint for EasyDeL's v2 TPU kernel.

    Raises:
        ValueError: a value that an option can't have.
    """

    softmax_scale: float | None = field(default=None, metadata={"check": _number})
    sliding_window: Window = field(default=None, metadata={"check": _window})
    logits_soft_cap: float | None = field(default=None, metadata={"check": _positive})
    q_scale: float | None = field(default=None, metadata={"check": _positive})
    k_scale: float | None = field(default=None, metadata={"check": _positive})
    v_scale: float | None = field(default=None, metadata={"check": _positive})
    sinks: bool = field(default=False, metadata={"check": _flag})
    compute_dtype: Any = field(default=None, metadata={"check": _wide_float})
    vmem_limit_bytes: int | None = field(default=None, metadata={"check": _bytes})
    mask_value: float | None = field(default=None, metadata={"check": _mask_value, "hint": True})
    optimized: bool = field(default=False, metadata={"check": _flag, "hint": True})

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            checked = each.default if value is None else each.metadata["check"](each.name, value)
            object.__setattr__(self, each.name, checked)

    @property
    def window(self) -> int | None:
        """The sliding window as a number of tokens, the query's own included; None for no window."""
        if not isinstance(self.sliding_window, tuple):
            return self.sliding_window
        left, _ = self.sliding_window
        return None if left == -1 else left + 1

    def given(self, *, hints: bool = True) -> dict[str, Any]:
        """Names and values of the options that are set; without ``hints`` only those that can change a result."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default and (hints or not each.metadata.get("hint"))
        }

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the public functions that give these options."""
        return {name: value for name, value in self.given().items() if name != "sinks"}

    def __str__(self) -> str:
        shown = (name if value is True else f"{name}={value}" for name, value in self.given(hints=False).items())
        return " ".join(shown)


NO_OPTIONS = Options()
