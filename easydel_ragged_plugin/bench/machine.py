"""What this machine can do, measured beside the kernels: absolute times mean little on a shared machine."""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from easydel_ragged_plugin import system

__all__ = ["Limits", "Machine", "facts"]

GEMM_FLOPS = 2.0 * 2048**3


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates of this machine. Reading is of an array that no cache holds."""

    read_bytes_per_s: float
    gemm_flops_per_s: float


def facts() -> dict[str, Any]:
    """What a reader must know to judge a time: device, processors, caches, versions, date."""
    import jax

    from easydel_ragged_plugin import workers

    kind = jax.devices()[0].device_kind
    return {
        "date": datetime.date.today().isoformat(),
        "platform": jax.default_backend(),
        "device": (system.processor_name() or kind) if kind == "cpu" else kind,  # JAX calls every CPU cpu
        "processors": system.processors(),
        "last_level_cache_bytes": system.last_level_cache(),
        "versions": {name: version for name, version in workers.versions().items() if version is not None},
    }


def _best_rate(work: Callable[[], None], amount: float, rounds: int) -> float:
    fastest = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return amount / fastest


def _mean_rate(work: Callable[[], None], amount: float, least_s: float = 0.05) -> float:
    """Rate over ``least_s`` seconds or one run: as long as kernels are timed, so that a busy machine slows both."""
    started, runs = time.perf_counter(), 0
    while True:
        work()
        runs += 1
        elapsed = time.perf_counter() - started
        if elapsed >= least_s:
            return runs * amount / elapsed


class Machine:
    """Measures the machine's limits, anew with each call. Use as a context manager."""

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp

        self._on_cpu = jax.default_backend() == "cpu"
        self._pool = ThreadPoolExecutor(system.processors())
        matrix = jnp.ones((2048, 2048), jnp.float32)
        product = jax.jit(lambda a: jnp.dot(a, a, precision=jax.lax.Precision.HIGHEST))
        self._multiply = lambda: product(matrix).block_until_ready()
        if self._on_cpu:
            # More than the last-level cache, but no more than a small machine can spare. NumPy requests huge
            # pages, which read faster than those that JAX gets: the limit is the machine's, not the allocator's.
            size = min(max(1 << 28, 2 * (system.last_level_cache() or 0)), 1 << 30)
            self._data: Any = np.ones(size // 4, np.float32)
        else:
            self._data = jnp.ones((1 << 31) // 4, jnp.float32)
            total = jax.jit(jnp.sum)
            self._sum = lambda: total(self._data).block_until_ready()
            self._sum()
        self._multiply()
        self.limits = Limits(self._read_rate(None, best_of=3), _best_rate(self._multiply, GEMM_FLOPS, 5))

    def _read_rate(self, size: int | None, best_of: int | None = None) -> float:
        """Bytes per second that all processors read together, of the first ``size`` bytes again and again.

        NumPy releases the interpreter's lock, so threads show what the memory gives; XLA may sum on one thread.
        """

        def rate(work: Callable[[], None], amount: float) -> float:
            return _mean_rate(work, amount) if best_of is None else _best_rate(work, amount, best_of)

        if not self._on_cpu:
            return rate(self._sum, self._data.nbytes)
        data = self._data if size is None else self._data[: size // 4]
        parts = np.array_split(data, system.processors())

        def read(function: Callable[[Any], Any]) -> None:
            for _ in self._pool.map(function, parts):
                pass

        for function in (np.max, np.sum):
            read(function)
        return max(rate(partial(read, function), data.nbytes) for function in (np.max, np.sum))

    def read_rate_for(self, size: float) -> float:
        """The better of reading from memory and of reading ``size`` bytes again and again, which a cache may hold.

        A kernel that is timed in a loop finds its pages where the previous call left them.
        """
        large = self._read_rate(None)
        # Below some megabytes the threads' own cost would be measured.
        if not self._on_cpu or not (1 << 23) <= size < self._data.nbytes:
            return large
        return max(large, self._read_rate(int(size)))

    def gemm_rate(self) -> float:
        """Floating-point operations per second of a float32 product, 2048 x 2048 x 2048."""
        return _mean_rate(self._multiply, GEMM_FLOPS)

    def close(self) -> None:
        """Give back memory and threads."""
        self._pool.shutdown()
        self._data = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
