"""Run by test_sharding.py with simulated devices: sharded calls of the functions and of the operations.

``python sharded_calls.py functions``, ``... few``, ``... callers`` or ``... operations``. Prints one line for each
call; an assertion ends it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from turboquant_oracle import check_written, expected_results, random_pages

from easydel_ragged_plugin import ragged_page_attention_v2, ragged_page_attention_v3, select
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.layout import Version
from easydel_ragged_plugin.testing.cases import Batch, Case, Row, build_batch, case_named
from easydel_ragged_plugin.testing.compare import assert_close, assert_lse_close
from easydel_ragged_plugin.testing.shards import local_pages
from easydel_ragged_plugin.testing.tolerances import tolerance_for

COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")

# Idle rows inside every shard, rows of all kinds, decode rows after others: what data parallelism makes of a batch.
ROWS = (Row(9, 1), Row(0, 0), Row(17, 6), Row(8, 8), Row(0, 0), Row(30, 1), Row(25, 5))
BASE = Case("sharded", ROWS, num_pages=96, table="stale", decode_first=False)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Heads, how they and the pages are split, and whether heads are expected to be split at all."""

    q_heads: int
    kv_heads: int
    head_dim: int
    tp: int
    dp: int = 1
    dtype: str = "float32"
    sinks: Any = None
    scales: bool = False


VERSIONS: tuple[Version, ...] = ("v2", "v3")
NATIVE, BOTH, ALL = ("cpu_native",), ("cpu_native", "xla"), ("cpu_native", "xla", "ejkernel")

# The last three do not divide: the query heads alone are split, or no heads. The C++ compiles nothing, so it runs all.
GEOMETRIES = (
    (ALL, Geometry(8, 4, 32, tp=2, sinks="heads")),
    (BOTH, Geometry(8, 4, 64, tp=2, sinks="heads", scales=True)),
    (NATIVE, Geometry(8, 4, 32, tp=4, dtype="bfloat16", sinks="groups")),
    (BOTH, Geometry(16, 8, 32, tp=8, sinks="heads")),
    (ALL, Geometry(4, 2, 32, tp=1, dp=2, sinks="heads")),
    (NATIVE, Geometry(4, 2, 64, tp=1, dp=4, dtype="bfloat16")),
    (NATIVE, Geometry(4, 2, 32, tp=1, dp=8)),
    (NATIVE, Geometry(8, 2, 32, tp=2, dp=2, sinks="heads", scales=True)),
    (BOTH, Geometry(8, 4, 32, tp=4, dp=2)),
    (BOTH, Geometry(4, 1, 32, tp=2, sinks="heads")),
    (NATIVE, Geometry(6, 3, 32, tp=2, sinks="heads", scales=True)),
    (NATIVE, Geometry(3, 3, 64, tp=2, dp=2)),
)

# With the JAX of each EasyDeL: what the host's kernel runs, and all that compiles nothing.
FEW_GEOMETRIES = tuple(each for each in GEOMETRIES if each[0] in (ALL, NATIVE))


def available(kernels: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``kernels`` that this environment has; the portable one in place of a missing native library."""
    found = ["xla"] if cpu_native.availability() and "cpu_native" in kernels else []
    for name in kernels:
        if name == "cpu_native" and cpu_native.availability():
            continue
        if name == "ejkernel" and importlib.util.find_spec("ejkernel") is None:
            continue
        found.append(name)
    return tuple(dict.fromkeys(found))


def mesh_of(geometry: Geometry) -> Mesh:
    """A mesh of as many devices as the geometry needs."""
    devices = np.array(jax.devices()[: geometry.tp * geometry.dp]).reshape(geometry.dp, geometry.tp)
    return Mesh(devices, ("dp", "tp"))


def specs_of(batch: Batch, geometry: Geometry) -> tuple[P, P]:
    """Specs of queries and pages, as the host resolves them: heads that do not divide are not split."""
    heads = "tp" if geometry.kv_heads % geometry.tp == 0 else None
    q_heads = "tp" if geometry.q_heads % geometry.tp == 0 else None
    return P(None, q_heads, None), P("dp", None, heads, *[None] * (batch.pages.ndim - 3))


class Called(NamedTuple):
    """What one call gave, and its compiled program."""

    output: np.ndarray
    pages: np.ndarray
    lse: np.ndarray | None
    compiled: Any


def arrays_of(batch: Batch, flat_tables: bool = False) -> tuple[Any, ...]:
    """The positional arguments of the public function, in NumPy."""
    tables = batch.block_tables.reshape(-1) if flat_tables else batch.block_tables
    index = (batch.context_lens, tables, batch.query_start_loc)
    if batch.version == "v2":
        return (batch.queries, batch.updated_pages, *index, batch.num_seqs, batch.sinks)
    return (batch.queries, batch.keys, batch.values, batch.pages, *index, batch.distribution, batch.sinks)


def function_of(version: str, **keywords: Any) -> Any:
    """The public function of this version."""
    function: Any = ragged_page_attention_v2 if version == "v2" else ragged_page_attention_v3
    return functools.partial(function, **keywords)


def check_results(batch: Batch, results: Any) -> None:
    """Output, pages for v3, and the logsumexp where it is there, against the oracle's."""
    output, pages, lse = batch.expected_with_lse()
    assert_close(np.asarray(results[0]), output, batch.case)
    if batch.version == "v3":
        assert np.asarray(results[1]).tobytes() == pages.tobytes()
    if len(results) == (3 if batch.version == "v3" else 2):
        assert_lse_close(np.asarray(results[-1]), lse, batch.case)


def inside_of_shard_map() -> None:
    """The caller splits the heads: ``jax.shard_map`` with its defaults, which follow what varies over the mesh."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    case = dataclasses.replace(BASE, q_heads=8, kv_heads=4, sinks="heads")
    for version in VERSIONS:
        batch = build_batch(case, version)
        heads = P(None, "tp", None)
        pages = P(None, None, "tp", *[None] * (batch.pages.ndim - 3))
        before, cache = ((heads, heads, heads), (pages,)) if version == "v3" else ((heads,), ())
        specs = (*before, pages, P(), P(), P(), P(), P("tp"))
        for kernel in available(BOTH):
            program = jax.shard_map(
                function_of(version, config=kernel, return_lse=True),
                mesh=mesh,
                in_specs=specs,
                out_specs=(heads, *cache, P(None, "tp")),
            )
            check_results(batch, jax.jit(program)(*arrays_of(batch)))
            print(f"ok {version} {kernel}: inside of shard_map")


def strict_settings() -> None:
    """A call over a mesh under settings of JAX that refuse promotion, with 64 bits."""
    geometry = Geometry(8, 4, 32, tp=2, dp=2, sinks="heads")
    case = dataclasses.replace(BASE, q_heads=8, kv_heads=4, sinks="heads")
    for version in VERSIONS:
        batch = local_pages(build_batch(case, version), geometry.dp)
        query_spec, page_spec = specs_of(batch, geometry)
        before = (None, None) if version == "v3" else ()
        specs = (query_spec, *before, page_spec, *[None] * 5)
        for kernel in available(BOTH):
            program = function_of(version, config=kernel, return_lse=True, mesh=mesh_of(geometry), in_specs=specs)
            with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
                results = jax.jit(program)(*arrays_of(batch))
            check_results(batch, results)
            print(f"ok {version} {kernel}: strict settings")


HOW = ("host arrays", "unsharded", "replicated", "sharded", "pages alone sharded")


def placed(array: Any, how: str, mesh: Mesh, spec: P) -> Any:
    """An argument as one of :data:`HOW` has it."""
    if how == "host arrays":
        return array
    if how == "unsharded" or (how.startswith("pages") and array.ndim < 4):
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(mesh, P() if how == "replicated" else spec))


def explicit_meshes() -> None:
    """Meshes whose axes are in the types of arrays: with and without ``mesh=``, wherever the arrays lie."""
    case = dataclasses.replace(BASE, q_heads=8, kv_heads=4, sinks="heads")
    for shape in ((2, 2), (1, 1)):
        mesh = jax.make_mesh(shape, ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
        for version in VERSIONS:
            batch = local_pages(build_batch(case, version), shape[0])
            heads, pages = P(None, "tp", None), P("dp", None, "tp", *[None] * (batch.pages.ndim - 3))
            before = (heads, heads, heads) if version == "v3" else (heads,)
            specs = (*before, pages, P("dp"), P("dp"), P(), P(), P("tp"))
            for kernel in available(BOTH if shape == (2, 2) else ("xla",)):
                for how in HOW if kernel == available(BOTH)[0] else ("replicated", "sharded"):
                    for keywords in ({"mesh": mesh, "in_specs": specs}, {}):
                        flat = bool(keywords) and how == "sharded"
                        arrays = arrays_of(batch, flat_tables=flat)
                        operands = [placed(each, how, mesh, spec) for each, spec in zip(arrays, specs, strict=True)]
                        program = function_of(version, config=kernel, return_lse=True, **keywords)
                        results = (jax.jit(program) if keywords else program)(*operands)
                        check_results(batch, results)
                        if shape != (1, 1) and (keywords or how == "sharded"):
                            assert jax.typeof(results[0]).sharding.spec == heads, jax.typeof(results[0])
                            assert version == "v2" or jax.typeof(results[1]).sharding.spec == pages
                        print(f"ok {version} {kernel}: explicit {shape}, {how}, mesh={'given' if keywords else 'none'}")
    batch = build_batch(case, "v2")
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,))
    other = Mesh(np.array(jax.devices()[:4]), ("tp",), axis_types=(AxisType.Auto,))
    queries = jax.device_put(batch.queries, NamedSharding(mesh, P(None, "tp", None)))
    specs = (P(None, "tp", None), P(None, None, "tp", None), *[None] * 5)
    with pytest.raises(ValueError, match=r"mesh: got axes tp=4 \(Auto\), and arrays .* over axes tp=2 \(Explicit\)"):
        function_of("v2", mesh=other, in_specs=specs)(queries, *arrays_of(batch)[1:])
    print("ok: another mesh than that of the arrays is refused")


def call(batch: Batch, kernel: str, mesh: Mesh | None, geometry: Geometry, return_lse: bool = False) -> Called:
    """Call the public function; on ``mesh`` when there is one."""
    query_spec, page_spec = specs_of(batch, geometry)
    sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)

    def program(pages: Any, queries: Any, keys: Any, values: Any, *index: Any) -> tuple[Any, Any, Any]:
        options: dict[str, Any] = {**batch.case.options.keywords(), "config": kernel, "return_lse": return_lse}
        options |= {name: jnp.asarray(scale) for name, scale in batch.scales.items()}
        if mesh is not None:
            before = (None, None) if batch.version == "v3" else ()
            options |= {"mesh": mesh, "in_specs": (query_spec, *before, page_spec, *[None] * 4)}
        results: Any
        if batch.version == "v3":
            results = ragged_page_attention_v3(queries, keys, values, pages, *index, sinks, **options)
        else:
            results = ragged_page_attention_v2(queries, pages, *index, sinks, **options)
            results = (results[0], pages, results[1]) if return_lse else (results, pages)
        return results if return_lse else (*results, None)

    pages = jnp.asarray(batch.pages if batch.version == "v3" else batch.updated_pages)
    if mesh is not None:
        pages = jax.device_put(pages, NamedSharding(mesh, page_spec))
    last = batch.num_seqs if batch.version == "v2" else batch.distribution
    arguments = (batch.queries, batch.keys, batch.values, batch.context_lens, batch.block_tables, batch.query_start_loc)
    compiled = jax.jit(program, donate_argnums=0).lower(pages, *arguments, last).compile()
    output, new_pages, lse = compiled(pages, *arguments, last)
    if mesh is not None:
        assert new_pages.sharding.is_equivalent_to(NamedSharding(mesh, page_spec), new_pages.ndim)
    return Called(np.asarray(output), np.asarray(new_pages), None if lse is None else np.asarray(lse), compiled)


def check_collectives(compiled: Any, geometry: Geometry, batch: Batch, return_lse: bool = False) -> str:
    """Heads alone: no collective at all. Data-parallel pages: the sum over the output, for the logsumexp the maximum,
    and nothing else."""
    found = [match.groups() for match in map(COLLECTIVE.search, compiled.as_text().splitlines()) if match]
    if geometry.dp == 1:
        assert not found, found
        return "no collectives"
    tokens, q_heads, head_dim = batch.queries.shape
    split = geometry.q_heads % geometry.tp == 0 and (geometry.kv_heads % geometry.tp == 0 or geometry.kv_heads == 1)
    heads = q_heads // (geometry.tp if split else 1)
    wanted = [f"[{tokens},{heads},{head_dim}]", *([f"[{tokens},{heads}]"] if return_lse else [])]
    assert all(kind == "all-reduce" for _, kind in found), found
    assert len(found) == len(wanted), found
    assert all(any(shape in result for result, _ in found) for shape in wanted), found
    return f"one all-reduce of {'each result' if return_lse else 'the output'}"


def sharded_and_not(geometries: tuple[tuple[tuple[str, ...], Geometry], ...]) -> None:
    """Calls on a mesh and without one: both are the oracle's, and one is the other's."""
    for version in VERSIONS:
        for kernels, geometry in geometries:
            names = ("q_heads", "kv_heads", "head_dim", "dtype", "sinks")
            case = dataclasses.replace(BASE, **{name: getattr(geometry, name) for name in names})
            case = case.with_options(scale_arrays=("k_scale", "v_scale") if geometry.scales else ())
            for kernel in available(kernels):
                # The host's kernel can't stand NaN in a slot that it reads and masks.
                batch = build_batch(case, version, poison="finite" if kernel == "ejkernel" else "nan")
                batch = local_pages(batch, geometry.dp)
                mesh = mesh_of(geometry)
                one, many = call(batch, kernel, None, geometry), call(batch, kernel, mesh, geometry)
                bound = tolerance_for(case)
                np.testing.assert_allclose(
                    one.output.astype(np.float64), batch.expected()[0], rtol=bound.rtol, atol=bound.atol
                )
                np.testing.assert_allclose(
                    many.output.astype(np.float64), one.output.astype(np.float64), rtol=bound.rtol, atol=bound.atol
                )
                exact = one.output.tobytes() == many.output.tobytes()
                # XLA may part its products by their shape; the C++ adds up each head's short context in one order.
                assert exact or kernel != "cpu_native"
                assert many.pages.tobytes() == one.pages.tobytes()
                how = check_collectives(many.compiled, geometry, batch)
                print(f"ok {version} {kernel} {geometry}: {how}, {'bit for bit' if exact else 'within tolerance'}")


def pages_as_they_are() -> None:
    """v3 that does not write: the pages come back as they were split, with their bits."""
    for geometry in (Geometry(8, 4, 32, tp=2), Geometry(4, 2, 32, tp=1, dp=2), Geometry(4, 1, 32, tp=2)):
        names = ("q_heads", "kv_heads", "head_dim")
        case = dataclasses.replace(BASE, **{name: getattr(geometry, name) for name in names})
        batch = local_pages(build_batch(case.with_options(update_pages=False), "v3"), geometry.dp)
        for kernel in available(BOTH):
            many = call(batch, kernel, mesh_of(geometry), geometry)
            assert_close(many.output, batch.expected()[0], case)
            assert many.pages.tobytes() == batch.pages.tobytes()
            how = check_collectives(many.compiled, geometry, batch)
            print(f"ok v3 {kernel} {geometry} over pages as they are: {how}")


HEADS_AND_PAGES = Geometry(8, 2, 32, tp=2, dp=2)

# Split heads with their sinks, split pages, both, and query heads over one kv head.
WITH_LSE = (
    Geometry(8, 4, 32, tp=2, sinks="heads"),
    Geometry(4, 2, 32, tp=1, dp=2, sinks="heads"),
    HEADS_AND_PAGES,
    Geometry(4, 1, 32, tp=2, sinks="groups"),
)


def logsumexp(geometries: tuple[Geometry, ...]) -> None:
    """It is split over heads as the output is, and over pages each token's is that of the shard that has its row."""
    for version in VERSIONS:
        for geometry in geometries:
            names = ("q_heads", "kv_heads", "head_dim", "sinks")
            case = dataclasses.replace(BASE, **{name: getattr(geometry, name) for name in names})
            batch = local_pages(build_batch(case, version), geometry.dp)
            output, _, lse = batch.expected_with_lse()
            for kernel in available(BOTH):
                if "lse" not in select.BUILT_IN[kernel].features.results:
                    continue
                one, many = (call(batch, kernel, mesh, geometry, True) for mesh in (None, mesh_of(geometry)))
                for got in (one, many):
                    assert got.lse is not None
                    assert_close(got.output, output, case)
                    assert_lse_close(got.lse, lse, case)
                if kernel == "cpu_native":
                    np.testing.assert_array_equal(one.lse, many.lse)
                how = check_collectives(many.compiled, geometry, batch, True)
                print(f"ok {version} {kernel} {geometry} with logsumexp: {how}")


def gathered_pages_are_seen() -> None:
    """The check above can fail: a kv head that the cache has cut into its keys and its values needs a gather."""
    geometry = Geometry(4, 1, 32, tp=2)
    batch = build_batch(dataclasses.replace(BASE, q_heads=4, kv_heads=1), "v2")
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("dp", "tp"))
    cut = P(None, None, "tp", None)
    pages = jax.device_put(jnp.asarray(batch.updated_pages), NamedSharding(mesh, cut))
    specs = (P(None, "tp", None), cut, None, None, None, None)
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)

    def program(queries: Any, pages: Any, *index: Any) -> Any:
        return ragged_page_attention_v2(queries, pages, *index, mesh=mesh, in_specs=specs)

    compiled = jax.jit(program).lower(batch.queries, pages, *index).compile()
    np.testing.assert_allclose(compiled(batch.queries, pages, *index), batch.expected()[0], rtol=2e-5, atol=2e-5)
    with pytest.raises(AssertionError, match="all-gather"):
        check_collectives(compiled, geometry, batch)
    print("ok a gather of pages is seen")


TURBOQUANT = (Geometry(8, 4, 32, tp=2, sinks="heads"), Geometry(4, 2, 32, tp=1, dp=2), HEADS_AND_PAGES)


def over_codes() -> tuple[str, ...]:
    """The kernels that read TurboQuant caches here."""
    return ("turboquant",) if cpu_native.availability() else ("turboquant", "cpu_native")


def turboquant(geometries: tuple[Geometry, ...], kernel: str) -> None:
    """The five arrays of a TurboQuant cache are split as pages are; the constants are on every device."""
    for geometry in geometries:
        names = ("q_heads", "kv_heads", "head_dim", "sinks")
        case = dataclasses.replace(BASE, **{name: getattr(geometry, name) for name in names})
        batch = local_pages(build_batch(case, "v3"), geometry.dp)
        pages = random_pages(case, len(batch.pages))
        sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)
        index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
        mesh = mesh_of(geometry)
        specs = (P(None, "tp", None), None, None, P("dp", None, "tp", None), *[None] * 4)

        def program(pages: Any, queries: Any, keys: Any, values: Any, *index: Any, options: Any, sinks: Any) -> Any:
            return ragged_page_attention_v3(
                queries, keys, values, pages, *index, sinks, return_lse=True, config=kernel, **options
            )

        arguments = (batch.queries, batch.keys, batch.values, *index)
        one, after, one_lse = jax.jit(functools.partial(program, options={}, sinks=sinks))(pages, *arguments)
        output, lse = expected_results(batch, after)
        assert_close(np.asarray(one), output, case)
        assert_lse_close(np.asarray(one_lse), lse, case)
        check_written(batch, pages, after)
        split = pages.with_arrays(
            jax.device_put(a, NamedSharding(mesh, P("dp", None, "tp", *[None] * (a.ndim - 3)))) for a in pages.arrays
        )
        split = split._replace(constants=jax.device_put(pages.constants, NamedSharding(mesh, P())))
        options = {"mesh": mesh, "in_specs": specs}
        jitted = jax.jit(functools.partial(program, options=options, sinks=sinks), donate_argnums=0)
        compiled = jitted.lower(split, *arguments).compile()
        many, new, many_lse = compiled(split, *arguments)
        np.testing.assert_allclose(many, one, rtol=2e-5, atol=2e-5)
        assert_lse_close(np.asarray(many_lse), lse, case)
        for array, wanted in zip(new.arrays, after.arrays, strict=True):
            assert np.asarray(array).tobytes() == np.asarray(wanted).tobytes()
        print(f"ok TurboQuant {kernel} {geometry}: {check_collectives(compiled, geometry, batch, True)}")


# What the host's caches are like on a mesh: heads that divide, heads that the host cuts, pages per shard.
OPERATION_CASES = (
    ("mixed", {"tp": 2}),
    ("sinks", {"tp": 2}),
    ("all-options", {"tp": 2}),
    ("head-dim-64", {"tp": 2}),
    ("bfloat16", {"tp": 2}),
    ("float8-e4m3", {"tp": 2}),
    ("mqa", {"tp": 2}),
    ("mha-5-heads", {"tp": 2}),
    ("gqa-9-3-head-dim-64", {"tp": 2}),
    ("mixed", {"tp": 4}),
    ("empty-rows", {"dp": 2}),
    ("sinks", {"dp": 4}),
    ("all-options", {"dp": 2, "tp": 2}),
)


def operations() -> None:
    from easydel_ragged_plugin import operations as ours
    from easydel_ragged_plugin.testing.driver import Driver

    for name, axes in OPERATION_CASES:
        case = case_named(name)
        served: dict[Version, type] = {"v2": ours.RaggedPageAttnV2, "v3": ours.RaggedPageAttnV3}
        for version, operation in served.items():
            driver = Driver(operation, axes)
            batch = local_pages(build_batch(case, version), axes.get("dp", 1))
            if driver.host.data_parallel_axis is None and batch.pages.shape[2] % axes.get("tp", 1):
                # 0.2.0.2 splits heads whether they divide or not, and fails when it makes the cache.
                with pytest.raises(ValueError, match="should be divisible"):
                    driver.view(batch, batch.pages)
                print(f"ok {version} {name} {axes}: the host can't make the cache")
                continue
            outcome = driver.call(batch)
            expected, pages = batch.expected()
            bound = tolerance_for(case)
            np.testing.assert_allclose(
                outcome.output.astype(np.float64), expected, rtol=bound.rtol, atol=bound.atol, err_msg=f"{name} {axes}"
            )
            assert outcome.pages.tobytes() == pages.tobytes(), (name, version, axes)
            print(f"ok {version} {name} {axes}")


def main(what: str) -> None:
    assert len(jax.devices()) == 8, jax.devices()
    if what == "functions":
        sharded_and_not(GEOMETRIES)
        pages_as_they_are()
        logsumexp(WITH_LSE)
        for kernel in over_codes():
            turboquant(TURBOQUANT, kernel)
        gathered_pages_are_seen()
    elif what == "few":
        sharded_and_not(FEW_GEOMETRIES)
        logsumexp((HEADS_AND_PAGES,))
        for kernel in over_codes():
            turboquant((HEADS_AND_PAGES,), kernel)
        gathered_pages_are_seen()
    elif what == "callers":
        inside_of_shard_map()
        strict_settings()
        explicit_meshes()
    else:
        operations()
    print("all sharded calls agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
