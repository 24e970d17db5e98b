"""What a call requests beside its arrays: :class:`Options`.

Each option is one field, with its check in the field's metadata. A hint is an option that never changes a result. A
kernel declares the options that it honors (``types.Features``). Selection refuses, by name, what is set and not
declared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["KEYWORDS", "NO_OPTIONS", "SCALES", "Options", "Window", "check_magnitude", "is_wide_float", "split_scales"]

Window = int | tuple[int, int] | None

SCALES = ("k_scale", "v_scale")
"""Options that may also be arrays of the call, with a number for each kv head."""

LARGEST_MASK_VALUE = -1e9
"""With a mask value up to this one a masked key has no weight in float32, as in the kernels."""

SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, 2.0**127
"""Magnitudes of scales: normal numbers of float32, whose product with log2(e) is finite."""

ENDLESS_CAP = 2.0**60
"""A soft cap from here on is none. ``c * tanh(x / c)`` is ``x * (1 - (x / c)**2 / 3 + ...)``. For a logit up to 2**48
that is within ``2**-24 / 3`` of x: less than half of the distance to the next float32. Above 2**48 neighboring floats
are 2**24 apart and more: the largest logit has all of the weight, with the cap and without."""

ENDLESS_POSITIONS = 2**31
"""Positions are below it, so a window or a chunk of as many tokens hides nothing."""


def is_wide_float(dtype: Any) -> bool:
    """Whether ``dtype`` is a float of at least 16 bits. Shorter ones are only for storage."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize >= 2


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool | str, jax.core.Tracer)) or np.ndim(value) != 0:
        raise ValueError(f"{name}: got {value!r}, wanted one Python number, known while tracing.")
    result = _as_float(name, value)
    if not math.isfinite(result):
        raise ValueError(f"{name}: got {result}, wanted a finite number.")
    return result


def _as_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got a number that is too large for a float, wanted one of float32.") from None


def check_magnitude(name: str, value: float) -> None:
    """Raise ValueError where ``value`` is not 0, and no number that the kernels' float32 holds."""
    if value and not SMALLEST_NUMBER <= abs(value) <= LARGEST_NUMBER:
        raise ValueError(
            f"{name}: got {value}, wanted a magnitude between {SMALLEST_NUMBER:.3g} and {LARGEST_NUMBER:.3g}: kernels "
            "hold it in float32."
        )


def _scale(name: str, value: Any) -> float:
    result = _number(name, value)
    check_magnitude(name, result)
    return result


def _positive(name: str, value: Any) -> float:
    result = _number(name, value)
    if result <= 0:
        raise ValueError(f"{name}: got {result}, wanted a number above 0, or None to switch it off.")
    return result


def _positive_scale(name: str, value: Any) -> float:
    result = _positive(name, value)
    check_magnitude(name, result)
    return result


def _soft_cap(name: str, value: Any) -> float:
    result = _positive(name, value)
    if result < ENDLESS_CAP:
        check_magnitude(name, result)
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
    # Not _number: -inf is a valid mask value.
    if not (isinstance(value, int | float | np.number) and value <= LARGEST_MASK_VALUE):
        raise ValueError(
            f"{name}: got {value!r}, wanted None or a number up to {LARGEST_MASK_VALUE:g}. Masked keys have no weight "
            "in these kernels; a larger value would give them one."
        )
    return _as_float(name, value)


def _chunk(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}: got {value!r}, wanted a number of tokens, an int of at least 1, or None.")
    return int(value)


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


def _names(name: str, value: Any) -> tuple[str, ...]:
    unknown = sorted(set(value) - set(SCALES))
    if unknown:
        raise ValueError(f"{name}: got {', '.join(unknown)}, wanted some of {', '.join(SCALES)}.")
    return tuple(each for each in SCALES if each in value)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one call, as the caller gave them.

    Attributes:
        softmax_scale: factor on ``query . key``; None for ``head_dim ** -0.5``, for v2 and for v3.
        sliding_window: tokens that a query sees, its own included; or a pair (tokens left of it, tokens right of it),
            of which causality cuts the right part, and where -1 means no limit. See :attr:`window`.
        attention_chunk_size: tokens of a chunk of Llama 4's chunked attention: a query at position p sees keys from
            ``p // attention_chunk_size * attention_chunk_size`` on. See :attr:`chunk`.
        logits_soft_cap: c of ``c * tanh(logits / c)``, applied to the scaled logits. See :attr:`soft_cap`.
        k_scale, v_scale: factors that turn stored keys and values into real ones, as numbers.
        scale_arrays: which of ``k_scale`` and ``v_scale`` are arrays of the call.
        sinks: whether each query head has a sink logit; the logits are an array of the call.
        compute_dtype: dtype of the operands of the two products; None for the queries' dtype.
        vmem_limit_bytes: upper limit of the scoped VMEM of a TPU kernel, in bytes.
        update_pages: whether v3 writes the new keys and values; else it attends over the pages as they are.
        q_scale: hint: step by which queries are quantized, and multiplied again. It cancels but for rounding.
        mask_value: hint: logit of a masked key. Only values that leave it no weight are accepted, because the kernels
            give it none in any case.
        optimized: hint for EasyDeL's v2 TPU kernel.

    Raises:
        ValueError: a value that an option can't have.
    """

    softmax_scale: float | None = field(default=None, metadata={"check": _scale})
    sliding_window: Window = field(default=None, metadata={"check": _window})
    attention_chunk_size: int | None = field(default=None, metadata={"check": _chunk})
    logits_soft_cap: float | None = field(default=None, metadata={"check": _soft_cap})
    k_scale: float | None = field(default=None, metadata={"check": _positive_scale})
    v_scale: float | None = field(default=None, metadata={"check": _positive_scale})
    scale_arrays: tuple[str, ...] = field(default=(), metadata={"check": _names, "array": True})
    sinks: bool = field(default=False, metadata={"check": _flag, "array": True})
    compute_dtype: Any = field(default=None, metadata={"check": _wide_float})
    vmem_limit_bytes: int | None = field(default=None, metadata={"check": _bytes})
    update_pages: bool = field(default=True, metadata={"check": _flag})
    q_scale: float | None = field(default=None, metadata={"check": _positive_scale, "hint": True})
    mask_value: float | None = field(default=None, metadata={"check": _mask_value, "hint": True})
    optimized: bool = field(default=False, metadata={"check": _flag, "hint": True})

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            checked = each.default if value is None else each.metadata["check"](each.name, value)
            object.__setattr__(self, each.name, checked)

    @property
    def window(self) -> int | None:
        """The sliding window as a number of tokens, the query's own included; None where it hides nothing."""
        window = self.sliding_window
        if isinstance(window, tuple):
            window = None if window[0] == -1 else window[0] + 1
        return None if window is None or window >= ENDLESS_POSITIONS else window

    @property
    def chunk(self) -> int | None:
        """Tokens of a chunk; None where it hides nothing."""
        size = self.attention_chunk_size
        return None if size is None or size >= ENDLESS_POSITIONS else size

    @property
    def soft_cap(self) -> float | None:
        """The soft cap; None where it caps nothing: see :data:`ENDLESS_CAP`."""
        cap = self.logits_soft_cap
        return None if cap is None or cap >= ENDLESS_CAP else cap

    @property
    def is_local(self) -> bool:
        """Whether a query may see less than all positions up to its own."""
        return self.window is not None or self.chunk is not None

    def given(self, *, hints: bool = True) -> dict[str, Any]:
        """Names and values of the options that are set; without ``hints`` only those that can change a result."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default and (hints or not each.metadata.get("hint"))
        }

    def keywords(self) -> dict[str, Any]:
        """These options as keyword arguments of the public functions, where those that are arrays are left out."""
        return {name: value for name, value in self.given().items() if name in KEYWORDS}

    def __str__(self) -> str:
        shown = (name if value is True else f"{name}={value}" for name, value in self.given(hints=False).items())
        return " ".join(shown)


KEYWORDS = frozenset(each.name for each in dataclasses.fields(Options) if not each.metadata.get("array"))
"""Names of the options that are keyword arguments of the public functions; of the others the call has arrays."""


def split_scales(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of a call without those scales that are arrays of it, and these. What is an array has axes, or
    a value that is not known while tracing."""
    arrays = {
        name: keywords[name]
        for name in SCALES
        if hasattr(keywords.get(name), "dtype") and (isinstance(keywords[name], jax.core.Tracer) or keywords[name].ndim)
    }
    return {name: value for name, value in keywords.items() if name not in arrays}, arrays


NO_OPTIONS = Options()
