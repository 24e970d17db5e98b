"""8-bit caches: kernels compute with exactly what is stored, storing loses a bounded part, refusals are named."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from easydel_ragged_plugin import Unsupported, explain, ragged_page_attention_v2, ragged_page_attention_v3
from easydel_ragged_plugin.formats import CACHE_DTYPES
from easydel_ragged_plugin.kernels.xla import KERNEL
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import Batch, Case, Row, build_batch, case_named
from easydel_ragged_plugin.testing.compare import assert_close

VERSIONS = ("v2", "v3")
ROWS = (Row(9, 1), Row(0, 0), Row(17, 6), Row(8, 8), Row(32, 1))

# A step of an int8 cache is 1/25 of the size of a key, so that five sizes fit. Floats store the numbers themselves.
STEP = 1 / 25
INT8 = Case("int8", ROWS, cache_dtype="int8", stored_gain=1 / STEP, options=Options(k_scale=STEP, v_scale=STEP))
INT8_CASES = (
    INT8,
    dataclasses.replace(INT8, name="int8-gqa-9-3-head-dim-64", head_dim=64, q_heads=9, kv_heads=3),
    dataclasses.replace(INT8, name="int8-bfloat16", head_dim=128, dtype="bfloat16"),
    dataclasses.replace(
        INT8.with_options(sliding_window=5, logits_soft_cap=3.0), name="int8-options", sinks="heads", table="stale"
    ),
)


@pytest.mark.once
class TestInt8(KernelContract):
    """The portable kernel is the one that takes int8."""

    kernel: ClassVar = KERNEL
    cases: ClassVar = INT8_CASES
    law_case: ClassVar = INT8


def run(batch: Batch, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    options = {**batch.case.options.keywords(), **options}
    index = [jnp.asarray(each) for each in (batch.context_lens, batch.block_tables, batch.query_start_loc)]
    sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)
    if batch.version == "v2":
        queries, pages = jnp.asarray(batch.queries), jnp.asarray(batch.updated_pages)
        output = ragged_page_attention_v2(queries, pages, *index, jnp.asarray(batch.num_seqs), sinks, **options)
        return np.asarray(output), batch.updated_pages
    new = [jnp.asarray(each) for each in (batch.queries, batch.keys, batch.values, batch.pages)]
    output, pages = ragged_page_attention_v3(*new, *index, jnp.asarray(batch.distribution), sinks, **options)
    return np.asarray(output), np.asarray(pages)


def test_int8_cache_rounds_and_saturates() -> None:
    batch = build_batch(INT8, "v3")
    live = np.flatnonzero(batch.live_tokens)
    keys, values = np.zeros_like(batch.keys), np.zeros_like(batch.values)
    keys[live], values[live] = 1000.0, -1000.0
    keys[live, 0], values[live, 0] = 1.5, -2.6  # halves go to the even neighbor, as in IEEE 754
    _, pages = run(dataclasses.replace(batch, keys=keys, values=values))
    written = pages[batch.written_slots].reshape(len(live), -1, 128)[..., : INT8.head_dim]
    assert set(np.unique(written)) == {2, 127, -3, -127}


# What storing loses: half a step of int8, 2**-4 of each number in e4m3 and 2**-3 in e5m2. Keys of size 1 to 3 and
# queries of size 2 make logits of size 2, so the weights move by that share of them, too.
LOSS = {"int8": 0.1, "float8_e4m3fn": 0.25, "float8_e5m2": 0.5, "bfloat16": 0.02}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", LOSS)
def test_what_storing_loses_is_bounded(dtype: str, version: Any) -> None:
    exact = build_batch(Case("loss", ROWS, poison="finite"), version)
    scale = STEP if dtype == "int8" else None
    case = dataclasses.replace(exact.case, cache_dtype=dtype, options=Options(k_scale=scale, v_scale=scale))
    factor = float(np.float32(1 / scale if scale else 1))
    cast = build_batch(dataclasses.replace(case, stored_gain=factor), version)  # same seed: same numbers, scaled
    np.testing.assert_array_equal(cast.block_tables, exact.block_tables)
    output, _ = run(cast)
    expected, _ = exact.expected()
    error = np.abs(output - expected).max()
    assert error < LOSS[dtype]
    assert error > LOSS[dtype] / 20  # otherwise nothing was quantized, or the bound says nothing


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kernel", ["cpu_native", "ejkernel"])
def test_kernels_without_int8_refuse_it_by_name(kernel: str, version: Any) -> None:
    batch = build_batch(INT8, version)
    with pytest.raises(Unsupported, match=r"int8|not installed"):
        run(batch, config=kernel)


def test_int8_goes_to_the_portable_kernel_and_the_reasons_are_told() -> None:
    batch = build_batch(INT8, "v3")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    arrays = (batch.queries, batch.keys, batch.values, batch.pages, *index)
    selection = explain(ragged_page_attention_v3, *arrays, k_scale=0.1, v_scale=0.1)
    assert selection.kernel == "xla"
    assert {"cpu_native", "ejkernel"} <= {refusal.kernel for refusal in selection.refusals}


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_int8_without_a_scale_is_refused(name: str) -> None:
    batch = build_batch(INT8, "v2")
    with pytest.raises(ValueError, match=f"{name}: got None, wanted the size of one step of the int8 cache"):
        run(batch, **{name: None})


@pytest.mark.parametrize("version", VERSIONS)
def test_int8_takes_scales_as_arrays(version: Any) -> None:
    scales = Options(scale_arrays=("k_scale", "v_scale"))
    batch = build_batch(dataclasses.replace(INT8, options=scales), version)
    small: dict[str, Any] = {name: scale * np.float32(STEP) for name, scale in batch.scales.items()}
    batch = dataclasses.replace(batch, **small)
    output, pages = run(batch, **small)
    expected, expected_pages = batch.expected()
    assert_close(output, expected, batch.case)
    assert pages.tobytes() == expected_pages.tobytes()


@pytest.mark.parametrize("version", [pytest.param("v2", marks=pytest.mark.once), "v3"])  # v3 writes and reads
@pytest.mark.parametrize("dtype", [name for name in CACHE_DTYPES if name.startswith("float8")])
def test_every_float_of_eight_bits_is_stored_and_read(dtype: str, version: Any) -> None:
    batch = build_batch(dataclasses.replace(case_named("float8-e5m2"), name="float8", cache_dtype=dtype), version)
    output, pages = run(batch, config="xla")
    expected, expected_pages = batch.expected()
    assert_close(output, expected, batch.case)
    written = pages[batch.written_slots], expected_pages[batch.written_slots]
    assert written[0].tobytes() == written[1].tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, np.uint8, np.int16])
def test_other_integers_are_refused(dtype: Any) -> None:
    batch = build_batch(INT8, "v2")
    spoiled = dataclasses.replace(batch, updated_pages=batch.updated_pages.astype(dtype))
    with pytest.raises(
        ValueError, match=r"kv_pages: got dtype u?int\d+, wanted one that keys can be stored in: .*int8"
    ):
        run(spoiled)
