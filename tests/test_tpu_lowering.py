"""TPU without a TPU: what selection chooses there lowers for it, and so does the host's kernel that is named.

``jax.export`` runs Pallas' TPU lowering on any machine, which refuses a kernel whose tiling the TPU can't have.
"""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from easydel_ragged_plugin import (
    CUSTOM_CALLS,
    Unsupported,
    explain,
    page_shape,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
)
from easydel_ragged_plugin.kernels import ejkernel
from easydel_ragged_plugin.layout import Version

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
CAP: dict[str, Any] = {"logits_soft_cap": 30.0}


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
    monkeypatch.setattr(ejkernel, "tpu_generation", lambda: generation)


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


def export(function: Any) -> Any:
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    return jax.export.export(function, platforms=["tpu"], disabled_checks=allowed)


def lower(version: Version, *geometry: Any, kind: str = V6E, **options: Any) -> str:
    function, arguments = call(version, *geometry, **options)
    with jax.sharding.use_abstract_mesh(device_mesh(kind)):
        return export(jax.jit(function))(*arguments).mlir_module()


def kernels(module: str) -> list[str]:
    """Names of the Pallas kernels that a module calls, in order."""
    found = re.findall(r'@tpu_custom_call\(.*kernel_name = "([^"]+)"', module)
    assert len(found) == module.count("tpu_custom_call"), "a call without a name"
    return found


def bodies(module: str) -> list[str]:
    """The programs of these kernels, encoded."""
    return re.findall(r'@tpu_custom_call\(.*backend_config = "((?:[^"\\]|\\.)*)"', module)


OWN = ["ragged_attention_decode", "ragged_attention_prefill"]


def check_kernels(head_dim: int, module: str) -> None:
    """The host's kernels: one for head_dim 64, and for others one, or one for each kind of row.

    Keys and values share the lanes of a head of 64, so the kernel for 128 would read both as one key.
    """
    wanted = [[r"RPA-blocksize.*"], [rf"RPA-{rows}-blocksize.*" for rows in "dpm"]]
    if head_dim == 64:
        wanted = [[r"RPA-HD_64-.*"]]
    found = kernels(module)
    assert any(len(found) == len(names) and all(map(re.fullmatch, names, found)) for names in wanted), (
        f"kernels with head_dim {head_dim}: {found}"
    )


HOSTS: dict[str, Any] = {"config": "ejkernel"}


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.usefixtures("described_tpu")
def test_lowers_to_the_kernel_of_this_package(version: Version) -> None:
    plain, capped = (lower(version, 8, 2, 128, jnp.bfloat16, **each) for each in ({}, CAP))
    assert kernels(plain) == kernels(capped) == OWN
    assert not set(bodies(plain)) & set(bodies(capped))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("described_tpu")
def test_lowers_to_the_hosts_kernel(head_dim: int) -> None:
    plain, again, capped = (lower("v3", 8, 2, head_dim, jnp.bfloat16, **HOSTS, **each) for each in ({}, {}, CAP))
    for each in (plain, capped):
        check_kernels(head_dim, each)
        assert len(bodies(each)) == len(kernels(each))
    # An option that is dropped would leave the program as it is without.
    assert bodies(plain) == bodies(again)
    assert not set(bodies(plain)) & set(bodies(capped))


@pytest.mark.parametrize("kind", TPUS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, jnp.bfloat16), (128, jnp.float32), (256, jnp.bfloat16)])
@pytest.mark.usefixtures("described_tpu")
def test_lowers_for_each_generation(head_dim: int, dtype: Any, kind: str) -> None:
    assert kernels(lower("v3", 8, 2, head_dim, dtype, kind=kind)) == OWN
    if head_dim != 128 and TPUS[kind][1] < ejkernel.FIRST_WITH_ROOM:
        with pytest.raises(Unsupported, match=NO_ROOM):
            lower("v3", 8, 2, head_dim, dtype, kind=kind, **HOSTS)
    else:
        check_kernels(head_dim, lower("v3", 8, 2, head_dim, dtype, kind=kind, **HOSTS))


@pytest.mark.usefixtures("described_tpu")
def test_other_kernels_are_seen() -> None:
    modules = {head_dim: lower("v3", 8, 2, head_dim, jnp.bfloat16, **HOSTS) for head_dim in (64, 128)}
    portable, own = (lower("v3", 8, 2, 128, jnp.bfloat16, config=each) for each in ("xla", "pallas_tpu"))
    for head_dim in modules:
        for other in (portable, own, *(module for each, module in modules.items() if each != head_dim)):
            with pytest.raises(AssertionError, match=f"kernels with head_dim {head_dim}"):
                check_kernels(head_dim, other)


@pytest.mark.usefixtures("described_tpu")
def test_vmem_limit_reaches_the_kernel() -> None:
    limit = 31_000_064
    for kernel in ("pallas_tpu", "ejkernel"):
        assert str(limit) in lower("v3", 8, 2, 128, jnp.bfloat16, config=kernel, vmem_limit_bytes=limit)
        assert str(limit) not in lower("v3", 8, 2, 128, jnp.bfloat16, config=kernel)


@pytest.mark.usefixtures("described_tpu")
def test_sinks_are_not_dropped() -> None:
    function, arguments = call("v3", 8, 2, 128, jnp.bfloat16, **HOSTS)
    sinks = jax.ShapeDtypeStruct((8,), jnp.float32)
    with jax.sharding.use_abstract_mesh(device_mesh(V6E)):
        exported = export(jax.jit(function))(*arguments, sinks)
        without = export(jax.jit(lambda *arrays: function(*arrays[:-1])))
        dropped = without(*arguments, sinks)
    check_kernels(128, exported.mlir_module())
    # JAX drops arguments that nobody reads.
    assert exported.module_kept_var_idx == tuple(range(len(arguments) + 1))
    assert len(arguments) not in dropped.module_kept_var_idx


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_portable_kernel_lowers(version: Version) -> None:
    assert kernels(lower(version, 8, 2, 64, jnp.bfloat16, config="xla")) == []


UNWRITTEN = "sliding_window: v3 on TPU is wrong with head_dim 64, and leaves slots of new tokens unwritten"
NO_ROOM = "v3 needs more than the 16 MiB of VMEM of a TPU before v6e"


@pytest.mark.parametrize(
    ("geometry", "dtype", "options", "generation", "reason"),
    [
        ((8, 2, 128), jnp.bfloat16, {}, 5, None),
        ((64, 8, 64), jnp.bfloat16, {}, 6, None),
        ((8, 2, 256), jnp.float32, {}, 7, None),
        ((8, 2, 128), jnp.float16, {}, 6, "float16 queries: v3 does not compile for them on TPU"),
        ((8, 2, 128), jnp.bfloat16, {"attention_chunk_size": 64}, 6, "takes no attention_chunk_size"),
        ((8, 2, 128), jnp.bfloat16, {"update_pages": False}, 6, "takes no update_pages"),
        ((8, 2, 128), jnp.bfloat16, {"k_scale": np.ones(2, np.float32)}, 6, "takes no k_scale as an array"),
        ((64, 8, 64), jnp.bfloat16, {"sliding_window": 128}, 6, UNWRITTEN),
        ((8, 2, 128), jnp.bfloat16, {"sliding_window": 128}, 6, UNWRITTEN),
        ((64, 8, 64), jnp.bfloat16, {}, 5, f"head_dim 64 with a bfloat16 cache: {NO_ROOM}"),
        ((8, 2, 256), jnp.bfloat16, {}, 0, f"head_dim 256 with a bfloat16 cache: {NO_ROOM}"),
    ],
)
def test_what_the_hosts_v3_gets_wrong_is_refused(
    geometry: tuple[int, int, int],
    dtype: Any,
    options: dict[str, Any],
    generation: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ejkernel, "tpu_generation", lambda: generation)
    function, arguments = call("v3", *geometry, dtype, **options)
    selection = explain(function.func, *arguments, **function.keywords)
    assert refused(selection).startswith(reason or NOT_IN_ORDER)


NOT_IN_ORDER = "only by name: where its answers are wrong is not known before the call"


def refused(selection: Any) -> str:
    """Why the host's kernel was not chosen. Selection gets along without it on a TPU."""
    wide = selection.request.query_dtype.name == "float16"  # no dtype of a cache that Mosaic has
    readable = selection.request.version == "v3" or selection.request.head_dim % 128 == 0
    assert selection.kernel == ("xla" if wide or not readable else "pallas_tpu")
    return {refusal.kernel: refusal.reason for refusal in selection.refusals}["ejkernel"]


def test_the_hosts_v2_is_refused() -> None:
    for head_dim in (64, 128):
        function, arguments = call("v2", 8, 2, head_dim, jnp.bfloat16)
        selection = explain(function.func, *arguments, **function.keywords)
        assert refused(selection).startswith("v2 on TPU: its kernel needs more VMEM than there is")
    function, arguments = call("v2", 8, 2, 128, jnp.bfloat16, k_scale=2.0)
    assert refused(explain(function.func, *arguments, **function.keywords)) == "v2 takes no k_scale"


@pytest.mark.parametrize(
    ("heads", "dtype", "reason"),
    [
        ((6, 2), jnp.bfloat16, "sinks: v3 on TPU takes an even number of query heads for a kv head, got 3"),
        ((8, 2), jnp.bfloat16, NOT_IN_ORDER),
        ((6, 2), jnp.float32, NOT_IN_ORDER),
    ],
)
def test_the_hosts_sinks_of_an_odd_number_of_heads_are_refused(heads: tuple[int, int], dtype: Any, reason: str) -> None:
    function, arguments = call("v3", heads[0], heads[1], 128, dtype)
    sinks = jax.ShapeDtypeStruct(heads[:1], jnp.float32)
    selection = explain(function.func, *arguments, sinks, **function.keywords)
    assert refused(selection) == reason


@pytest.mark.parametrize(("generation", "pages"), [(5, 2**18), (6, 2**19)])
def test_the_hosts_wide_tables_are_refused(generation: int, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ejkernel, "tpu_generation", lambda: generation)
    no_room = f"which has no room for {4 * pages} bytes"
    for width, reason in ((pages // ROWS, no_room), (pages // ROWS // 2, NOT_IN_ORDER)):
        function, arguments = call("v3", 8, 2, 128, jnp.bfloat16)
        arguments[5] = jax.ShapeDtypeStruct((ROWS, width), jnp.int32)
        selection = explain(function.func, *arguments, **function.keywords)
        assert refused(selection).endswith(reason)


@pytest.mark.parametrize(
    ("kind", "generation"), [("TPU v5 lite", 5), ("TPU v5p", 5), ("TPU v6 lite", 6), ("TPU7x", 7), ("cpu", 0)]
)
def test_generation_of_a_tpu(kind: str, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert ejkernel.tpu_generation() == generation


def test_wide_heads_cap_the_block() -> None:
    from easydel_ragged_plugin import RaggedPageConfig
    from easydel_ragged_plugin.kernels.ejkernel import host_config

    function, arguments = call("v3", 8, 2, 256, jnp.bfloat16)
    request = explain(function.func, *arguments, **function.keywords).request
    assert host_config(request, RaggedPageConfig()).num_kv_pages_per_block == 8
    assert host_config(request, RaggedPageConfig(num_kv_pages_per_block=16)).num_kv_pages_per_block == 8
    assert host_config(request, RaggedPageConfig(num_kv_pages_per_block=4)).num_kv_pages_per_block == 4
