"""TPU without a TPU: what selection chooses there lowers for it.

``jax.export`` runs Pallas' TPU lowering on any machine, which refuses a kernel whose tiling the TPU can't have.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from easydel_ragged_plugin import explain, page_shape, ragged_page_attention_v2, ragged_page_attention_v3

pytestmark = pytest.mark.host

ROWS, WIDTH, PAGES, PAGE_SIZE, TOKENS = 4, 8, 32, 16, 16


def device_mesh(kind: str) -> AbstractMesh:
    from jax._src.mesh import AbstractDevice  # a TPU that is described, not there; JAX has no public name for it

    return AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind=kind, num_cores=1))


@pytest.fixture
def described_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ejkernel asks JAX for the backend and the TPU's generation while it traces: a described device can't answer."""
    import importlib

    monkeypatch.setenv("EJKERNEL_AUTOTUNE_POLICY", "heuristics")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for version in ("v2", "v3"):
        package = f"ejkernel.kernels._pallas.tpu.ragged_page_attention_{version}"
        for module in ("_utils", "_pallas_impl_fwd"):
            try:
                found = importlib.import_module(f"{package}.{module}")
            except ModuleNotFoundError:
                continue
            for name, value in (("get_tpu_version", 6), ("get_device_name", "TPU v6")):
                if hasattr(found, name):
                    monkeypatch.setattr(found, name, lambda *_, value=value: value)


def call(version: str, q_heads: int, kv_heads: int, head_dim: int, dtype: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The function for ``version``, bound to the TPU platform, and the shapes of its arguments."""
    array, index = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = array(page_shape(version, PAGES, PAGE_SIZE, kv_heads, head_dim, np.dtype(dtype)), dtype)
    queries, new = array((TOKENS, q_heads, head_dim), dtype), array((TOKENS, kv_heads, head_dim), dtype)
    rows = [index((ROWS,)), index((ROWS, WIDTH)), index((ROWS + 1,))]
    if version == "v2":
        function = functools.partial(ragged_page_attention_v2, platform="tpu", **options)
        return function, [queries, pages, *rows, index((1,))]
    function = functools.partial(ragged_page_attention_v3, platform="tpu", **options)
    return function, [queries, new, new, pages, *rows, index((3,))]


def lower(version: str, *geometry: Any, kind: str = "TPU v6 lite", **options: Any) -> str:
    function, arguments = call(version, *geometry, **options)
    with jax.sharding.use_abstract_mesh(device_mesh(kind)):
        return jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 8}, {"logits_soft_cap": 30.0}], ids=["plain", "window", "cap"]
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("described_tpu")
def test_v3_lowers_to_the_pallas_kernel(head_dim: int, options: dict[str, Any]) -> None:
    assert "tpu_custom_call" in lower("v3", 8, 2, head_dim, jnp.bfloat16, **options)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.usefixtures("described_tpu")
def test_v2_lowers_to_the_pallas_kernel(head_dim: int) -> None:
    assert "tpu_custom_call" in lower("v2", 8, 2, head_dim, jnp.bfloat16)


@pytest.mark.usefixtures("described_tpu")
def test_v2_with_another_head_dim_lowers_without_pallas() -> None:
    # The host's rule: its v2 TPU kernel tiles 128 and 256 alone.
    assert "tpu_custom_call" not in lower("v2", 8, 2, 64, jnp.bfloat16)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_portable_kernel_lowers(version: str) -> None:
    assert "tpu_custom_call" not in lower(version, 8, 2, 64, jnp.bfloat16, config="xla")


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_tpu_chooses_the_hosts_kernels(version: str) -> None:
    function, arguments = call(version, 8, 2, 128, jnp.bfloat16)
    assert explain(function.func, *arguments, **function.keywords).kernel == "ejkernel"


def test_scales_of_v2_fall_back_by_name() -> None:
    function, arguments = call("v2", 8, 2, 128, jnp.bfloat16, k_scale=2.0)
    selection = explain(function.func, *arguments, **function.keywords)
    assert selection.kernel == "xla"
    assert {refusal.kernel: refusal.reason for refusal in selection.refusals}["ejkernel"] == "v2 takes no k_scale"


def test_wide_heads_cap_the_block() -> None:
    from easydel_ragged_plugin import RaggedPageConfig
    from easydel_ragged_plugin.kernels.ejkernel import host_config

    function, arguments = call("v3", 8, 2, 256, jnp.bfloat16)
    request = explain(function.func, *arguments, **function.keywords).request
    assert host_config(request, RaggedPageConfig()).num_kv_pages_per_block == 8
    assert host_config(request, RaggedPageConfig(num_kv_pages_per_block=16)).num_kv_pages_per_block == 8
    assert host_config(request, RaggedPageConfig(num_kv_pages_per_block=4)).num_kv_pages_per_block == 4
