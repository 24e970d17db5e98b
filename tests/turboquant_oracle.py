"""What TurboQuant caches mean, in float64 NumPy: written from the format, with no code of a kernel or of the host."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin.testing.batches import Batch, Case
from easydel_ragged_plugin.turboquant import TurboQuantConstants, TurboQuantPages


def constants(head_dim: int, signs: int | None = None, seed: int = 0, levels: tuple[int, int] = (8, 16)) -> Any:
    """A random rotation, a random projection, and codebooks for coordinates of about ``head_dim ** -0.5``."""
    random = np.random.default_rng(seed)
    signs = head_dim if signs is None else signs
    rotation = np.linalg.qr(random.standard_normal((head_dim, head_dim)))[0]
    projection = random.standard_normal((signs, head_dim)) / math.sqrt(signs)
    codebooks = (np.sort(random.standard_normal(count)) * head_dim**-0.5 for count in levels)
    return TurboQuantConstants(*(jnp.asarray(each, jnp.float32) for each in (rotation, projection, *codebooks)))


def random_pages(case: Case, num_pages: int, signs: int | None = None, seed: int = 0) -> TurboQuantPages:
    """A cache whose every slot holds random codes and norms."""
    random = np.random.default_rng([7, seed])
    signs = case.head_dim if signs is None else signs
    shape = (num_pages, case.page_size, case.kv_heads)

    def codes(count: int) -> Any:
        return jnp.asarray(random.integers(0, 256, (*shape, count)), jnp.uint8)

    def norms(*rest: int) -> Any:
        return jnp.asarray(random.uniform(0.5, 6.0, (*shape, *rest)), jnp.bfloat16)

    half = case.head_dim // 2
    return TurboQuantPages(
        codes(half), codes(signs // 8), norms(2), codes(half), norms(), constants(case.head_dim, signs, seed)
    )


def bits_of(packed: np.ndarray, width: int) -> np.ndarray:
    """Numbers of ``width`` bits, the first in the lowest bits of each byte."""
    parts = [(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


def expected_output(batch: Batch, pages: TurboQuantPages) -> np.ndarray:
    """Attention of ``batch`` over a cache that is up to date; tokens of no live row are zeros."""
    case = batch.case
    arrays = [np.asarray(array) for array in pages.arrays]
    rotation, projection, *codebooks = (np.asarray(each, np.float64) for each in pages.constants)
    # EasyDeL's keys use half of the indices. One that names no centroid stands for 0.
    key_codebook, value_codebook = (np.pad(each, (0, 16 - len(each))) for each in codebooks)
    group = case.q_heads // case.kv_heads
    correction = math.sqrt(math.pi / 2) / len(projection)
    window, scale = case.window, case.softmax_scale
    output = np.zeros(batch.queries.shape)
    for row in range(int(batch.num_seqs[0])):
        start, end = (int(each) for each in batch.query_start_loc[row : row + 2])
        context = int(batch.context_lens[row])
        for index in range(end - start):
            position = context - (end - start) + index
            first = 0 if window is None else max(0, position - window + 1)
            seen = np.arange(first, position + 1)
            at = (batch.block_tables[row, seen // case.page_size], seen % case.page_size)
            key_codes, sign_codes, key_norms, value_codes, value_norms = (array[at] for array in arrays)
            for head in range(case.q_heads):
                kv = head // group
                query = batch.queries[start + index, head].astype(np.float64)
                centroids = key_codebook[bits_of(key_codes[:, kv], 4)]
                signs = 2.0 * bits_of(sign_codes[:, kv], 1) - 1.0
                norm, rest = key_norms[:, kv].astype(np.float64).T
                logits = norm * (centroids @ (rotation @ query))
                logits = (logits + correction * rest * (signs @ (projection @ query))) * scale
                if case.options.logits_soft_cap is not None:
                    logits = case.options.logits_soft_cap * np.tanh(logits / case.options.logits_soft_cap)
                values = value_norms[:, kv, None].astype(np.float64) * (
                    value_codebook[bits_of(value_codes[:, kv], 4)] @ rotation
                )
                sinks = np.zeros(0)
                if batch.sinks is not None:
                    sinks = np.atleast_1d(batch.sinks[head if batch.sinks.ndim == 1 else kv]).astype(np.float64)
                highest = max(logits.max(initial=-np.inf), sinks.max(initial=-np.inf))
                weights = np.exp(logits - highest)
                output[start + index, head] = weights @ values / (weights.sum() + np.exp(sinks - highest).sum())
    return output


def check_written(batch: Batch, before: TurboQuantPages, after: TurboQuantPages) -> None:
    """New tokens are compressed as the format says, and every other slot keeps its bits.

    A coordinate between two centroids, and a projection of about 0, may have been stored either way.
    """
    case = batch.case
    rotation, projection, *codebooks = (np.asarray(each, np.float64) for each in after.constants)
    for name, old, new in zip(TurboQuantPages._fields, before.arrays, after.arrays, strict=False):
        changed = np.asarray(new)[~batch.written_slots], np.asarray(old)[~batch.written_slots]
        assert changed[0].tobytes() == changed[1].tobytes(), name
    arrays = [np.asarray(array) for array in after.arrays]
    for row in range(int(batch.num_seqs[0])):
        start, end = (int(each) for each in batch.query_start_loc[row : row + 2])
        for token in range(start, end):
            position = int(batch.context_lens[row]) - end + token
            at = (batch.block_tables[row, position // case.page_size], position % case.page_size)
            key_codes, sign_codes, key_norms, value_codes, value_norms = (array[at] for array in arrays)
            for head in range(case.kv_heads):
                key, value = (each[token, head].astype(np.float64) for each in (batch.keys, batch.values))
                rest = nearest_within(rotation @ key / np.linalg.norm(key), key_codes[head], codebooks[0])
                nearest_within(rotation @ value / np.linalg.norm(value), value_codes[head], codebooks[1])
                projected = projection @ rest
                clear = np.abs(projected) > 1e-5
                assert (bits_of(sign_codes[head], 1)[clear] == (projected >= 0)[clear]).all()
                # bfloat16 has 8 bits: half a step up or down.
                norms = [np.linalg.norm(each) for each in (key, rest, value)]
                np.testing.assert_allclose([*key_norms[head], value_norms[head]], norms, rtol=2**-8)


def nearest_within(vector: np.ndarray, packed: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """What the stored indices leave of ``vector``; they must name centroids that are as near as any."""
    rest = vector - codebook[bits_of(packed, 4)]
    least = np.abs(vector[:, None] - codebook).min(axis=1)
    assert (np.abs(rest) <= least + 1e-6).all()
    return rest
