"""The native CPU kernel at every instruction set of this machine.

``test_kernels.py`` runs all cases on every kernel; here are the instruction sets, the options in combination, hostile
metadata and the buffers. ``test_native_library.py`` has the processes: a library that is missing, threads, devices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import bits, compiled, run_batch
from native_library import LEVELS, needs_library

import easydel_ragged_plugin
from easydel_ragged_plugin import page_shape, ragged_page_attention_v2, ragged_page_attention_v3, reference
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.layout import Version
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import CASES, Case, build_batch, case_named
from easydel_ragged_plugin.testing.tolerances import tolerance_for

# Bounds on results of size 1, by the query's dtype: float32 sums of a few hundred terms, and one rounding of the
# result and of each probability to the shorter types. Relative and absolute.
BOUNDS = {"float32": (2e-5, 2e-5), "bfloat16": (2**-8, 2**-7), "float16": (2**-10, 2**-9)}


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu_native.set_isa(request.param)
    yield request.param
    cpu_native.set_isa(None)


# What depends on JAX is how arrays reach the C++: one instruction set shows it, the one that is in use without a word.
each_level = pytest.mark.parametrize(
    "level",
    [pytest.param(name, marks=() if name == cpu_native.isa() else pytest.mark.once) for name in LEVELS],
    indirect=True,
)


@needs_library
@pytest.mark.once  # test_kernels.py has them with every JAX
@each_level
@pytest.mark.parametrize(
    ("case", "version"),
    [pytest.param(case, version, id=f"{case.name}-{version}") for case in CASES for version in case.versions],
)
def test_case_matches_oracle_at_every_instruction_set(case: Case, version: Version, level: str) -> None:
    batch = build_batch(case, version)
    expected, expected_pages = batch.expected()
    output, pages = run_batch(batch, "cpu_native")
    tolerance = tolerance_for(case)
    np.testing.assert_allclose(output.astype(np.float64), expected, rtol=tolerance.rtol, atol=tolerance.atol)
    np.testing.assert_array_equal(bits(pages), bits(expected_pages))


@needs_library
class TestCpuNative(KernelContract):
    kernel: ClassVar = cpu_native.KERNEL


def random_call(
    version: Version,
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    dtypes: tuple[Any, Any],
    page_size: int,
) -> dict[str, Any]:
    """Arguments of one call, pages shuffled; ``rows`` holds (context, new tokens), ``dtypes`` query and cache."""
    random = np.random.default_rng(len(rows) * 1000 + head_dim)
    q_heads, kv_heads = heads
    needed = [-(-context // page_size) for context, _ in rows]
    num_pages, width = sum(needed) + 2, max(needed) + 1
    order = iter(random.permutation(num_pages - 1) + 1)
    tables = np.zeros((len(rows), width), np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [next(order) for _ in range(count)]
    starts = np.cumsum([0, *(new for _, new in rows)]).astype(np.int32)
    tokens = int(starts[-1]) + 2
    query_dtype, cache_dtype = map(np.dtype, dtypes)
    shape = page_shape(version, num_pages, page_size, kv_heads, head_dim, cache_dtype)
    normal = random.standard_normal
    return {
        "queries": normal((tokens, q_heads, head_dim)).astype(np.float32).astype(query_dtype),
        "keys": normal((tokens, kv_heads, head_dim)).astype(np.float32).astype(query_dtype),
        "values": normal((tokens, kv_heads, head_dim)).astype(np.float32).astype(query_dtype),
        "pages": normal(shape).astype(np.float32).astype(cache_dtype),
        "index": (np.array([context for context, _ in rows], np.int32), tables, starts),
        "count": np.array([len(rows)], np.int32),
        "distribution": np.array([0, 0, len(rows)], np.int32),
    }


class Results(NamedTuple):
    output: np.ndarray
    pages: np.ndarray
    lse: np.ndarray


def call_both(version: Version, a: dict[str, Any], sinks: Any = None, **options: Any) -> Iterator[Results]:
    """Results of the oracle, then of the kernel."""
    for native in (False, True):
        module: Any = easydel_ragged_plugin if native else reference
        arguments: tuple[Any, ...]
        if version == "v2":
            function = module.ragged_page_attention_v2
            arguments = (a["queries"], a["pages"], *a["index"], a["count"], sinks)
        else:
            function = module.ragged_page_attention_v3
            arguments = (a["queries"], a["keys"], a["values"], a["pages"], *a["index"], a["distribution"], sinks)
        if native:
            arguments = tuple(None if array is None else jnp.array(array) for array in arguments)
            function = jax.jit(functools.partial(function, config="cpu_native", return_lse=True, **options))
            output, *pages, lse = function(*arguments)
        else:
            output, *pages, lse = function(*arguments, return_lse=True, **options)
        yield Results(np.asarray(output), np.asarray(pages[0] if pages else a["pages"]), np.asarray(lse))


def assert_matches(
    version: Version, arguments: dict[str, Any], sinks: Any = None, scale: float = 1.0, **options: Any
) -> None:
    expected, found = call_both(version, arguments, sinks, **options)
    relative, absolute = BOUNDS[found.output.dtype.name]
    np.testing.assert_allclose(found.output.astype(np.float64), expected.output, rtol=relative, atol=absolute * scale)
    np.testing.assert_array_equal(bits(found.pages), bits(expected.pages))
    # Products and sums are float32 whatever the dtypes are.
    np.testing.assert_allclose(found.lse, expected.lse, rtol=2e-5, atol=2e-5)
    assert found.lse.dtype == np.float32


ROWS = [(70, 1), (1, 1), (45, 45), (90, 13), (33, 2), (64, 1)]
GEOMETRIES = [
    ((8, 2), 128),
    ((9, 3), 64),
    ((5, 5), 80),
    ((14, 2), 72),
    ((6, 1), 96),
    ((4, 2), 192),
    ((3, 1), 256),
    ((2, 2), 7),
    ((21, 21), 128),  # tokens so large that a block has 8 of them
]


@needs_library
@each_level
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("heads", "head_dim"), GEOMETRIES)
def test_geometry(heads: tuple[int, int], head_dim: int, dtype: str, level: str) -> None:
    version: Version = "v3" if (head_dim + heads[0]) % 2 else "v2"
    arguments = random_call(version, ROWS, heads, head_dim, (jnp.dtype(dtype), jnp.dtype(dtype)), 16)
    assert_matches(version, arguments)


OPTIONS = {
    "window": {"sliding_window": 9},
    "wide-window": {"sliding_window": 50, "logits_soft_cap": 3.0},
    "cap": {"logits_soft_cap": 0.7},
    "scales": {"softmax_scale": 0.2, "q_scale": 0.5, "k_scale": 1.5, "v_scale": 2.0},
}


@needs_library
@each_level
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], with_sinks: bool, level: str) -> None:
    variants: tuple[tuple[Version, Any], ...] = (("v2", jnp.float32), ("v3", jnp.bfloat16))
    for version, dtype in variants:
        arguments = random_call(version, ROWS, (6, 2), 64, (dtype, dtype), 8)
        sinks = np.linspace(-2, 2, 6).astype(np.float32) if with_sinks else None
        assert_matches(version, arguments, sinks, scale=options.get("v_scale", 1.0), **options)


@needs_library
@each_level
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("query", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((4, 2), 80), ((4, 2), 64), ((6, 2), 128), ((2, 2), 192), ((4, 1), 64)]
)
def test_query_and_cache_dtypes_may_differ(
    heads: tuple[int, int], head_dim: int, query: str, cache: str, level: str
) -> None:
    arguments = random_call("v3", ROWS, heads, head_dim, (jnp.dtype(query), jnp.dtype(cache)), 8)
    arguments["keys"][:, :, ::3] *= 1000  # past what the 8-bit types hold
    arguments["queries"] = (arguments["queries"] * 0.01).astype(arguments["queries"].dtype)
    expected, found = call_both("v3", arguments)
    np.testing.assert_array_equal(bits(found.pages), bits(expected.pages))
    np.testing.assert_allclose(found.output.astype(np.float64), expected.output, rtol=2**-7, atol=2**-5)


@needs_library
def test_every_bit_pattern_of_short_floats_is_decoded() -> None:
    """One query, one key, so that the output is the value: all 256 patterns, and the 65536 of float16."""
    for dtype, count in ((jnp.float8_e4m3fn, 1 << 8), (jnp.float8_e5m2, 1 << 8), (jnp.float16, 1 << 16)):
        head_dim = 128
        patterns = np.arange(count, dtype=np.uint16).astype(f"uint{8 * np.dtype(dtype).itemsize}").view(dtype)
        tokens = count // head_dim
        pages = np.zeros((tokens, 1, 2, head_dim), dtype)
        pages[:, 0, 1] = patterns.reshape(tokens, head_dim)
        ones, starts = np.ones(tokens, np.int32), np.arange(tokens + 1, dtype=np.int32)
        for name in LEVELS:
            cpu_native.set_isa(name)
            output = ragged_page_attention_v2(
                jnp.zeros((tokens, 1, head_dim), jnp.float32),
                jnp.array(pages),
                ones,
                np.arange(tokens, dtype=np.int32)[:, None],
                starts,
                np.array([tokens], np.int32),
                config="cpu_native",
            )
            np.testing.assert_array_equal(np.asarray(output).ravel(), patterns.astype(np.float32))
        cpu_native.set_isa(None)


def cancelling_call(context: int, new: int, head_dim: int) -> dict[str, Any]:
    """A row in bfloat16 whose weighted values cancel for its last query, but for about 2**-9 of them.

    So its result is small, its rounding to bfloat16 too, and an error of the weights is seen. Three query heads are
    alike.
    """
    arguments = random_call("v2", [(context, new)], (3, 1), head_dim, (jnp.bfloat16, jnp.bfloat16), 16)
    queries, pages, table = arguments["queries"], arguments["pages"], arguments["index"][1][0]
    queries[:] = queries[:, :1]
    slots = pages.reshape(-1, *pages.shape[2:])  # [slots, key and value, head_dim]
    where = [int(table[position // 16]) * 16 + position % 16 for position in range(context)]
    keys, values = slots[where].astype(np.float64).swapaxes(0, 1)
    logits = keys @ queries[new - 1, 0].astype(np.float64) * head_dim**-0.5
    weights = np.exp(logits - logits.max())
    last = int(weights.argmax())
    values[last] = 0
    slots[where[last], 1] = (-(weights @ values) / weights[last]).astype(pages.dtype)
    return arguments


@needs_library
@each_level
@pytest.mark.parametrize(("context", "new"), [(40, 1), (300, 1), (40, 8), (300, 70)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_compute_dtype_float32_keeps_weights_in_float32(level: str, head_dim: int, context: int, new: int) -> None:
    """Queries and keys of bfloat16 are exact in float32, so nothing is rounded before the result is."""
    arguments = cancelling_call(context, new, head_dim)

    def error(compute_dtype: Any) -> float:
        """Of the last query; what the rounding of the result may take is not counted."""
        expected, found = call_both("v2", arguments, compute_dtype=compute_dtype)
        wanted, got = (each.output[new - 1].astype(np.float64) for each in (expected, found))
        assert np.abs(wanted).max() < 0.02
        return float((np.abs(got - wanted) - np.abs(wanted) * 2**-8).max())

    assert error(jnp.float32) < 3e-6
    assert error(jnp.float16) < 3e-6  # bfloat16 has fewer bits
    if level.endswith("_bf16") and new > 1:  # for one query the products with the values are float32 anyway on vectors
        assert error(jnp.bfloat16) > 2e-5
        assert error(None) > 2e-5


@needs_library
@each_level
@pytest.mark.parametrize("context", [1, 17, 63])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (16, 1)])
@pytest.mark.parametrize(("version", "cache"), [("v3", "bfloat16"), ("v2", "bfloat16"), ("v2", "float8_e5m2")])
def test_an_infinite_value_of_a_last_token_without_a_partner(
    version: Version, cache: str, heads: tuple[int, int], context: int, level: str
) -> None:
    """Values are taken in pairs of tokens; what stands in for the missing one must add nothing, 0 times it included."""
    arguments = random_call(version, [(context, 1)], heads, 64, (jnp.dtype("bfloat16"), jnp.dtype(cache)), 16)
    page, slot = arguments["index"][1][0, (context - 1) // 16], (context - 1) % 16
    if version == "v3":
        arguments["values"][0, :, 5] = np.inf
    else:
        arguments["pages"][page, slot, 1::2, 5] = np.inf
    expected, found = call_both(version, arguments)
    assert np.isposinf(expected.output[0, :, 5]).all()
    np.testing.assert_allclose(found.output.astype(np.float64)[:1], expected.output[:1], rtol=2**-7, atol=2**-6)


@needs_library
@each_level
@pytest.mark.parametrize("cache", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("head_dim", [96, 128])
def test_every_number_of_8_bits_as_a_value(head_dim: int, cache: str, level: str) -> None:
    """One key each, so that an output is its value: every number there is, subnormals, NaN and infinities as well."""
    rows = 6
    arguments = random_call("v2", [(1, 1)] * rows, (3, 1), head_dim, (jnp.dtype("bfloat16"), jnp.dtype(cache)), 4)
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(cache))
    arguments["pages"][arguments["index"][1][:, 0], 0, 1] = np.resize(numbers, (rows, head_dim))
    expected, found = call_both("v2", arguments)
    np.testing.assert_array_equal(found.output.astype(np.float64)[:rows], expected.output[:rows])


@needs_library
@each_level
@pytest.mark.parametrize("cache", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_stored_values_are_rounded_like_numpy(cache: str, level: str) -> None:
    """Ties, subnormals, overflow and NaN of a float32 written into a narrower cache."""
    info = jnp.finfo(cache)
    special = [0.0, -0.0, float(info.max), float(info.tiny), float(info.smallest_subnormal), np.nan, np.inf, -np.inf]
    steps = np.float32(info.smallest_subnormal) * np.arange(-40, 41, dtype=np.float32) / 4
    ties = (1 + np.arange(64, dtype=np.float32) * np.float32(info.eps) / 2) * 2
    values = np.concatenate([np.array(special, np.float32), steps, ties, ties * np.float32(1.0001)])
    values = np.resize(values, (2, 1, 128))
    arguments = random_call("v3", [(2, 2)], (1, 1), 128, (jnp.float32, jnp.dtype(cache)), 4)
    arguments["keys"], arguments["values"] = np.resize(values, (4, 1, 128)), np.resize(values[::-1], (4, 1, 128))
    expected, found = call_both("v3", arguments)
    mine, theirs = found.pages.astype(np.float32), expected.pages.astype(np.float32)
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(np.signbit(mine)[~np.isnan(mine)], np.signbit(theirs)[~np.isnan(theirs)])


def hostile_call(version: Version, seed: int) -> dict[str, Any]:
    """Six sound rows, and about one in ten numbers of the index arrays replaced by an extreme one."""
    random = np.random.default_rng(seed)
    arguments = random_call(version, ROWS, (4, 2), 64, (jnp.float32, jnp.float32), 8)
    extremes = np.array([-(2**31), -1, 0, 1, 7, 63, 2**31 - 1], np.int64)
    for array in (*arguments["index"], arguments["distribution"], arguments["count"]):
        flat = array.reshape(-1)
        spoiled = random.random(flat.size) < 0.1
        flat[spoiled] = random.choice(extremes, int(spoiled.sum()))
    return arguments


HOSTILE_SEEDS = range(30)


@needs_library
@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("seed", HOSTILE_SEEDS)
def test_hostile_metadata(seed: int, version: Version) -> None:
    """Index arrays with anything in them: malformed rows give zeros and write nothing, the others are served."""
    arguments = hostile_call(version, seed)
    expected, found = call_both(version, arguments)
    np.testing.assert_array_equal(bits(found.pages), bits(expected.pages))
    np.testing.assert_allclose(found.output, expected.output, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found.output[np.isneginf(expected.lse)], 0.0)


def test_hostile_metadata_spoils_some_rows_and_leaves_others() -> None:
    """What the test above relies on."""
    served = []
    for seed in HOSTILE_SEEDS:
        arguments = hostile_call("v3", seed)
        expected = next(call_both("v3", arguments))
        served.append(float(np.isfinite(expected.lse).mean()))
        assert (expected.pages != arguments["pages"]).any() == (served[-1] > 0)
    assert 0.2 < np.mean(served) < 0.8
    assert np.sum([0 < share < 0.9 for share in served]) > 10


@needs_library
def test_rows_that_claim_the_same_tokens_are_served_one_after_the_other() -> None:
    """Each writes them, and the output is the last one's, as in the oracle: no thread runs beside another."""
    arguments = random_call("v3", [(400, 300), (9, 1), (350, 199)], (2, 1), 64, (jnp.float32, jnp.float32), 8)
    arguments["index"][2][:] = [0, 300, 50, 249]  # row 1 runs backwards, row 2 lies inside row 0
    expected, found = call_both("v3", arguments)
    np.testing.assert_allclose(found.output, expected.output, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(bits(found.pages), bits(expected.pages))


@needs_library
@pytest.mark.parametrize("shape", [[(3000, 1)], [(900, 1)] * 6, [(700, 300), (1500, 1), (20, 1)]])
def test_repeated_calls_give_the_same_bits(shape: list[tuple[int, int]]) -> None:
    arguments = random_call("v2", shape, (8, 4), 128, (jnp.bfloat16, jnp.bfloat16), 32)
    call = jax.jit(functools.partial(ragged_page_attention_v2, config="cpu_native"))
    arrays = [jnp.array(x) for x in (arguments["queries"], arguments["pages"], *arguments["index"], arguments["count"])]
    first = bits(np.asarray(call(*arrays)))
    for _ in range(8):
        np.testing.assert_array_equal(bits(np.asarray(call(*arrays))), first)
    assert_matches("v2", arguments)


@needs_library
def test_pages_without_donation_keep_their_old_values() -> None:
    arguments = random_call("v3", ROWS, (4, 2), 128, (jnp.float32, jnp.float32), 8)
    pages = jnp.array(arguments["pages"])
    arrays = [jnp.array(arguments[name]) for name in ("queries", "keys", "values")]
    _, updated = jax.jit(functools.partial(ragged_page_attention_v3, config="cpu_native"))(
        *arrays, pages, *map(jnp.array, arguments["index"]), jnp.array(arguments["distribution"])
    )
    np.testing.assert_array_equal(np.asarray(pages), arguments["pages"])
    assert (np.asarray(updated) != arguments["pages"]).any()


@needs_library
def test_donated_pages_stay_where_they_are() -> None:
    """Two steps in a row write into the very buffer that the caller made."""
    batch = build_batch(case_named("mixed"), "v3")
    step = compiled("v3", "cpu_native", batch.case.options)
    pages = jnp.array(batch.pages) + 0
    address = pages.unsafe_buffer_pointer()
    rest: tuple[Any, ...] = (
        jnp.array(batch.queries),
        jnp.array(batch.keys),
        jnp.array(batch.values),
        tuple(jnp.array(a) for a in (batch.context_lens, batch.block_tables, batch.query_start_loc)),
        jnp.array(batch.distribution),
        None if batch.sinks is None else jnp.array(batch.sinks),
        {},
    )
    for _ in range(2):
        _, pages = step(pages, *rest)
        assert pages.unsafe_buffer_pointer() == address


@needs_library
def test_vmap_runs_each_call() -> None:
    arguments = random_call("v2", ROWS, (4, 2), 64, (jnp.float32, jnp.float32), 8)
    queries = jnp.stack([jnp.array(arguments["queries"]), jnp.array(arguments["queries"]) * 2])
    rest = [jnp.array(x) for x in (arguments["pages"], *arguments["index"], arguments["count"])]

    def call(q: jax.Array) -> jax.Array:
        return ragged_page_attention_v2(q, *rest, config="cpu_native")

    both = jax.vmap(call)(queries)
    np.testing.assert_array_equal(np.asarray(both), np.stack([call(queries[0]), call(queries[1])]))


@needs_library
@each_level
def test_a_logsumexp_leaves_the_other_results_as_they_are(level: str) -> None:
    arguments = random_call("v3", ROWS, (6, 2), 64, (jnp.bfloat16, jnp.bfloat16), 8)
    arrays = [arguments[name] for name in ("queries", "keys", "values", "pages")]
    arrays += [*arguments["index"], arguments["distribution"]]
    call = functools.partial(ragged_page_attention_v3, *map(jnp.array, arrays), config="cpu_native")
    alone, with_lse = call(), call(return_lse=True)
    assert (len(alone), len(with_lse)) == (2, 3)
    for one, other in zip(alone, with_lse, strict=False):
        np.testing.assert_array_equal(bits(np.asarray(one)), bits(np.asarray(other)))


@needs_library
def test_what_it_refuses_is_named() -> None:
    arguments = random_call("v2", ROWS, (4, 2), 64, (jnp.float32, jnp.float32), 8)
    with jax.enable_x64(True), pytest.raises(Unsupported, match="cpu_native: float64 queries"):
        ragged_page_attention_v2(
            arguments["queries"].astype(np.float64),
            arguments["pages"],
            *arguments["index"],
            arguments["count"],
            config="cpu_native",
        )
    with pytest.raises(ValueError, match="instruction set: got 'sse9', wanted one of"):
        cpu_native.set_isa("sse9")


@needs_library
def test_many_geometries_reuse_one_process() -> None:
    """Temporary memory that a thread keeps from a large call serves a small one, and the other way round."""
    for (context, new), heads in itertools.product([(5, 1), (900, 200), (40, 40)], [(16, 2), (1, 1)]):
        arguments = random_call("v3", [(context, new)], heads, 64, (jnp.float32, jnp.float32), 16)
        assert_matches("v3", arguments)


def test_cases_cover_the_kernel() -> None:
    """What this file relies on: the shared table has decode, prefill, windows, caps, sinks and 8-bit caches."""
    rows = {row.new == 1 for case in CASES for row in case.rows}
    assert rows == {True, False}
    for option in ("sliding_window", "logits_soft_cap"):
        assert any(option in case.options.given() for case in CASES), option
    assert any(case.sinks for case in CASES)
    assert any(case.cache_dtype and case.cache_dtype.startswith("float8") for case in CASES)
