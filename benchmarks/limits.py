"""What a device gives, measured in the same run as the kernels: absolute times mean little without it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates of the device: bytes copied, read and written, and bfloat16 operations."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float

    def text(self) -> str:
        """Both, in the usual units."""
        return (
            f"{self.copy_bytes_per_s / 1e9:.0f} GB/s copied, {self.matmul_flops_per_s / 1e12:.0f} TFLOP/s "
            "(bfloat16, 8192^3)"
        )


def rate(function: Callable[[Any], Any], start: jax.Array, trips: int, amount: float) -> float:
    """Amount per second of ``function`` applied ``trips`` times in one program; the best of five."""
    program = jax.jit(lambda value: jax.lax.fori_loop(0, trips, lambda _, carry: function(carry), value))
    jax.block_until_ready(program(start))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(program(start))
        seconds.append(time.perf_counter() - started)
    return trips * amount / min(seconds)


def limits(dry: bool) -> Limits:
    """The device's limits; in a dry run, of arrays so small that the numbers mean nothing."""
    size = 1 << (15 if dry else 29)
    copied = rate(lambda array: -array, jnp.ones(size, jnp.float32), 20, 2 * 4 * size)
    side = 64 if dry else 8192
    # Columns of norm 1, so that products neither grow nor vanish: their numbers decide what power a card draws.
    matrix = (jax.random.normal(jax.random.key(0), (side, side)) * side**-0.5).astype(jnp.bfloat16)
    start = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    product = rate(lambda array: jnp.dot(array, matrix).astype(jnp.bfloat16), start, 20, 2.0 * side**3)
    return Limits(copied, product)
