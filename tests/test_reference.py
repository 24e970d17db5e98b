"""The oracle against what can be worked out by hand, and against attention written in one line."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from easydel_ragged_plugin.reference import ragged_page_attention_v2, ragged_page_attention_v3, write_tokens
from easydel_ragged_plugin.testing.batches import Fault
from easydel_ragged_plugin.testing.cases import CASES, FAULTS, Case, build_batch, case_named, spoil_row

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Queries, keys and values."""


def one_row(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, **options: Any) -> np.ndarray:
    """v2 on one request whose tokens are all new, in pages of two tokens in reverse order."""
    tokens, heads, lanes = keys.shape
    table = np.arange(-(-tokens // 2))[::-1].reshape(1, -1)
    pages = np.full((table.size, 2, 2 * heads, lanes), np.nan, np.float32)
    write_tokens(pages, table[0], 0, keys, values)
    return ragged_page_attention_v2(
        queries,
        pages,
        np.array([tokens]),
        table,
        np.array([0, tokens]),
        1,
        options.pop("sinks", None),
        **options,
    )


def dense(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None = None, cap: float | None = None
) -> np.ndarray:
    """Causal attention of one request, with whole matrices."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(a.astype(np.float64), group, axis=1) for a in (keys, values))
    logits = np.einsum("thd,shd->hts", queries.astype(np.float64), keys) / np.sqrt(queries.shape[2])
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    t, s = np.indices(logits.shape[1:])
    hidden = (s > t) | (s <= t - (window or len(queries)))
    weights = np.exp(np.where(hidden, -np.inf, logits))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), values)


@pytest.fixture
def request_arrays() -> Arrays:
    random = np.random.default_rng(7)
    queries, keys, values = (random.standard_normal((7, heads, 8)).astype(np.float32) for heads in (6, 2, 2))
    return queries, keys, values


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_agrees_with_dense_attention(request_arrays: Arrays, window: int | None, cap: float | None) -> None:
    output = one_row(*request_arrays, sliding_window=window, logits_soft_cap=cap)
    np.testing.assert_allclose(output, dense(*request_arrays, window, cap), rtol=1e-12, atol=1e-14)


def test_window_pair_counts_tokens_before_the_query(request_arrays: Arrays) -> None:
    pair = one_row(*request_arrays, sliding_window=(2, 5))
    assert np.array_equal(pair, one_row(*request_arrays, sliding_window=3))


def test_a_sink_takes_its_share_and_gives_nothing() -> None:
    """One key with logit 0 and a sink with logit log 3: the key keeps a quarter of the weight."""
    key = np.zeros((1, 1, 4), np.float32)
    value = np.full((1, 1, 4), 8.0, np.float32)
    query = np.ones((1, 2, 4), np.float32)
    sinks = np.log(np.array([3.0, 1.0]))
    assert np.allclose(one_row(query, key, value, sinks=sinks)[0, :, 0], [2.0, 4.0])
    assert np.allclose(one_row(query, key, value, sinks=np.log([[3.0, 4.0]]))[0, :, 0], [1.0, 1.0])


def test_scales_make_stored_numbers_real(request_arrays: Arrays) -> None:
    query, key, value = request_arrays
    scaled = one_row(query, key, value, k_scale=3.0, v_scale=0.25)
    np.testing.assert_allclose(scaled, one_row(query, key * 3.0, value * 0.25), rtol=1e-6, atol=1e-7)
    k_scale, v_scale = np.array([0.5, 3.0], np.float32), np.array([0.25, 2.0], np.float32)
    real = one_row(query, key * k_scale[:, None], value * v_scale[:, None])
    np.testing.assert_allclose(one_row(query, key, value, k_scale=k_scale, v_scale=v_scale), real, rtol=1e-6, atol=1e-7)


def test_a_step_of_quantized_queries_cancels(request_arrays: Arrays) -> None:
    assert np.array_equal(one_row(*request_arrays, q_scale=0.25), one_row(*request_arrays))


def test_a_chunk_is_attention_over_its_tokens_alone(request_arrays: Arrays) -> None:
    whole = one_row(*request_arrays, attention_chunk_size=3)
    query, key, value = request_arrays
    chunks = [(query[at : at + 3], key[at : at + 3], value[at : at + 3]) for at in (0, 3, 6)]
    parts = [dense(*chunk) for chunk in chunks]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-12, atol=1e-14)
    both = one_row(*request_arrays, attention_chunk_size=3, sliding_window=2)
    parts = [dense(*chunk, window=2) for chunk in chunks]
    np.testing.assert_allclose(both, np.concatenate(parts), rtol=1e-12, atol=1e-14)


def test_sinks_at_the_ends() -> None:
    """-inf is no sink; an infinite one takes all weight, as the largest float32 does."""
    key = np.zeros((1, 1, 4), np.float32)
    value, query = np.full((1, 1, 4), 8.0, np.float32), np.ones((1, 2, 4), np.float32)
    assert np.allclose(one_row(query, key, value, sinks=np.array([-np.inf, np.inf]))[0, :, 0], [8.0, 0.0])
    output, lse = one_row(query, key, value, sinks=np.array([1e39, np.inf]), return_lse=True)
    assert not output.any()
    assert (lse == float(np.finfo(np.float32).max)).all()


def test_pages_as_they_are() -> None:
    """v3 without writing is v3 after it has written; keys may be missing where the pages tell how many heads."""
    batch = build_batch(case_named("mixed"), "v3")
    queries, keys, values = batch.queries, batch.keys, batch.values
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    output, pages = ragged_page_attention_v3(queries, keys, values, batch.pages, *index)
    for given in (keys, None):
        again, same = ragged_page_attention_v3(queries, given, None, pages, *index, update_pages=False)
        assert np.array_equal(again, output)
        assert same.tobytes() == pages.tobytes()
    short = build_batch(case_named("bfloat16-head-dim-64"), "v3")
    index = (short.context_lens, short.block_tables, short.query_start_loc, short.distribution)
    with pytest.raises(ValueError, match=r"keys: got None, and the pages can have \[1, 2\] kv heads. Pass keys"):
        ragged_page_attention_v3(short.queries, None, None, short.pages, *index, update_pages=False)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "places"),
    [
        (8, np.float32, {(0, 0): "k0", (1, 0): "v0", (2, 0): "k1", (3, 0): "v1", (4, 0): "k2", (5, 0): "v2"}),
        (64, np.float32, {(0, 0): "k0", (0, 64): "v0", (1, 0): "k1", (1, 64): "v1", (2, 0): "k2", (2, 64): "v2"}),
        (64, ml_dtypes.bfloat16, {(0, 0): "k0", (0, 64): "v0", (2, 0): "k2", (2, 64): "v2"}),
    ],
)
def test_v3_places(head_dim: int, dtype: type, places: dict[tuple[int, int], str]) -> None:
    """Where v3 keeps each head, and zeros in lanes and heads that hold nothing."""
    stored = 3 if head_dim == 64 else 6
    pack = 4 // np.dtype(dtype).itemsize
    pages: np.ndarray = np.full((2, 4, -(-stored // pack), pack, 128), np.nan, dtype)
    keys = np.ones((1, 3, head_dim)) * np.array([1, 2, 3])[:, None]
    write_tokens(pages, np.array([1]), 2, keys, -keys)
    slot = pages[1, 2].reshape(-1, 128).astype(np.float32)
    for (head, lane), name in places.items():
        wanted = (1 if name[0] == "k" else -1) * (int(name[1]) + 1)
        assert (slot[head, lane : lane + head_dim] == wanted).all()
    assert np.count_nonzero(slot) == 2 * 3 * head_dim
    assert np.isnan(pages.astype(np.float32)).sum() == pages.size - slot.size


def test_float8_saturates() -> None:
    pages = np.zeros((1, 4, 2, 4), ml_dtypes.float8_e4m3fn)
    write_tokens(pages, np.array([0]), 0, np.full((1, 1, 4), 1e6), np.full((1, 1, 4), -1e6))
    assert pages[0, 0, :, 0].astype(float).tolist() == [448.0, -448.0]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_batches_are_well_made(case: Case) -> None:
    """The oracle finds finite values in each live token in spite of the poison, and both ways of writing agree."""
    for version in case.versions:
        batch = build_batch(case, version)
        output, pages = batch.expected()
        assert np.isfinite(output).all()
        assert (np.abs(output[batch.live_tokens]).sum(axis=-1) > 0).all()
        assert not output[~batch.live_tokens].any()
        assert np.array_equal(pages.view(np.uint8), batch.updated_pages.view(np.uint8))
        if case.head_dim == 32 and case.page_size == 4 and case.dtype == "float32":
            assert np.isnan(batch.pages[0].astype(np.float32)).all(), "the null page holds poison"


def test_same_arguments_same_batch() -> None:
    first, second, other = (build_batch(case_named("mixed"), "v3", seed) for seed in (3, 3, 4))
    assert np.array_equal(first.queries, second.queries)
    assert not np.array_equal(first.block_tables, other.block_tables)


@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_rows_give_zeros_and_write_nothing(fault: Fault) -> None:
    batch = spoil_row(build_batch(case_named("mixed"), "v3"), fault)
    output, pages = batch.expected()
    assert not output[~batch.live_tokens].any()
    untouched = np.array_equal(pages.view(np.uint8), batch.updated_pages.view(np.uint8))
    assert not untouched
    assert output[batch.live_tokens].any(axis=(1, 2)).all()


def test_v3_leaves_its_input_alone() -> None:
    batch = build_batch(case_named("mixed"), "v3")
    before = batch.pages.copy()
    ragged_page_attention_v3(
        batch.queries,
        batch.keys,
        batch.values,
        batch.pages,
        batch.context_lens,
        batch.block_tables.reshape(-1),
        batch.query_start_loc,
        batch.distribution,
    )
    assert np.array_equal(before.view(np.uint8), batch.pages.view(np.uint8))
