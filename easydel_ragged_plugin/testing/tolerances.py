"""Bounds on the difference between a right output and the float64 oracle's, with reasons. The only table of its kind.

Bounds are ``atol + rtol * |expected|``. The oracle reads the very numbers that the operation reads (inputs
and cache already rounded to their dtypes), so the bounds cover only arithmetic and the rounding of the result.
"""

from __future__ import annotations

import dataclasses

from .batches import Case

__all__ = ["Tolerance", "tolerance_for"]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds, and the reason for them."""

    rtol: float
    atol: float
    reason: str


# Keyed by the dtype in which the products' operands are held: that of the queries when the host leaves
# compute_dtype open. A float8 or narrower cache is exact in it, so the cache's dtype needs no entry.
_BY_COMPUTE_DTYPE = {
    "float32": Tolerance(
        2e-5, 2e-5, "float32 sums over up to 256 lanes and 800 keys; a bfloat16 operand anywhere would cost 1e-3"
    ),
    "bfloat16": Tolerance(
        2**-8,
        2**-7,
        "the result is rounded once to 8 bits (2**-9 of it), and the probabilities may be before the second product "
        "(2**-9 of values of size 1 to 2); sums are float32",
    ),
    "float16": Tolerance(2**-11, 2**-9, "as bfloat16, with 11 bits"),
}

_WIDE_CACHE = Tolerance(
    2**-6,
    2**-5,
    "float32 keys are rounded to the bfloat16 of the queries: 2**-9 of logits of size 8 moves a weight by 2 %",
)


_LONG = Tolerance(1e-4, 2e-5, "float32 sums over 33000 keys: 33000 ** 0.5 roundings of 6e-8 and float32 logits")


def tolerance_for(case: Case) -> Tolerance:
    """The bound for ``case``."""
    if case.np_cache_dtype.itemsize > case.np_dtype.itemsize:
        return _WIDE_CACHE
    if case.dtype == "float32" and max((row.context for row in case.rows), default=0) > 1000:
        return _LONG
    found = _BY_COMPUTE_DTYPE[case.dtype]
    if abs(case.value_mean) > 10:  # bounds above are for values of size 1
        return dataclasses.replace(found, atol=found.atol * abs(case.value_mean))
    return found
