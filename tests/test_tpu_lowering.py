"""TPU without a TPU: what selection chooses there lowers for it.

``jax.export`` runs Pallas' TPU lowering on any machine, which refuses a kernel whose tiling the TPU can't have.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from easydel_ragged_plugin import explain, page_shape, ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.layout import Version
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import Case, Row, build_batch
from easydel_ragged_plugin.testing.tolerances import tolerance_for

pytestmark = pytest.mark.host

ROWS, WIDTH, PAGES, PAGE_SIZE, TOKENS = 4, 8, 32, 16, 16


def device_mesh(kind: str) -> AbstractMesh:
    from jax_private import described_device

    return AbstractMesh((1,), ("x",), abstract_device=described_device(kind, TPUS[kind][0], "tpu"))


def has_params(request: pytest.FixtureRequest) -> bool:
    return hasattr(request.node, "callspec")


# JAX's name of the device, its cores, and what ejkernel makes of it: v5p, v6e and 7x.
TPUS = {"TPU v5p": (2, 5, "TPU v5"), "TPU v6 lite": (1, 6, "TPU v6"), "TPU7x": (2, 7, "TPU 7")}
V6E = "TPU v6 lite"


@pytest.fixture
def described_tpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """ejkernel asks JAX for the backend and the TPU's generation while it traces: a described device can't answer."""
    import importlib

    _, generation, name_of_it = TPUS[request.node.callspec.params.get("kind", V6E) if has_params(request) else V6E]
    monkeypatch.setenv("EJKERNEL_AUTOTUNE_POLICY", "heuristics")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for version in ("v2", "v3"):
        package = f"ejkernel.kernels._pallas.tpu.ragged_page_attention_{version}"
        for module in ("_utils", "_pallas_impl_fwd"):
            try:
                found = importlib.import_module(f"{package}.{module}")
            except ModuleNotFoundError:
                continue
            for name, value in (("get_tpu_version", generation), ("get_device_name", name_of_it)):
                if hasattr(found, name):
                    monkeypatch.setattr(found, name, lambda *_, value=value: value)


def call(
    version: Version, q_heads: int, kv_heads: int, head_dim: int, dtype: Any, **options: Any
) -> tuple[Any, list[Any]]:
    """The function for ``version``, bound to the TPU platform, and the shapes of its arguments."""
    array, index = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = array(page_shape(version, PAGES, PAGE_SIZE, kv_heads, head_dim, np.dtype(dtype)), dtype)
    queries, new = array((TOKENS, q_heads, head_dim), dtype), array((TOKENS, kv_heads, head_dim), dtype)
    rows = [index((ROWS,)), index((ROWS, WIDTH)), index((ROWS + 1,))]
    function: Any = ragged_page_attention_v2 if version == "v2" else ragged_page_attention_v3
    arrays = [queries, pages] if version == "v2" else [queries, new, new, pages]
    last = index((1 if version == "v2" else 3,))
    return functools.partial(function, platform="tpu", **options), [*arrays, *rows, last]


def lower(version: Version, *geometry: Any, kind: str = V6E, **options: Any) -> str:
    function, arguments = call(version, *geometry, **options)
    with jax.sharding.use_abstract_mesh(device_mesh(kind)):
        return jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()


def kernels(module: str) -> list[str]:
    """Names of the Pallas kernels that a module calls, in order."""
    found = re.findall(r'@tpu_custom_call\(.*kernel_name = "([^"]+)"', module)
    assert len(found) == module.count("tpu_custom_call"), "a call without a name"
    return found


def bodies(module: str) -> list[str]:
    """The programs of these kernels, encoded."""
    return re.findall(r'@tpu_custom_call\(.*backend_config = "((?:[^"\\]|\\.)*)"', module)


def check_kernels(version: str, head_dim: int, module: str) -> None:
    """The host has one kernel for v2, one for v3 with head_dim 64, and for other v3 one, or one for each kind of row.

    Keys and values share the lanes of a head of 64, so the kernel for 128 would read both as one key.
    """
    if version == "v2":
        wanted = [[r"ragged_page_attention_kernel"]]
    elif head_dim == 64:
        wanted = [[r"RPA-HD_64-.*"]]
    else:
        wanted = [[r"RPA-blocksize.*"], [rf"RPA-{rows}-blocksize.*" for rows in "dpm"]]
    found = kernels(module)
    assert any(len(found) == len(names) and all(map(re.fullmatch, names, found)) for names in wanted), (
        f"kernels of {version} with head_dim {head_dim}: {found}"
    )


@pytest.mark.parametrize("options", [{"sliding_window": 8}, {"logits_soft_cap": 30.0}], ids=["window", "cap"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("described_tpu")
def test_v3_lowers_to_the_pallas_kernel(head_dim: int, options: dict[str, Any]) -> None:
    plain, again, module = (lower("v3", 8, 2, head_dim, jnp.bfloat16, **each) for each in ({}, {}, options))
    for each in (plain, module):
        check_kernels("v3", head_dim, each)
        assert len(bodies(each)) == len(kernels(each))
    # An option that is dropped would leave the program as it is without.
    assert bodies(plain) == bodies(again)
    assert not set(bodies(plain)) & set(bodies(module))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.usefixtures("described_tpu")
def test_v2_lowers_to_the_pallas_kernel(head_dim: int) -> None:
    check_kernels("v2", head_dim, lower("v2", 8, 2, head_dim, jnp.bfloat16))


@pytest.mark.parametrize("kind", TPUS)
@pytest.mark.parametrize(
    ("version", "head_dim", "dtype"),
    [
        ("v2", 128, jnp.bfloat16),
        ("v2", 256, jnp.bfloat16),
        ("v3", 64, jnp.bfloat16),
        ("v3", 128, jnp.float32),
        ("v3", 256, jnp.bfloat16),
    ],
)
@pytest.mark.usefixtures("described_tpu")
def test_lowers_for_each_generation(version: Version, head_dim: int, dtype: Any, kind: str) -> None:
    check_kernels(version, head_dim, lower(version, 8, 2, head_dim, dtype, kind=kind))


@pytest.mark.usefixtures("described_tpu")
def test_other_kernels_are_seen() -> None:
    cases: list[tuple[Version, int]] = [("v2", 128), ("v3", 64), ("v3", 128)]
    modules = {case: lower(case[0], 8, 2, case[1], jnp.bfloat16) for case in cases}
    portable = lower("v3", 8, 2, 128, jnp.bfloat16, config="xla")
    for version, head_dim in cases:
        for other in (portable, *(module for case, module in modules.items() if case != (version, head_dim))):
            with pytest.raises(AssertionError, match=f"kernels of {version} with head_dim {head_dim}"):
                check_kernels(version, head_dim, other)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.usefixtures("described_tpu")
def test_vmem_limit_reaches_the_kernel(version: Version) -> None:
    limit = 31_000_064
    assert str(limit) in lower(version, 8, 2, 128, jnp.bfloat16, vmem_limit_bytes=limit)
    assert str(limit) not in lower(version, 8, 2, 128, jnp.bfloat16)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.usefixtures("described_tpu")
def test_sinks_are_not_dropped(version: Version) -> None:
    function, arguments = call(version, 8, 2, 128, jnp.bfloat16)
    sinks = jax.ShapeDtypeStruct((8,), jnp.float32)
    with jax.sharding.use_abstract_mesh(device_mesh(V6E)):
        exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments, sinks)
        without = jax.export.export(jax.jit(lambda *arrays: function(*arrays[:-1])), platforms=["tpu"])
        dropped = without(*arguments, sinks)
    check_kernels(version, 128, exported.mlir_module())
    # JAX drops arguments that nobody reads.
    assert exported.module_kept_var_idx == tuple(range(len(arguments) + 1))
    assert len(arguments) not in dropped.module_kept_var_idx


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 5}, {"logits_soft_cap": 2.0}], ids=["plain", "window", "cap"]
)
@pytest.mark.usefixtures("described_tpu")
def test_numbers_of_v2_in_interpret_mode(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel for TPU computes, step by step on this machine. v3's has no such mode."""
    from jax.experimental import pallas

    real, calls = pallas.pallas_call, []

    def interpreted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return real(*arguments, **{**keywords, "interpret": True})

    monkeypatch.setattr(pallas, "pallas_call", interpreted)
    case = Case(
        "interpreted",
        (Row(9, 1), Row(17, 6), Row(8, 8)),
        head_dim=128,
        page_size=16,
        pages_per_row=2,
        num_pages=8,
        options=Options(**options),
    )
    batch = build_batch(case, "v2", poison="finite")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)
    arrays = [jnp.asarray(each) for each in (batch.queries, batch.updated_pages, *index)]
    output = np.asarray(ragged_page_attention_v2(*arrays, platform="tpu", **case.options.keywords()))
    assert calls
    live, bound = batch.live_tokens, tolerance_for(case)
    np.testing.assert_allclose(output[live], batch.expected()[0][live], rtol=bound.rtol, atol=bound.atol)


@pytest.mark.usefixtures("described_tpu")
def test_v2_with_another_head_dim_lowers_without_pallas() -> None:
    # The host's rule: its v2 TPU kernel tiles 128 and 256 alone.
    assert kernels(lower("v2", 8, 2, 64, jnp.bfloat16)) == []


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_portable_kernel_lowers(version: Version) -> None:
    assert kernels(lower(version, 8, 2, 64, jnp.bfloat16, config="xla")) == []


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_tpu_chooses_the_hosts_kernels(version: Version) -> None:
    function, arguments = call(version, 8, 2, 128, jnp.bfloat16)
    assert explain(function.func, *arguments, **function.keywords).kernel == "ejkernel"


def test_scales_of_v2_fall_back_by_name() -> None:
    function, arguments = call("v2", 8, 2, 128, jnp.bfloat16, k_scale=2.0)
    selection = explain(function.func, *arguments, **function.keywords)
    assert selection.kernel == "xla"
    assert {refusal.kernel: refusal.reason for refusal in selection.refusals}["ejkernel"] == "v2 takes no k_scale"


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (jnp.float16, {}, "float16 queries: v3 does not compile for them on TPU; takes float32 and bfloat16"),
        (jnp.bfloat16, {"attention_chunk_size": 64}, "takes no attention_chunk_size"),
        (jnp.bfloat16, {"update_pages": False}, "takes no update_pages"),
        (jnp.bfloat16, {"k_scale": np.ones(2, np.float32)}, "takes no k_scale as an array"),
    ],
)
def test_what_the_hosts_v3_can_not_do_falls_back_by_name(dtype: Any, options: dict[str, Any], reason: str) -> None:
    function, arguments = call("v3", 8, 2, 128, dtype, **options)
    selection = explain(function.func, *arguments, **function.keywords)
    assert selection.kernel == "xla"
    assert {refusal.kernel: refusal.reason for refusal in selection.refusals}["ejkernel"] == reason


def test_wide_heads_cap_the_block() -> None:
    from easydel_ragged_plugin import RaggedPageConfig
    from easydel_ragged_plugin.kernels.ejkernel import host_config

    function, arguments = call("v3", 8, 2, 256, jnp.bfloat16)
    request = explain(function.func, *arguments, **function.keywords).request
    assert host_config(request, RaggedPageConfig()).num_kv_pages_per_block == 8
    assert host_config(request, RaggedPageConfig(num_kv_pages_per_block=16)).num_kv_pages_per_block == 8
    assert host_config(request, RaggedPageConfig(num_kv_pages_per_block=4)).num_kv_pages_per_block == 4
