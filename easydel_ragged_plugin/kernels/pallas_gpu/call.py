"""How a kernel is called: what it fills, what only some calls have, and its launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from easydel_ragged_plugin.types import AttentionRequest
from easydel_ragged_plugin.varying import result_type, vary

from .blocks import broadcast_along, iota

__all__ = ["Extras", "Results", "launch", "store_results"]


class Results(NamedTuple):
    """What the kernels fill, one after the other in the same memory.

    Attributes:
        output: ``[tokens, q_heads, head_dim]`` in the queries' dtype.
        lse: ``[tokens, q_heads]`` float32 logsumexp; None where it is not requested.
    """

    output: Any
    lse: Any

    @classmethod
    def types_of(cls, request: AttentionRequest) -> Results:
        """Shapes and dtypes, for the first kernel."""
        shape = (request.num_tokens, request.num_q_heads)
        lse = jax.ShapeDtypeStruct(shape, jnp.float32) if request.return_lse else None
        return cls(jax.ShapeDtypeStruct((*shape, request.head_dim), request.query_dtype), lse)

    def arrays(self) -> tuple[Any, ...]:
        """Those that are not None."""
        return (self.output,) if self.lse is None else (self.output, self.lse)


class Extras(NamedTuple):
    """Arrays that only some calls have, float32; their references inside of a kernel.

    Attributes:
        sinks: ``[q_heads]``.
        k_scale, v_scale: ``[kv_heads]``.
    """

    sinks: Any
    k_scale: Any
    v_scale: Any

    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that are not None."""
        return tuple(array for array in self if array is not None)

    @classmethod
    def of_refs(cls, request: AttentionRequest, refs: Sequence[Any]) -> Extras:
        """The references at the beginning of ``refs``, which follow :meth:`arrays`."""
        following, options = iter(refs), request.options
        wanted = (options.sinks, *(name in options.scale_arrays for name in ("k_scale", "v_scale")))
        return cls(*(next(following) if each else None for each in wanted))

    def sink_of(self, heads: jax.Array) -> jax.Array | None:
        """Sinks of query heads."""
        return None if self.sinks is None else pltriton.load(self.sinks.at[heads])

    def scales_of(self, kv_head: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Factors of the keys and values of a kv head."""
        k_scale, v_scale = (None if ref is None else ref[kv_head] for ref in (self.k_scale, self.v_scale))
        return k_scale, v_scale


def store_results(
    request: AttentionRequest,
    refs: Sequence[Any],
    results: tuple[jax.Array, jax.Array | None],
    token: jax.Array,
    head: jax.Array,
    mask: jax.Array,
) -> None:
    """Store output and logsumexp of :func:`finish` in ``refs``, those of :meth:`Results.arrays`, where ``mask``."""
    output, lse = results
    lane = broadcast_along(iota(output.shape[1]), 1, output.shape)
    pltriton.store(
        refs[0].at[broadcast_along(token, 0, output.shape), broadcast_along(head, 0, output.shape), lane],
        output,
        mask=broadcast_along(mask, 0, output.shape) & (lane < request.head_dim),
    )
    if lse is not None:
        pltriton.store(refs[1].at[token, head], lse, mask=mask)


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    interpret: bool,
    operands: tuple[jax.Array, ...],
    results: Results,
    *others: jax.ShapeDtypeStruct,
    of_nvidia: Callable[..., None] | None = None,
) -> tuple[Results, tuple[jax.Array, ...]]:
    """Run a kernel on ``operands``. It fills ``results``, and arrays of the shapes ``others``.

    Results that are arrays are filled in their own memory; new ones begin with whatever their memory holds. Where the
    program is for an NVIDIA GPU, ``of_nvidia`` runs in the kernel's place.
    """
    filled: tuple[Any, ...] = results.arrays()
    old = vary(filled, operands) if isinstance(filled[0], jax.Array) else ()
    shapes = [result_type(each.shape, each.dtype, operands) for each in (*filled, *others)]

    def call(chosen: Callable[..., None]) -> Callable[..., Any]:
        # Compiler parameters of Triton choose it: JAX's own default is another backend since 0.9.
        return pl.pallas_call(
            chosen,
            grid=grid,
            out_shape=shapes,
            input_output_aliases={len(operands) + index: index for index in range(len(old))},
            compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
        )

    if interpret or of_nvidia is None:
        found = call(kernel)(*operands, *old)
    else:  # which platform it is, is known when the program is lowered
        found = lax.platform_dependent(*operands, *old, cuda=call(of_nvidia), default=call(kernel))
    return Results(found[0], None if results.lse is None else found[1]), tuple(found[len(filled) :])
