"""A GPU without a GPU: what selection chooses there lowers for one, and the Triton program is the one that was meant.

JAX lowers for CUDA and ROCm on any machine, up to the point where XLA hands Triton's program to the card's compiler.
So this finds what Pallas or Triton can't express; it does not find what a compiler makes of it.

What a lowered program is held against is in functions named ``check_``. Each of them is also given a program that it
must not let pass.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_cards import described_gpu
from gpu_requests import in_two_loops
from jax.sharding import PartitionSpec as P

from easydel_ragged_plugin import (
    CUSTOM_CALLS,
    RaggedPageConfig,
    api,
    page_shape,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
)
from easydel_ragged_plugin.kernels.pallas_gpu import attend, softmax
from easydel_ragged_plugin.layout import Version

VERSIONS: tuple[Version, ...] = ("v2", "v3")
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
    "chunk": {"attention_chunk_size": 300},
    "scales": {"k_scale": 2.0, "v_scale": 3.0},
    "scales-per-kv-head": {"scale_arrays": ("k_scale", "v_scale"), "logits_soft_cap": 30.0},
    "small-scale-over-large-cap": {"softmax_scale": 1e-30, "logits_soft_cap": 1e17},
    "all": {
        "sliding_window": 300,
        "logits_soft_cap": 30.0,
        "sinks": True,
        "v_scale": 3.0,
        "return_lse": True,
    },
}
ATTENTION = ("ragged_decode", "ragged_prefill")
KERNELS = {
    "v2": ["ragged_decode", "ragged_merge", "ragged_prefill"],
    "v3": ["ragged_update", "ragged_decode", "ragged_merge", "ragged_prefill"],
}


def lower(
    version: Version,
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
    scale_arrays: tuple[str, ...] = (),
    donate: bool = True,
    prepare: Callable[[jax.Array], jax.Array] = lambda pages: pages,
    around: Callable[[Any], Any] = lambda call: call,
    **options: Any,
) -> Any:
    """A call with its pages donated, lowered for ``platform``. It attends to ``prepare(pages)``."""
    cache = cache or dtype
    array, index = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    stored = array(page_shape(version, pages, page_size, kv_heads, head_dim, np.dtype(cache)), cache)
    queries, new = array((tokens, q_heads, head_dim), dtype), array((tokens, kv_heads, head_dim), dtype)
    lengths = [index((rows,)), index((rows, width)), index((rows + 1,))]
    aux = [array((q_heads,), jnp.float32)] if sinks else []
    function: Any = ragged_page_attention_v2 if version == "v2" else ragged_page_attention_v3
    before = [queries] if version == "v2" else [queries, new, new]
    at, last = len(before), index((1 if version == "v2" else 3,))
    arguments = [*before, stored, *lengths, last, *aux]
    scales = {name: array((kv_heads,), jnp.float32) for name in scale_arrays}

    def call(*arrays: Any, **scales: Any) -> Any:
        return function(*arrays[:at], prepare(arrays[at]), *arrays[at + 1 :], platform=platform, **options, **scales)

    with described_gpu():
        jitted = jax.jit(around(call), donate_argnums=at if donate and version == "v3" else ())
        return jitted.trace(*arguments, **scales).lower(lowering_platforms=(platform,))


def operations(outer: Any) -> Iterator[Any]:
    """Every operation of a module or of another operation, in order, those inside of others included."""
    for region in outer.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from operations(inner.operation)


def calls(lowered: Any) -> list[Any]:
    """The Triton calls of a lowered function, in order."""
    return [
        each
        for each in operations(lowered.compiler_ir().operation)
        if each.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(each.attributes["call_target_name"])
    ]


def names(lowered: Any) -> list[str]:
    return [call.attributes["mhlo.backend_config"]["name"].value for call in calls(lowered)]


@contextlib.contextmanager
def triton_module(lowered: Any, name: str) -> Iterator[Any]:
    """The Triton program of one kernel. Its operations can be looked at within the ``with`` block."""
    from jax_private import _new_ir_context, ir

    (config,) = [
        call.attributes["mhlo.backend_config"]
        for call in calls(lowered)
        if call.attributes["mhlo.backend_config"]["name"].value == name
    ]
    program = config["ir"].value_bytes
    with _new_ir_context():
        yield ir.Module.parse(program)


def triton(lowered: Any, name: str) -> str:
    """The Triton program of one kernel, as text."""
    with triton_module(lowered, name) as module:
        return str(module)


def every_pair() -> Iterator[Any]:
    """head_dim, dtypes and options: a sixth of all combinations, in which every pair occurs.

    With one JAX alone but for one in seven, in which each of them occurs.
    """
    head_dims = (64, 80, 96, 128, 192, 256)
    for (i, dtypes), (j, options) in itertools.product(enumerate(DTYPES), enumerate(OPTIONS)):
        marks = () if (i - 2 * j) % len(DTYPES) == 0 else pytest.mark.once
        yield pytest.param(head_dims[(i + j) % len(head_dims)], dtypes, options, marks=marks)


@pytest.mark.parametrize(("head_dim", "dtypes", "options"), list(every_pair()))
def test_lowers_for_cuda(head_dim: int, dtypes: str, options: str) -> None:
    dtype, cache = DTYPES[dtypes]
    lowered = lower("v3", head_dim=head_dim, dtype=dtype, cache=cache, **OPTIONS[options])
    assert names(lowered) == KERNELS["v3"]


def pages_and_heads() -> Iterator[Any]:
    """page_size, query heads and kv heads: with one JAX alone but for one in five, in which each of them occurs."""
    page_sizes = (1, 16, 100, 128, 256)
    heads = ((32, 8), (32, 32), (8, 1), (9, 3), (5, 5), (128, 1))
    for (i, page_size), (j, each) in itertools.product(enumerate(page_sizes), enumerate(heads)):
        yield pytest.param(page_size, *each, marks=() if (i - j) % len(page_sizes) == 0 else pytest.mark.once)


@pytest.mark.parametrize(("page_size", "q_heads", "kv_heads"), list(pages_and_heads()))
def test_v2_lowers_for_cuda(page_size: int, q_heads: int, kv_heads: int) -> None:
    width = 8192 // page_size
    lowered = lower("v2", q_heads=q_heads, kv_heads=kv_heads, page_size=page_size, width=width, **OPTIONS["all"])
    assert names(lowered) == KERNELS["v2"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_lowers_for_rocm(dtypes: tuple[Any, Any], version: Version) -> None:
    dtype, cache = dtypes
    lowered = lower(version, dtype=dtype, cache=cache, platform="rocm", **OPTIONS["all"])
    assert names(lowered) == KERNELS[version]


def test_instructions_of_nvidia_are_in_programs_for_nvidia_alone() -> None:
    """Weights and what is kept of the sums, in the one loop over keys."""
    for kernel in ATTENTION:
        for_nvidia, for_amd = (triton(lower("v2", platform=platform), kernel) for platform in ("cuda", "rocm"))
        assert for_nvidia.count("tt.elementwise_inline_asm") == 2
        assert for_nvidia.count("ex2.approx.ftz.f32") == 2
        assert "tt.elementwise_inline_asm" not in for_amd


@pytest.mark.parametrize("varying", ["all", "heads", "nothing"])
@pytest.mark.parametrize("version", VERSIONS)
def test_lowers_inside_of_shard_map(version: Version, varying: str) -> None:
    """With its defaults: results vary over the axes that any operand varies over."""
    heads = (0, 1, 6) if version == "v2" else (0, 1, 2, 3, 8)
    count = 7 if version == "v2" else 9
    specs = tuple(P("x") if varying == "all" or (varying == "heads" and at in heads) else P() for at in range(count))
    around = functools.partial(jax.shard_map, in_specs=specs, out_specs=P() if varying == "nothing" else P("x"))
    lowered = lower(version, sinks=True, return_lse=True, donate=False, sliding_window=300, around=around)
    assert names(lowered) == KERNELS[version]


@pytest.mark.parametrize("share", [False, True])
def test_a_loop_over_layers_makes_no_lists_of_what_is_prepared(share: bool) -> None:
    def scanned(call: Callable[..., Any]) -> Callable[..., Any]:
        def layers(queries: Any, pages: Any, *index: Any) -> Any:
            options = {"platform": "cuda"}
            prepared = api.prepare(ragged_page_attention_v2, queries, pages, *index, **options) if share else None
            body = functools.partial(ragged_page_attention_v2, prepared=prepared, **options)
            return jax.lax.scan(lambda carry, _: (body(carry, pages, *index), None), queries, length=2)[0]

        return layers

    lowered = lower("v2", around=scanned)
    assert sorted(names(lowered)) == sorted(KERNELS["v2"])
    (loop,) = [each for each in operations(lowered.compiler_ir().operation) if each.name == "stablehlo.while"]
    functions = {
        each.attributes["sym_name"].value: each
        for each in operations(lowered.compiler_ir().operation)
        if each.name == "func.func"
    }
    bodies = [loop]
    for body in bodies:  # it grows by what is called from it
        callees = (functions[each.attributes["callee"].value] for each in operations(body) if each.name == "func.call")
        bodies += [each for each in callees if each not in bodies]
    reductions = [each for body in bodies for each in operations(body) if each.name == "stablehlo.reduce"]
    assert bool(reductions) == (not share)


@pytest.mark.parametrize("version", VERSIONS)
def test_export_needs_no_names_but_those_that_the_package_gives(version: Version) -> None:
    lowered = operations(lower(version, sinks=True, return_lse=True).compiler_ir().operation)
    targets = {each.attributes["call_target_name"].value for each in lowered if each.name == "stablehlo.custom_call"}
    assert targets
    assert targets <= set(CUSTOM_CALLS)


def test_a_decode_step_of_one_row_has_no_prefill() -> None:
    assert names(lower("v2", rows=1, tokens=1)) == ["ragged_decode", "ragged_merge"]
    # Nor is there a merge where no context can be long enough to be split.
    assert names(lower("v2", rows=1, tokens=1, width=2)) == ["ragged_decode"]
    assert names(lower("v2", rows=1, tokens=1, sliding_window=128)) == ["ragged_decode"]
    assert names(lower("v2", rows=1, tokens=1, attention_chunk_size=128)) == ["ragged_decode"]
    assert names(lower("v2", rows=1, tokens=1, sliding_window=1000)) == ["ragged_decode", "ragged_merge"]


def test_a_step_of_decodes_starts_few_programs_of_prefill() -> None:
    # 64 tokens hold 12 rows that are longer than a decode tile, of 4 tokens. For each kv head they fill 13 tiles of 32
    # tokens at most; two more are room for a row with a wrong start. With room for a tile of each row it would be 66.
    lowered = lower("v2", rows=64, tokens=64, config=RaggedPageConfig(num_queries_per_block=32, num_stages=1))
    prefill = dict(zip(names(lowered), calls(lowered), strict=True))["ragged_prefill"]
    grid = prefill.attributes["mhlo.backend_config"]
    assert math.prod(grid[f"grid_{axis}"].value for axis in "xyz") == 8 * (13 + 2)


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


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, Any], None]]:
    """Replaces a function that the kernels call. JAX keeps what it has traced, so that is forgotten."""

    def replace(module: Any, name: str, value: Any) -> None:
        monkeypatch.setattr(module, name, value)
        jax.clear_caches()

    yield replace
    monkeypatch.undo()
    jax.clear_caches()


def products(program: str) -> list[str]:
    return [line for line in program.splitlines() if re.search(r"= tt\.dot\b", line)]


def check_key_loops(program: str) -> None:
    """One loop over keys, with both products, dynamic bounds and tiled, masked loads."""
    # `for`, not `while`: Triton prefetches the loads of the former alone.
    assert "scf.while" not in program, "a while loop"
    attention = [loop for loop in loops(program) if products(loop)]
    assert len(attention) == 1, f"{len(attention)} loops with products"
    assert len(products(program)) == 2, "products outside of loops"
    (loop,) = attention
    bounds = re.search(r"scf\.for %\w+ = (%[\w#]+) to (%[\w#]+) step", loop)
    assert bounds is not None
    assert not re.search(rf"{re.escape(bounds[2])} = arith\.constant", program), "an end that is fixed"
    assert len(products(loop)) == 2, f"{len(products(loop))} products in a loop"
    loads = re.findall(r"= tt\.load (%.*) : (.*)$", loop, re.MULTILINE)
    assert loop.count("tt.load") == len(loads) == 3, f"{len(loads)} loads in a loop"
    # Page ids, keys and values; all of them tiles of pointers.
    (keys,) = {re.fullmatch(r"tensor<(\d+)x128x!tt\.ptr<bf16>>", kind)[1] for _, kind in loads[1:]}  # type: ignore[index]
    assert loads[0][1] == f"tensor<{keys}x!tt.ptr<i32>>"
    # An operand after the pointer is a mask.
    assert all("," in operands for operands, _ in loads), f"masks of loads: {loads}"


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}], ids=["plain", "window"])
def test_loops_have_dynamic_bounds_and_load_tiles(kernel: str, options: dict[str, Any], spoil: Any) -> None:
    check_key_loops(triton(lower("v3", **options), kernel))
    spoil(attend, "walk", in_two_loops(attend.walk))
    with pytest.raises(AssertionError, match="2 loops with products"):
        check_key_loops(triton(lower("v3", **options), kernel))


def test_a_kernel_without_products_is_seen(spoil: Any) -> None:
    def nothing(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
        return jnp.zeros((left.shape[0], right.shape[1 - contracted]), jnp.float32)

    spoil(attend, "product", nothing)
    lowered = lower("v3")
    for kernel in ATTENTION:
        program = triton(lowered, kernel)
        with pytest.raises(AssertionError, match="0 loops with products"):
            check_key_loops(program)
        with pytest.raises(AssertionError, match="0 products"):
            check_float32_sums(program, num_products=2)
        with pytest.raises(AssertionError, match="0 products"):
            check_ieee_products(program, num_products=2)


def test_a_loop_that_does_not_count_is_seen(spoil: Any) -> None:
    def fori_loop(begin: Any, end: Any, step: Callable[..., Any], state: Any) -> Any:
        def go_on(carry: Any) -> Any:
            return (carry[0] < end) & (carry[0] >= begin)

        return jax.lax.while_loop(go_on, lambda carry: (carry[0] + 1, step(carry[0], carry[1])), (begin, state))[1]

    spoil(jax.lax, "fori_loop", fori_loop)
    with pytest.raises(AssertionError, match="a while loop"):
        check_key_loops(triton(lower("v3"), "ragged_decode"))


def check_float32_sums(program: str, num_products: int) -> None:
    """Products and what loops carry from one trip to the next are float32."""
    found = products(program)
    assert len(found) == num_products, f"{len(found)} products"
    for line in found:
        assert re.search(r"-> tensor<\d+x\d+xf32>", line), line
    # Maximum, total and weighted values of a tile, and of a query that is taken alone.
    carried = [re.findall(r"x([a-z]\w+)>", line.split("->")[1]) for line in program.splitlines() if "iter_args" in line]
    assert [each for each in carried if len(each) == 3] == [["f32"] * 3] * (num_products // 2 + 1), (
        f"carried: {carried}"
    )


@pytest.mark.parametrize("kernel", ATTENTION)
def test_statistics_and_accumulators_are_float32(kernel: str, spoil: Any) -> None:
    check_float32_sums(triton(lower("v3"), kernel), num_products=2)

    state, walk = softmax.Softmax, attend.walk

    def half(maximum: jax.Array, total: jax.Array, weighted: jax.Array) -> softmax.Softmax:
        of_a_tile = len(weighted) > 1  # what is stored of a query alone has to stay in float32
        return state(maximum, total, weighted.astype(jnp.bfloat16) if of_a_tile else weighted)

    def walk_with_half(*arguments: Any) -> softmax.Softmax:
        maximum, total, weighted = walk(*arguments)
        return state(maximum, total, weighted.astype(jnp.float32))

    spoil(softmax, "Softmax", half)
    spoil(attend, "walk", walk_with_half)
    with pytest.raises(AssertionError, match="carried"):
        check_float32_sums(triton(lower("v3"), kernel), num_products=2)


def check_ieee_products(program: str, num_products: int) -> None:
    found = products(program)
    assert len(found) == num_products, f"{len(found)} products"
    for line in found:
        # IEEE is Triton's default of that operation's attribute, so it prints nothing.
        assert "inputPrecision" not in line, line


@pytest.mark.parametrize("kernel", ATTENTION)
def test_float32_is_not_cut_to_tf32(kernel: str, spoil: Any) -> None:
    check_ieee_products(triton(lower("v3", dtype=jnp.float32), kernel), num_products=2)

    def default_precision(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
        return jax.lax.dot_general(left, right, (((1,), (contracted,)), ((), ())))

    spoil(attend, "product", default_precision)
    with pytest.raises(AssertionError, match="inputPrecision = tf32"):
        check_ieee_products(triton(lower("v3", dtype=jnp.float32), kernel), num_products=2)


DONATED = r"%arg3: tensor<256x128x8x2x128xbf16> \{tf\.aliasing_output = 1 "
"""The caller's pages as the memory of the second result."""


@pytest.mark.parametrize("return_lse", [False, True])
def test_update_is_in_place_and_so_are_the_results(return_lse: bool) -> None:
    lowered = lower("v3", return_lse=return_lse)
    aliases, num_results = {}, {}
    for call in calls(lowered):
        name = call.attributes["mhlo.backend_config"]["name"].value
        text = str(call.attributes["output_operand_aliases"])
        aliases[name] = re.findall(r"output_tuple_indices = \[(.*?)\], operand_index = (\d+)", text)
        num_results[name] = len(call.results)
        # What goes in there has the type of what comes out.
        for output, operand in aliases[name]:
            assert call.operands[int(operand)].type == call.results[int(output or 0)].type
    # The pages; the output, which decode makes and the others fill; so for the logsumexp. Beside them decode has three
    # arrays of partial results.
    alone, both = [("", "4")], [("0", "4"), ("1", "5")]
    assert aliases == {
        "ragged_update": alone,
        "ragged_decode": [],
        "ragged_merge": both if return_lse else alone,
        "ragged_prefill": both if return_lse else alone,
    }
    assert num_results == {
        "ragged_update": 1,
        "ragged_decode": 3 + 1 + return_lse,
        "ragged_merge": 1 + return_lse,
        "ragged_prefill": 1 + return_lse,
    }
    assert re.search(DONATED, lowered.as_text())
    assert not re.search(DONATED, lower("v3", donate=False).as_text())


def check_nothing_is_as_large_as(elements: int, lowered: Any) -> None:
    """No copy, gather, conversion or transpose of pages: they are reshaped and handed to the kernels."""
    sizes: dict[str, int] = {}
    for each in operations(lowered.compiler_ir().operation):
        largest = max((int(np.prod(result.type.shape)) for result in each.results), default=0)
        sizes[each.name] = max(largest, sizes.get(each.name, 0))
    assert sizes["stablehlo.reshape"] == elements, "pages are not reshaped"
    large = {name for name, size in sizes.items() if size >= elements / 50}
    # What a function returns is counted where it is made.
    large -= {"stablehlo.reshape", "stablehlo.custom_call", "func.call"}
    assert not large, f"of the cache's size: {large}"


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_of_the_caches_size_but_the_cache(version: Version) -> None:
    elements = 5000 * 128 * 2048
    check_nothing_is_as_large_as(elements, lower(version, pages=5000, cache=jnp.float32))
    copies: dict[str, Callable[[jax.Array], jax.Array]] = {
        "convert": lambda pages: pages.astype(jnp.bfloat16).astype(pages.dtype),
        "multiply": lambda pages: 2 * pages,
        "gather": lambda pages: pages[jnp.arange(5000)],
        "transpose": lambda pages: pages.swapaxes(0, 1).reshape(pages.shape),
    }
    for operation, prepare in copies.items():
        lowered = lower(version, pages=5000, cache=jnp.float32, prepare=prepare)
        with pytest.raises(AssertionError, match=rf"of the cache's size: .*stablehlo\.{operation}"):
            check_nothing_is_as_large_as(elements, lowered)


def check_no_output_is_made_beforehand(lowered: Any) -> None:
    """Nothing but the kernels makes arrays of the output's type: no zeros, no copy, no choice between two of them."""
    (output,) = {str(call.results[0].type) for call in calls(lowered)}
    made = {
        each.name
        for each in operations(lowered.compiler_ir().operation)
        if output in {str(result.type) for result in each.results}
        # One branch is no choice: of those for several platforms this is the one for the platform that is lowered for.
        and not (each.name == "stablehlo.case" and len(each.regions) == 1)
    }
    assert made <= {"stablehlo.custom_call", "func.call"}, f"arrays of the output's type: {made}"


def test_no_output_is_made_beforehand() -> None:
    check_no_output_is_made_beforehand(lower("v2"))

    def and_zeros(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: call(*arrays) + jnp.zeros((64, 32, 128), jnp.bfloat16)

    with pytest.raises(AssertionError, match="of the output's type"):
        check_no_output_is_made_beforehand(lower("v2", around=and_zeros))


PAGES = {"ragged_update": (5, 2), "ragged_decode": (3, 4), "ragged_prefill": (2, 4)}
"""The argument that holds the pages, and how often a kernel computes addresses in it: for keys and for values, once or
in each of two loops, of which the second takes the queries one by one."""


def type_of(value: Any) -> str:
    return str(value.type)


def addresses(module: Any, argument: int) -> list[tuple[Any, Any]]:
    """(pointer, what is added to it) wherever a Triton program computes addresses in one of its arguments."""
    return [
        (each.operands[0].owner.operands[0], each.operands[1])
        for each in operations(module.operation)
        if each.name == "tt.addptr"
        and getattr(each.operands[0].owner, "name", "") == "tt.splat"
        and each.operands[0].owner.operands[0].get_name() == f"%arg{argument}"
    ]


def strides(operation: Any) -> Iterator[Any]:
    """The products of tiles that an offset is a sum of."""
    if operation.name == "arith.muli":
        yield operation.results[0]
    elif operation.name == "arith.addi":
        for operand in operation.operands:
            yield from strides(operand.owner)


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
    for kernel, (argument, accesses) in PAGES.items():
        with triton_module(lowered, kernel) as module:
            found = [
                (type_of(pointer), type_of(offset), {type_of(product) for product in strides(offset.owner)})
                for pointer, offset in addresses(module, argument)
            ]
        assert len(found) == accesses, kernel
        for pointer, offset, multiplied in found:
            assert pointer == f"!tt.ptr<{stored}>", kernel
            assert re.fullmatch(rf"tensor<\d+x128xi{width}>", offset), kernel
            # Page ids are widened before they are multiplied by the stride of a page.
            assert multiplied == {offset}, kernel
