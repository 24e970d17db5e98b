"""A GPU without a GPU: what selection chooses there lowers for one, and the Triton program is the one that was meant.

JAX lowers for CUDA and ROCm on any machine, up to the point where XLA hands Triton's program to the card's compiler.
So this finds what Pallas or Triton can't express; it does not find what a compiler makes of it.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_cards import described_gpu

from easydel_ragged_plugin import page_shape, ragged_page_attention_v2, ragged_page_attention_v3

VERSIONS = ("v2", "v3")
DTYPES = {
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "float16": (jnp.float16, jnp.float16),
    "float32": (jnp.float32, jnp.float32),
    "float8-e4m3": (jnp.bfloat16, jnp.float8_e4m3fn),
    "float8-e5m2": (jnp.bfloat16, jnp.float8_e5m2),
    "float8-on-float32": (jnp.float32, jnp.float8_e4m3fn),
    "float32-on-bfloat16": (jnp.float32, jnp.bfloat16),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 300},
    "cap": {"logits_soft_cap": 30.0},
    "sinks": {"sinks": True},
    "scales": {"q_scale": 0.5, "k_scale": 2.0, "v_scale": 3.0},
    "all": {"sliding_window": 300, "logits_soft_cap": 30.0, "sinks": True, "q_scale": 0.5, "v_scale": 3.0},
}
KERNELS = {
    "v2": ["ragged_decode", "ragged_merge", "ragged_prefill"],
    "v3": ["ragged_update", "ragged_decode", "ragged_merge", "ragged_prefill"],
}


def lower(
    version: str,
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    rows: int = 8,
    width: int = 64,
    pages: int = 256,
    page_size: int = 128,
    tokens: int = 64,
    platform: str = "cuda",
    sinks: bool = False,
    **options: Any,
) -> Any:
    """A call with its pages donated, lowered for ``platform``."""
    cache = cache or dtype
    array, index = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    stored = array(page_shape(version, pages, page_size, kv_heads, head_dim, np.dtype(cache)), cache)
    queries, new = array((tokens, q_heads, head_dim), dtype), array((tokens, kv_heads, head_dim), dtype)
    lengths = [index((rows,)), index((rows, width)), index((rows + 1,))]
    aux = [array((q_heads,), jnp.float32)] if sinks else []
    if version == "v2":
        function = functools.partial(ragged_page_attention_v2, platform=platform, **options)
        arguments, donated = [queries, stored, *lengths, index((1,)), *aux], ()
    else:
        function = functools.partial(ragged_page_attention_v3, platform=platform, **options)
        arguments, donated = [queries, new, new, stored, *lengths, index((3,)), *aux], (3,)
    with described_gpu():
        return jax.jit(function, donate_argnums=donated).trace(*arguments).lower(lowering_platforms=(platform,))


def calls(lowered: Any) -> list[Any]:
    """The Triton calls of a lowered function, in order."""
    found = []

    def visit(operation: Any) -> None:
        for region in operation.regions:
            for block in region:
                for inner in block:
                    if inner.operation.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(
                        inner.attributes["call_target_name"]
                    ):
                        found.append(inner)
                    visit(inner.operation)

    visit(lowered.compiler_ir().operation)
    return found


def names(lowered: Any) -> list[str]:
    return [call.attributes["mhlo.backend_config"]["name"].value for call in calls(lowered)]


def triton(lowered: Any, name: str) -> str:
    """The Triton program of one kernel, as text."""
    from jax_private import _new_ir_context, ir

    (config,) = [
        call.attributes["mhlo.backend_config"]
        for call in calls(lowered)
        if call.attributes["mhlo.backend_config"]["name"].value == name
    ]
    program = config["ir"].value_bytes
    with _new_ir_context():
        return str(ir.Module.parse(program))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_lowers_for_cuda(head_dim: int, dtypes: tuple[Any, Any], options: dict[str, Any]) -> None:
    dtype, cache = dtypes
    assert names(lower("v3", head_dim=head_dim, dtype=dtype, cache=cache, **options)) == KERNELS["v3"]


@pytest.mark.parametrize("page_size", [1, 16, 100, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (32, 32), (8, 1), (9, 3), (5, 5), (128, 1)])
def test_v2_lowers_for_cuda(q_heads: int, kv_heads: int, page_size: int) -> None:
    width = 8192 // page_size
    lowered = lower("v2", q_heads=q_heads, kv_heads=kv_heads, page_size=page_size, width=width, **OPTIONS["all"])
    assert names(lowered) == KERNELS["v2"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_lowers_for_rocm(dtypes: tuple[Any, Any], version: str) -> None:
    dtype, cache = dtypes
    lowered = lower(version, dtype=dtype, cache=cache, platform="rocm", **OPTIONS["all"])
    assert names(lowered) == KERNELS[version]


def test_a_decode_step_of_one_row_has_no_prefill() -> None:
    assert names(lower("v2", rows=1, tokens=1)) == ["ragged_decode", "ragged_merge"]
    # Nor is there a merge where no context can be long enough to be split.
    assert names(lower("v2", rows=1, tokens=1, width=2)) == ["ragged_decode"]


# The Triton programs.


def loops(program: str) -> list[str]:
    """The text of each outermost loop."""
    found, depth, current = [], 0, []
    for line in program.splitlines():
        if "scf.for" in line and not depth:
            depth, current = 1, [line]
            continue
        if depth:
            current.append(line)
            depth += line.count("{") - line.count("}")
            if depth <= 0:
                found.append("\n".join(current))
                depth = 0
    return found


@pytest.mark.parametrize("kernel", ["ragged_decode", "ragged_prefill"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}], ids=["plain", "window"])
def test_loops_have_dynamic_bounds_and_load_tiles(kernel: str, options: dict[str, Any]) -> None:
    program = triton(lower("v3", **options), kernel)
    # `for`, not `while`: Triton prefetches the loads of the former alone.
    assert "scf.while" not in program
    attention = [loop for loop in loops(program) if "tt.dot" in loop]
    # Masked and unmasked blocks; with a window its own edge, too.
    assert len(attention) == (3 if options else 2)
    unmasked = 0
    for loop in attention:
        bounds = re.search(r"scf\.for %\w+ = (%[\w#]+) to (%[\w#]+) step", loop)
        assert bounds is not None
        assert not re.search(rf"{re.escape(bounds[2])} = arith\.constant", program), "an end that is fixed"
        assert loop.count("tt.dot ") == 2
        loads = [line for line in loop.splitlines() if "tt.load" in line]
        # One of page ids, keys and values each; all of them tiles of pointers.
        types = [re.search(r": (.*)$", line)[1] for line in loads]  # type: ignore[index]
        assert sorted(types) == sorted([f"tensor<{types[1].split('<')[1].split('x')[0]}x!tt.ptr<i32>>", *types[1:]])
        assert all(re.fullmatch(r"tensor<\d+x128x!tt\.ptr<bf16>>", each) for each in types[1:])
        assert len(types) == 3
        unmasked += "arith.select" not in loop
        # An operand of `tt.load` after the pointer is a mask.
        masked = [len(re.findall(r"%", line.split("tt.load")[1])) > 1 for line in loads]
        assert len(set(masked)) == 1
    assert "tt.dot" in program


def test_statistics_and_accumulators_are_float32() -> None:
    for kernel in ("ragged_decode", "ragged_prefill"):
        program = triton(lower("v3"), kernel)
        for line in program.splitlines():
            if "tt.dot " in line:
                assert re.search(r"-> tensor<\d+x\d+xf32>", line), line
            if "iter_args" in line and "tt.dot" in program:
                assert "bf16" not in line.split("->")[-1], line


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "ieee"), (jnp.bfloat16, None)])
def test_float32_is_not_cut_to_tf32(dtype: Any, precision: str | None) -> None:
    program = triton(lower("v3", dtype=dtype), "ragged_prefill")
    products = [line for line in program.splitlines() if "tt.dot " in line]
    assert products
    for line in products:
        # IEEE is Triton's default of that operation's attribute, so it may print nothing.
        assert "tf32" not in line, line


def test_update_is_in_place_and_so_is_the_output() -> None:
    lowered = lower("v3")
    aliases = {}
    for call in calls(lowered):
        name = call.attributes["mhlo.backend_config"]["name"].value
        text = str(call.attributes["output_operand_aliases"])
        aliases[name] = re.findall(r"output_tuple_indices = \[(.*?)\], operand_index = (\d+)", text)
        # What goes in there has the type of what comes out.
        for output, operand in aliases[name]:
            assert call.operands[int(operand)].type == call.results[int(output or 0)].type
    # The pages, and the output that starts as zeros; a merge passes on the output that decode filled.
    assert aliases == {
        "ragged_update": [("", "4")],
        "ragged_decode": [("0", "4")],
        "ragged_merge": [("", "4")],
        "ragged_prefill": [("", "4")],
    }
    # And the caller's donated pages are the memory of the result.
    assert re.search(r"%arg3: tensor<256x128x8x2x128xbf16> \{tf\.aliasing_output = 1 ", lowered.as_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_of_the_caches_size_but_the_cache(version: str) -> None:
    """No copy, gather, conversion or transpose of pages: they are reshaped and handed to the kernels."""
    lowered = lower(version, pages=5000, cache=jnp.float32)
    cache_elements = 5000 * 128 * 2048
    for line in lowered.as_text().splitlines():
        operation = re.search(r"stablehlo\.(\w+)", line)
        if operation is None or operation[1] in ("reshape", "custom_call"):
            continue
        for shape in re.findall(r"-> tensor<([\dx]+)x[a-z]", line):
            assert np.prod([int(size) for size in shape.split("x")]) < cache_elements / 50, line


@pytest.mark.parametrize(
    ("cache", "pages", "width"),
    [
        (jnp.bfloat16, 8192, 32),  # 2**31 elements: the last one is the largest positive offset
        (jnp.bfloat16, 8193, 64),
        (jnp.float32, 8192, 64),
        (jnp.bfloat16, 65536, 64),
        (jnp.float8_e4m3fn, 8192, 32),
        (jnp.float8_e4m3fn, 16385, 64),
    ],
)
def test_offsets_reach_the_end_of_large_caches(cache: Any, pages: int, width: int) -> None:
    """An offset counts elements, in ``width`` bits with a sign; the strides are applied in that width."""
    dtype = jnp.float32 if cache == jnp.float32 else jnp.bfloat16
    elements = pages * 128 * 2048
    assert elements - 1 < 2 ** (width - 1)
    lowered = lower("v3", dtype=dtype, cache=cache, pages=pages)
    stored = {"bfloat16": "bf16", "float32": "f32", "float8_e4m3fn": "f8E4M3FN"}[np.dtype(cache).name]
    for kernel in ("ragged_update", "ragged_decode", "ragged_prefill"):
        program = triton(lowered, kernel)
        pages_argument = {"ragged_update": 5, "ragged_decode": 2, "ragged_prefill": 2}[kernel]
        pointers = set(re.findall(rf"(%\w+) = tt\.splat %arg{pages_argument} : !tt\.ptr<{stored}>", program))
        assert pointers, kernel
        offsets = [
            line
            for line in program.splitlines()
            if "tt.addptr" in line and any(re.search(rf"{re.escape(each)}\b", line) for each in pointers)
        ]
        assert offsets, kernel
        for line in offsets:
            assert line.endswith(f"xi{width}>"), line
        if width == 64:
            # Page ids are widened before they are multiplied by the stride of a page.
            assert re.search(r"arith\.muli %\w+, %\w+ : tensor<\d+x128xi64>", program), kernel
            assert not re.search(r"arith\.muli %\w+, %\w+ : tensor<\d+x128xi32>", offsets[0])
