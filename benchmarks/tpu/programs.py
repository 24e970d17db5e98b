"""Programs for described TPUs: what is compiled, and the process that does it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import types
from pathlib import Path
from typing import Any

from . import described

__all__ = ["FIELDS", "GEOMETRIES", "PAGE_SIZE", "Geometry", "Program", "call_of", "compile_one"]

TOKENS, ROWS, CONTEXT, PAGE_SIZE = 256, 8, 8192, 128
"""New tokens, rows and context of the programs; none of them changes an inner loop."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is compiled: heads and dtypes."""

    label: str
    q_heads: int
    kv_heads: int
    head_dim: int
    cache: str = "bfloat16"
    sinks: bool = False


GEOMETRIES = {
    "gqa": Geometry("32/8, d128", 32, 8, 128),
    "sinks": Geometry("64/8, d64, sinks", 64, 8, 64, sinks=True),
    "wide": Geometry("8/4, d256", 8, 4, 256),
    "fp8": Geometry("32/8, d128, float8_e4m3fn cache", 32, 8, 128, cache="float8_e4m3fn"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What one process compiles."""

    kind: str
    geometry: str
    kernel: str
    peer: str | None = None

    @property
    def key(self) -> str:
        return f"{self.kind} {self.geometry} {self.kernel}"


FIELDS = tuple(field.name for field in dataclasses.fields(Program))


def call_of(geometry: Geometry, kernel: str) -> tuple[Any, list[Any], tuple[int, ...]]:
    """v3 with ``kernel``, the shapes of its arguments, and the place of the pages."""
    import jax
    import jax.numpy as jnp

    from easydel_ragged_plugin import page_shape, ragged_page_attention_v3

    array, width = jax.ShapeDtypeStruct, CONTEXT // PAGE_SIZE
    ints = functools.partial(array, dtype=jnp.int32)
    cache = jnp.dtype(geometry.cache)
    shape = page_shape("v3", ROWS * width, PAGE_SIZE, geometry.kv_heads, geometry.head_dim, cache)
    heads = (geometry.q_heads, geometry.kv_heads, geometry.kv_heads)
    arguments: list[Any] = [array((TOKENS, each, geometry.head_dim), jnp.bfloat16) for each in heads]
    arguments += [array(shape, cache), ints((ROWS,)), ints((ROWS, width)), ints((ROWS + 1,)), ints((3,))]
    if geometry.sinks:
        arguments.append(array((geometry.q_heads,), jnp.float32))
    return functools.partial(ragged_page_attention_v3, platform="tpu", config=kernel), arguments, (3,)


def call_of_peer(geometry: Geometry, folder: str) -> tuple[Any, list[Any], tuple[int, ...]]:
    """The same for tpu-inference's kernel of v3, from the sources in ``folder``; its other modules are not loaded."""
    import jax
    import jax.numpy as jnp

    name, path = "", Path(folder)
    for part in ("tpu_inference", "kernels", "ragged_paged_attention", "v3"):
        name, path = f"{name}.{part}".lstrip("."), path / part
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    module = importlib.import_module(f"{name}.kernel")
    _, arguments, donated = call_of(geometry, "")
    cache = jnp.dtype(geometry.cache)
    pages = module.get_kv_cache_shape(arguments[3].shape[0], PAGE_SIZE, geometry.kv_heads, geometry.head_dim, cache)
    stored = [jax.ShapeDtypeStruct(each.shape, cache) for each in arguments[1:3]]
    arguments[1:4] = [*stored, jax.ShapeDtypeStruct(pages, cache)]
    arguments[5] = jax.ShapeDtypeStruct((ROWS * arguments[5].shape[1],), jnp.int32)
    function = functools.partial(module.ragged_paged_attention, sm_scale=geometry.head_dim**-0.5)
    return lambda *each: function(*each), arguments, donated


def compile_one(program: Program) -> dict[str, Any]:
    """Compile ``program``. Returns ``why`` there is nothing to compile, or the ``calls`` of this package's kernel."""
    described.behave_as_on(program.kind)
    geometry = GEOMETRIES[program.geometry]
    calls: list[dict[str, Any]] = []
    if program.peer:
        if geometry.sinks:
            return {"why": "its kernel for head_dim 64 is another one"}
        function, arguments, donated = call_of_peer(geometry, program.peer)
    else:
        from easydel_ragged_plugin import RaggedPageConfig, Unsupported, explain
        from easydel_ragged_plugin.kernels import pallas_tpu
        from easydel_ragged_plugin.kernels.pallas_tpu import blocks
        from easydel_ragged_plugin.kernels.pallas_tpu.call import Call

        function, arguments, donated = call_of(geometry, program.kernel)
        try:
            request = explain(function.func, *arguments, **function.keywords).request
        except Unsupported as refusal:
            return {"why": str(refusal).splitlines()[0]}
        if program.kernel == pallas_tpu.KERNEL.name:
            chosen, shapes = blocks.choose(request, RaggedPageConfig()), blocks.Shapes.of(request)
            for phase, block in (("decode", chosen.decode), ("prefill", chosen.prefill)):
                decode = phase == "decode"
                call = Call(request, block, shapes, tokens=TOKENS, writes=decode, decode=decode)
                calls.append({"phase": phase, "tokens": block.tokens, "keys": call.keys, "part": call.part})
    described.compiled(function, arguments, donated, program.kind)
    return {"calls": calls}
