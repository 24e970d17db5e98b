"""Bad input to the public functions, and what they explain."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import easydel_ragged_plugin
from easydel_ragged_plugin import (
    RaggedPageConfig,
    Unsupported,
    api,
    explain,
    page_shape,
    prepare,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
)
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.kernels.pallas_gpu import PallasGPU
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import build_batch, case_named, spoil_row

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, ROWS, WIDTH, PAGES, PAGE_SIZE = 6, 4, 2, 32, 3, 4, 9, 4

ARRAYS = {
    "queries": jax.ShapeDtypeStruct((TOKENS, Q_HEADS, HEAD_DIM), jnp.float32),
    "keys": jax.ShapeDtypeStruct((TOKENS, KV_HEADS, HEAD_DIM), jnp.float32),
    "values": jax.ShapeDtypeStruct((TOKENS, KV_HEADS, HEAD_DIM), jnp.float32),
    "kv_pages": jax.ShapeDtypeStruct(
        page_shape("v3", PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, np.dtype("f4")), jnp.float32
    ),
    "context_lens": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    "block_tables": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32),
    "query_start_loc": jax.ShapeDtypeStruct((ROWS + 1,), jnp.int32),
    "distribution": jax.ShapeDtypeStruct((3,), jnp.int32),
}


def trace(arrays: dict[str, Any] | None = None, **options: Any) -> Any:
    """Trace v3 with some arrays replaced; nothing runs."""
    call = functools.partial(ragged_page_attention_v3, **options)
    return jax.eval_shape(call, *{**ARRAYS, **(arrays or {})}.values())


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_well_formed_call_traces() -> None:
    output, pages = trace()
    assert output.shape == ARRAYS["queries"].shape
    assert pages.shape == ARRAYS["kv_pages"].shape


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("queries", array(1, TOKENS, Q_HEADS, HEAD_DIM), r"queries: got shape .*wanted \[tokens, q_heads, head_dim\]"),
        ("queries", array(TOKENS, 5, HEAD_DIM), "got 5 heads over 2 kv heads, wanted a multiple"),
        (
            "queries",
            array(TOKENS, Q_HEADS, HEAD_DIM, dtype=jnp.int32),
            "queries: got dtype int32, wanted a float dtype of at least 16 bits",
        ),
        ("queries", array(0, Q_HEADS, HEAD_DIM), "wanted at least one token"),
        ("keys", array(TOKENS + 1, KV_HEADS, HEAD_DIM), "values: got shape"),
        ("kv_pages", array(PAGES, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM), "wanted 5 axes for v3"),
        ("kv_pages", array(PAGES, PAGE_SIZE, 3, 1, 128), r"v3 pages: got shape .*wanted \(9, 4, 4, 1, 128\)"),
        ("kv_pages", array(0, PAGE_SIZE, 4, 1, 128), "wanted at least one page"),
        (
            "kv_pages",
            array(PAGES, PAGE_SIZE, 4, 1, 128, dtype=jnp.int32),
            "kv_pages: got dtype int32, wanted one that keys can be stored in: float64, float32, bfloat16, .*int8",
        ),
        *(
            (
                "kv_pages",
                array(PAGES, PAGE_SIZE, 1, 4, 128, dtype=dtype),
                f"kv_pages: got dtype {np.dtype(dtype).name}, wanted one that keys can be stored in",
            )
            for dtype in (jnp.float8_e8m0fnu, jnp.float4_e2m1fn, jnp.uint8, jnp.complex64)
        ),
        *(
            (
                "queries",
                array(TOKENS, Q_HEADS, HEAD_DIM, dtype=dtype),
                f"queries: got dtype {np.dtype(dtype).name}, wanted a float dtype of at least 16 bits. Cast with",
            )
            for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8)
        ),
        ("keys", None, "keys: got None, wanted those of the new tokens. Pass update_pages=False where the pages have"),
        ("values", None, "values: got None, wanted those of the new tokens"),
        (
            "block_tables",
            array(ROWS, 2**28 + 1, dtype=jnp.int32),
            f"block_tables: got room for {2**30 + 4} tokens in a row, wanted at most {2**30}",
        ),
        ("block_tables", array(2**31, dtype=jnp.int32), f"block_tables: got {2**31} entries"),
        ("kv_pages", array(2**31, PAGE_SIZE, 4, 1, 128), f"kv_pages: got {2**31} pages"),
        ("kv_pages", array(1, 2**30 + 1, 4, 1, 128), f"kv_pages: got {2**30 + 1} tokens in a page"),
        ("kv_pages", array(PAGES, PAGE_SIZE, 1, 4, 128, dtype=jnp.int8), "k_scale and v_scale: got None, wanted the"),
        ("context_lens", array(ROWS, dtype=jnp.float32), "context_lens: got dtype float32, wanted int32"),
        ("context_lens", array(ROWS, 1, dtype=jnp.int32), "wanted an array of rank 1"),
        ("context_lens", array(0, dtype=jnp.int32), "got no rows"),
        ("query_start_loc", array(ROWS, dtype=jnp.int32), r"query_start_loc: got shape \(3,\), wanted \(4,\)"),
        ("block_tables", array(ROWS + 1, WIDTH, dtype=jnp.int32), r"block_tables: got shape \(4, 4\), wanted \[3,"),
        ("block_tables", array(ROWS * WIDTH + 1, dtype=jnp.int32), "block_tables: got shape"),
        ("block_tables", array(ROWS, 0, dtype=jnp.int32), "at least one page"),
        ("distribution", array(2, dtype=jnp.int32), r"distribution: got shape \(2,\), wanted \(3,\)"),
    ],
)
def test_wrong_array_is_refused(name: str, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace({name: wrong})


def test_keys_of_another_batch_are_refused() -> None:
    other = array(TOKENS + 1, KV_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"keys: got shape \(7, 2, 32\), wanted \[6, kv_heads, 32\]"):
        trace({"keys": other, "values": other})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sliding_window", 0, "sliding_window: got 0, wanted an int of at least 1"),
        ("sliding_window", -4, "sliding_window: got -4"),
        ("sliding_window", 2.0, "sliding_window: got 2.0"),
        ("sliding_window", True, "sliding_window: got True"),
        ("sliding_window", (3, 0, 0), "sliding_window: got"),
        ("sliding_window", (-2, 0), "sliding_window: got"),
        ("logits_soft_cap", 0.0, "logits_soft_cap: got 0.0, wanted a number above 0"),
        ("logits_soft_cap", "5", "logits_soft_cap: got '5'"),
        ("softmax_scale", float("nan"), "softmax_scale: got nan"),
        ("softmax_scale", np.ones(2), "softmax_scale: got"),
        ("k_scale", -1.0, "k_scale: got -1.0"),
        ("mask_value", -1.0, "mask_value: got -1.0, wanted None or a number up to -1e"),
        ("vmem_limit_bytes", 0, "vmem_limit_bytes: got 0"),
        ("compute_dtype", jnp.int32, "compute_dtype: got int32, wanted float32"),
        ("compute_dtype", "nonsense", "compute_dtype: got 'nonsense'"),
        ("config", 3, "config: got int, wanted RaggedPageConfig"),
        ("config", "cuda_magic", "kernel 'cuda_magic' is unknown. Known: .*xla"),
        ("in_specs", (), "in_specs: got specs without a mesh"),
    ],
)
def test_wrong_option_is_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(**{option: value})


@pytest.mark.parametrize("mask_value", [None, -1e9, -2.4e38, float("-inf")])
@pytest.mark.parametrize("window", [None, 1, 7, (6, 0), (6, 3), (-1, 0), np.int32(3)])
def test_right_option_is_accepted(window: Any, mask_value: Any) -> None:
    trace(sliding_window=window, mask_value=mask_value)


@pytest.mark.parametrize("shape", [(Q_HEADS + 1,), (3, 2), (KV_HEADS, 0), (1, KV_HEADS, 2)])
def test_wrong_sinks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="softmax_aux: got shape"):
        trace({"softmax_aux": array(*shape)})


TOO_LONG = WIDTH * PAGE_SIZE + 1


def call_with_lengths(version: str, lens: Any, starts: Any, total: int, kernel: str = "xla") -> np.ndarray:
    """The output of a call with this metadata, whose queries, keys and values are ones."""
    ones = {name: np.ones(ARRAYS[name].shape, ARRAYS[name].dtype) for name in ("queries", "keys", "values")}
    tables = np.arange(ROWS * WIDTH, dtype=np.int32).reshape(ROWS, WIDTH)
    if version == "v2":
        pages = np.ones((ROWS * WIDTH, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM), np.float32)
        last = np.array([total], np.int32)
        return np.asarray(ragged_page_attention_v2(ones["queries"], pages, lens, tables, starts, last, config=kernel))
    pages = np.ones(page_shape("v3", ROWS * WIDTH, PAGE_SIZE, KV_HEADS, HEAD_DIM, np.dtype("float32")), np.float32)
    last = np.array([0, 0, total], np.int32)
    output, _ = ragged_page_attention_v3(*ones.values(), pages, lens, tables, starts, last, config=kernel)
    return np.asarray(output)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_block_table_that_cannot_hold_a_context_is_refused(version: str) -> None:
    lens, starts = np.array([3, TOO_LONG, 1], np.int32), np.array([0, 1, 2, 3], np.int32)
    with pytest.raises(ValueError, match="a context of 17 tokens was given, wanted at most 16"):
        call_with_lengths(version, lens, starts, 3)


@pytest.mark.parametrize(
    ("starts", "total", "tokens"),
    [
        pytest.param((0, 1, 1, 3), 3, 3, id="idle row"),
        pytest.param((0, 1, 2, 2), 1, 1, id="dead row"),
        pytest.param((0, 2, 1, 1), 3, 2, id="row that runs backwards"),
    ],
)
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_stale_lengths_of_rows_without_tokens_are_not_judged(
    version: str, starts: tuple[int, ...], total: int, tokens: int
) -> None:
    """NumPy arrays give what JAX's arrays give."""
    lens, starts_loc = np.array([3, TOO_LONG, 5], np.int32), np.array(starts, np.int32)
    output = call_with_lengths(version, lens, starts_loc, total)
    np.testing.assert_array_equal(output, call_with_lengths(version, jnp.array(lens), jnp.array(starts_loc), total))
    assert output[:tokens].all()
    assert not output[tokens:].any()


def test_lengths_are_judged_only_with_the_starts_of_rows() -> None:
    """A length alone does not say whether its row has tokens."""
    lens, starts = np.array([3, TOO_LONG, 1], np.int32), jnp.array([0, 1, 1, 2], jnp.int32)
    assert call_with_lengths("v3", lens, starts, 3)[:2].all()


@pytest.mark.parametrize("count", [[1, 2], []])
def test_num_seqs_is_one_number(count: list[int]) -> None:
    pages = array(PAGES, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM)
    index = [ARRAYS[name] for name in ("context_lens", "block_tables", "query_start_loc")]
    with pytest.raises(ValueError, match=f"num_seqs: got {len(count)} numbers, wanted one"):
        jax.eval_shape(
            functools.partial(ragged_page_attention_v2),
            ARRAYS["queries"],
            pages,
            *index,
            array(len(count), dtype=jnp.int32),
        )


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.ones(3, np.float32), r"got shape \(3,\), wanted \(2,\): one factor for each kv head, or one number"),
        (np.ones((1, 2), np.float32), r"got shape \(1, 2\), wanted \(2,\)"),
        (np.ones(2, np.int32), "got dtype int32, wanted a float dtype"),
        (np.array([1.0, 0.0]), "got 0.0, wanted a number above 0"),
        (np.array([1.0, np.nan]), "got nan, wanted a finite number"),
        (np.array([1.0, 1e39]), "got 1e.39, wanted a magnitude between"),
        ([1.0, 2.0], r"got \[1.0, 2.0\], wanted one Python number"),
    ],
)
def test_wrong_scale_arrays_are_refused(scale: Any, message: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        trace(**{name: scale})


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scale_arrays_are_refused_by_name_where_a_kernel_takes_none(name: str) -> None:
    scales: dict[str, Any] = {name: np.ones(KV_HEADS, np.float32)}
    assert explain(ragged_page_attention_v3, *ARRAYS.values(), **scales).request.options.scale_arrays == (name,)
    with pytest.raises(Unsupported, match=f"^ejkernel: (takes no {name} as an array|ejkernel is not installed)"):
        trace(config="ejkernel", **scales)


def test_a_scale_whose_value_is_known_is_a_number() -> None:
    for scale in (0.5, np.float32(0.5), np.array(0.5), jnp.asarray(0.5)):
        options = explain(ragged_page_attention_v3, *ARRAYS.values(), k_scale=scale).request.options
        assert (options.k_scale, options.scale_arrays) == (0.5, ())
    for shape in ((), (KV_HEADS,)):
        options = explain(ragged_page_attention_v3, *ARRAYS.values(), k_scale=array(*shape)).request.options
        assert (options.k_scale, options.scale_arrays) == (None, ("k_scale",))


@pytest.mark.parametrize(("option", "value"), [("attention_chunk_size", 8), ("update_pages", False)])
def test_ejkernel_refuses_options_by_name(option: str, value: Any) -> None:
    with pytest.raises(Unsupported, match=f"^ejkernel: (takes no {option}|ejkernel is not installed)"):
        trace(config="ejkernel", **{option: value})


def test_only_v3_can_leave_pages_alone() -> None:
    pages = array(PAGES, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM)
    rest = [ARRAYS[name] for name in ("context_lens", "block_tables", "query_start_loc")]
    call: Any = ragged_page_attention_v2
    attend: Any = api.attend
    with pytest.raises(TypeError, match="update_pages"):
        call(ARRAYS["queries"], pages, *rest, 1, update_pages=False)
    with pytest.raises(ValueError, match=r"update_pages: got False for v2, which never writes pages. Leave it out"):
        attend("v2", ARRAYS["queries"], None, None, pages, *rest, 1, None, Options(update_pages=False))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "q_heads", "kv_heads"),
    [
        (jnp.float32, 32, 4, 2),
        (jnp.float32, 64, 4, 2),
        (jnp.bfloat16, 32, 4, 1),
        (jnp.bfloat16, 64, 9, 3),  # the shape has room for 3 or 4, and 4 does not divide 9
        (jnp.float8_e4m3fn, 128, 6, 3),
        (jnp.float8_e4m3fn, 64, 5, 5),
    ],
)
def test_kv_heads_follow_from_the_pages(dtype: Any, head_dim: int, q_heads: int, kv_heads: int) -> None:
    arrays = {
        "queries": array(TOKENS, q_heads, head_dim),
        "keys": None,
        "values": None,
        "kv_pages": array(*page_shape("v3", PAGES, PAGE_SIZE, kv_heads, head_dim, dtype), dtype=dtype),
    }
    call = {**ARRAYS, **arrays}.values()
    assert explain(ragged_page_attention_v3, *call, update_pages=False).request.num_kv_heads == kv_heads


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_keys_tell_kv_heads_where_the_pages_do_not(dtype: Any) -> None:
    arrays = {
        "queries": array(TOKENS, 4, 64),
        "kv_pages": array(*page_shape("v3", PAGES, PAGE_SIZE, 1, 64, dtype), dtype=dtype),
    }
    for nothing in ({"keys": None, "values": None}, {}):
        keys = {"keys": array(TOKENS, 1, 64, dtype=jnp.int32), "values": None}  # only the shape is read
        call = {**ARRAYS, **arrays, **keys, **nothing}.values()
        if not nothing:
            assert explain(ragged_page_attention_v3, *call, update_pages=False).request.num_kv_heads == 1
            continue
        with pytest.raises(ValueError, match=r"keys: got None, and v3 pages of shape .* can have 1 or 2.* kv heads"):
            explain(ragged_page_attention_v3, *call, update_pages=False)


def test_pages_of_no_kv_heads_are_refused() -> None:
    arrays = {"keys": None, "values": None, "kv_pages": array(PAGES, PAGE_SIZE, 3, 1, 128)}
    with pytest.raises(ValueError, match=r"kv_pages: got shape .*, which page_shape gives for no number of kv heads"):
        trace(arrays, update_pages=False)
    arrays = {"keys": None, "values": None, "queries": array(TOKENS, 5, HEAD_DIM)}
    with pytest.raises(ValueError, match="queries: got 5 heads over 2 kv heads, wanted a multiple"):
        trace(arrays, update_pages=False)


def test_tokens_that_an_int32_does_not_count_are_refused() -> None:
    arrays = {"keys": None, "values": None, "queries": array(2**31, Q_HEADS, HEAD_DIM)}
    with pytest.raises(ValueError, match=f"queries: got {2**31} tokens, wanted at most {2**31 - 1}: they are counted"):
        trace(arrays, update_pages=False)


MANY = array(2**20, 2**12, 4, 1, 128)
"""Pages with 2**32 slots."""


def test_slots_that_an_int32_does_not_count() -> None:
    """Reading counts pages and their slots apart. Writing does so in some kernels, and the others say so."""
    with pytest.raises(Unsupported, match=r"^xla: writes to 1048576 pages of 4096 tokens: more than 2147483647 slots"):
        trace({"kv_pages": MANY}, config="xla")
    trace({"kv_pages": MANY}, config="xla", update_pages=False)
    if cpu_native.availability() is None:
        trace({"kv_pages": MANY}, config="cpu_native")
    interpreted = PallasGPU(interpret=True)
    request = explain(
        ragged_page_attention_v3, *{**ARRAYS, "kv_pages": MANY}.values(), config="xla", update_pages=False
    ).request
    writes = dataclasses.replace(request, options=Options())
    assert interpreted.refuses(dataclasses.replace(writes, platform="gpu")) is None


@pytest.mark.parametrize("window", [sys.maxsize, 2**31, 2**64, (sys.maxsize, 0), (2**64, 2**64), 2**31 - 1])
@pytest.mark.parametrize("kernel", ["xla", "cpu_native"])
def test_windows_past_all_positions_trace(kernel: str, window: Any) -> None:
    if kernel == "cpu_native" and cpu_native.availability() is not None:
        pytest.skip(str(cpu_native.availability()))
    trace(sliding_window=window, config=kernel)
    trace(attention_chunk_size=window if isinstance(window, int) else window[0], config=kernel)


def test_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="windowed"):
        trace(windowed=True)


def test_flat_block_table_is_the_same_call() -> None:
    batch = build_batch(case_named("mixed"), "v3")
    arrays = (batch.queries, batch.keys, batch.values, batch.pages, batch.context_lens)
    rest = (batch.query_start_loc, batch.distribution)
    wide, _ = ragged_page_attention_v3(*arrays, batch.block_tables, *rest)
    flat, _ = ragged_page_attention_v3(*arrays, batch.block_tables.reshape(-1), *rest)
    np.testing.assert_array_equal(wide, flat)


def test_explain_names_choice_and_refusals() -> None:
    selection = explain(ragged_page_attention_v3, *ARRAYS.values(), sliding_window=3, config="xla", platform="cpu")
    assert selection.kernel == "xla"
    assert selection.config == RaggedPageConfig(kernel="xla")
    assert selection.request.options.sliding_window == 3
    assert "ejkernel" in {refusal.kernel for refusal in selection.refusals}
    assert all(refusal.reason for refusal in selection.refusals)
    assert "sliding_window=3" in str(selection)


def test_explain_wants_one_of_the_functions() -> None:
    with pytest.raises(ValueError, match=r"explain: got .*wanted ragged_page_attention_v2"):
        explain(page_shape, 1)


PREPARED_OF = [ARRAYS[name] for name in ("queries", "keys", "values", "kv_pages")]


def prepared_for(lens: tuple[int, ...] = (5, 3, 4), **options: Any) -> easydel_ragged_plugin.Prepared:
    """Made of three rows with two tokens each, for the calls of :func:`trace`."""
    index = (jnp.array(lens), ARRAYS["block_tables"], jnp.array([0, 2, 4, 6]), jnp.array([0, 0, 3]))
    return prepare(ragged_page_attention_v3, *PREPARED_OF, *index, **options)


def test_kernels_without_lists_take_what_is_prepared_for_them() -> None:
    prepared = prepared_for(config="xla", sliding_window=3)
    assert (prepared.kernel, prepared.work) == ("xla", None)
    output, _ = trace(prepared=prepared, config="xla", sliding_window=3)
    assert output.shape == ARRAYS["queries"].shape
    with pytest.raises(ValueError, match=r"prepare: got .*wanted ragged_page_attention_v2"):
        prepare(page_shape, 1)


def test_what_is_prepared_for_another_call_is_refused_by_name() -> None:
    prepared = prepared_for(config="xla")
    others: list[tuple[dict[str, Any], str]] = [
        ({"config": "xla", "return_lse": True}, "it is for return_lse False and not True, which this call has"),
        ({"config": "xla", "sliding_window": 3}, "it is for options .* and not sliding_window=3"),
        ({"config": RaggedPageConfig(kernel="xla", num_kv_pages_per_block=2)}, "it is for config "),
        ({"platform": "tpu"}, "it is for kernel xla and not pallas_tpu; "),
    ]
    for options, message in others:
        with pytest.raises(ValueError, match=f"prepared: {message}"):
            trace(prepared=prepared, **options)
    longer = {name: array(TOKENS + 1, *ARRAYS[name].shape[1:]) for name in ("queries", "keys", "values")}
    with pytest.raises(ValueError, match="num_tokens 6 and not 7"):
        trace(longer, prepared=prepared, config="xla")
    with pytest.raises(ValueError, match=r"prepared: got tuple, wanted what easydel_ragged_plugin\.prepare returns"):
        trace(prepared=(1, 2), config="xla")


def test_nothing_is_prepared_where_each_device_has_its_own_rows() -> None:
    mesh = AbstractMesh((3,), ("dp",))
    specs = (None, None, None, PartitionSpec("dp"), None, None, None, None)
    with pytest.raises(Unsupported, match=r"prepare: pages are split over mesh axes \('dp',\)"):
        prepared_for(config="xla", mesh=mesh, in_specs=specs)
    with pytest.raises(Unsupported, match=r"prepared: pages are split over mesh axes .*Leave prepared= out"):
        trace(prepared=prepared_for(config="xla"), config="xla", mesh=mesh, in_specs=specs)


def test_check_reports_other_rows_than_those_prepared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = build_batch(case_named("mixed"), "v2")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)
    prepared = prepare(ragged_page_attention_v2, batch.queries, batch.updated_pages, *index)
    monkeypatch.setenv("EASYDEL_RAGGED_CHECK", "1")
    with caplog.at_level(logging.ERROR, logger="easydel_ragged_plugin"):
        ragged_page_attention_v2(batch.queries, batch.updated_pages, *index, prepared=prepared)
        jax.effects_barrier()
        assert not caplog.records
        other = (batch.context_lens - 1, *index[1:])
        ragged_page_attention_v2(batch.queries, batch.updated_pages, *other, prepared=prepared)
        jax.effects_barrier()
    assert "prepared= was made of context_lens" in caplog.text


def test_named_kernel_raises_instead_of_falling_back() -> None:
    with pytest.raises(Unsupported, match="ejkernel: runs on cpu, gpu, tpu, not on tt"):
        trace(config="ejkernel", platform="tt")


def test_platform_of_a_host_config_keeps_to_its_technology() -> None:
    with pytest.raises(Unsupported, match="the config names platform 'mosaic'"):
        trace(config=RaggedPageConfig(platform="mosaic"))
    assert explain(ragged_page_attention_v3, *ARRAYS.values(), config=RaggedPageConfig(platform="xla")).kernel == "xla"


def test_check_reports_rows_that_are_skipped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    batch = spoil_row(build_batch(case_named("mixed"), "v3"), "page past the cache")
    call = (batch.queries, batch.keys, batch.values, batch.pages)
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    with caplog.at_level(logging.ERROR, logger="easydel_ragged_plugin"):
        ragged_page_attention_v3(*call, *index)
        jax.effects_barrier()
        assert not caplog.records
        monkeypatch.setenv("EASYDEL_RAGGED_CHECK", "1")
        ragged_page_attention_v3(*call, *index)
        jax.effects_barrier()
    (record,) = caplog.records
    assert "row 4" in record.getMessage()
    assert "it needs page 64, the cache has 64" in record.getMessage()


def test_check_is_silent_on_a_healthy_batch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EASYDEL_RAGGED_CHECK", "1")
    batch = build_batch(case_named("window-freed-stale"), "v3")
    call = (batch.queries, batch.keys, batch.values, batch.pages)
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    with caplog.at_level(logging.ERROR, logger="easydel_ragged_plugin"):
        ragged_page_attention_v3(*call, *index, sliding_window=batch.case.options.sliding_window)
        jax.effects_barrier()
    assert not caplog.records


def test_public_names_exist() -> None:
    host_only = {"RaggedPageAttnV2", "RaggedPageAttnV3"}
    for name in set(easydel_ragged_plugin.__all__) - host_only:
        assert getattr(easydel_ragged_plugin, name) is not None
    with pytest.raises(AttributeError, match="its public names are"):
        easydel_ragged_plugin.nonsense  # noqa: B018
