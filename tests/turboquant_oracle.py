"""What TurboQuant caches mean, in float64 NumPy: written from the format, with no code of a kernel or of the host."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.layout import PageLayout
from easydel_ragged_plugin.testing.batches import Batch, Case
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver, KernelOutcome
from easydel_ragged_plugin.turboquant import ARRAYS, TurboQuantConstants, TurboQuantPages

Arrays = tuple[np.ndarray, ...]


def constants(
    head_dim: int, signs: int | None = None, seed: int = 0, levels: tuple[int, int] = (8, 16)
) -> TurboQuantConstants:
    """A random rotation, a random projection, and codebooks, sorted, for coordinates of about ``head_dim ** -0.5``."""
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


def pack(numbers: np.ndarray, width: int) -> np.ndarray:
    """Bytes of numbers of ``width`` bits, the first in the lowest bits of each byte."""
    count = 8 // width
    parts = numbers.astype(np.uint8).reshape(*numbers.shape[:-1], numbers.shape[-1] // count, count)
    return np.asarray(np.sum(parts << np.arange(0, 8, width, dtype=np.uint8), axis=-1, dtype=np.uint8))


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """The numbers of :func:`pack`."""
    parts = [(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * len(parts))


def compress(keys: np.ndarray, values: np.ndarray, made: TurboQuantConstants, stored: Arrays | None = None) -> Arrays:
    """The five arrays of keys and values ``[..., kv_heads, head_dim]``; norms are float64, not rounded.

    A coordinate between two centroids, and a projection of about 0, may be stored either way, and norms are rounded to
    8 bits: where what is ``stored`` is as right, it is the result.
    """
    rotation, projection, *codebooks = (np.asarray(each, np.float64) for each in made)

    def rotated(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors = vectors.astype(np.float64)
        norms = np.linalg.norm(vectors, axis=-1)
        with np.errstate(invalid="ignore"):  # a vector may hold an infinity or NaN
            return norms, vectors / np.maximum(norms, 1e-8)[..., None] @ rotation.T

    def nearest(vectors: np.ndarray, codebook: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Packed indices, and what the codebook leaves."""
        indices = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, vectors)
        if stored is not None:
            given = unpack(stored[ARRAYS.index(name)], 4)
            distance = np.abs(vectors - np.pad(codebook, (0, 16 - len(codebook)), constant_values=np.inf)[given])
            indices = np.where(distance <= np.abs(vectors - codebook[indices]) + 1e-6, given, indices)
        return pack(indices, 4), vectors - codebook[indices]

    def rounded(norms: np.ndarray, name: str) -> np.ndarray:
        if stored is None:
            return norms
        given = stored[ARRAYS.index(name)].astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.where(np.abs(given - norms) <= 2**-8 * norms, given, norms)

    norms, directions = rotated(keys)
    key_indices, rest = nearest(directions, codebooks[0], "key_indices")
    projected = rest @ projection.T
    signs = projected >= 0
    if stored is not None:
        signs = np.where(np.abs(projected) > 1e-5, signs, unpack(stored[ARRAYS.index("key_signs")], 1))
    value_norms, directions = rotated(values)
    value_indices, _ = nearest(directions, codebooks[1], "value_indices")
    key_norms = rounded(np.stack([norms, np.linalg.norm(rest, axis=-1)], axis=-1), "key_norms")
    return key_indices, pack(signs, 1), key_norms, value_indices, rounded(value_norms, "value_norms")


def expected_pages(batch: Batch, before: TurboQuantPages, after: TurboQuantPages | None = None) -> TurboQuantPages:
    """``before`` with the new tokens of live rows; each in the form that ``after`` has where that is as right."""
    tokens, pages, slots = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0, int)]
    size, total = batch.case.page_size, int(batch.num_seqs[0])
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, total, batch.case.options)
    for row, start, count, context in reference._live_rows(len(batch.queries), len(batch.pages), size, *index):
        position = np.arange(context - count, context)
        tokens.append(np.arange(start, start + count))
        pages.append(batch.block_tables[row, position // size])
        slots.append(position % size)
    token, at = np.concatenate(tokens), (np.concatenate(pages), np.concatenate(slots))
    stored = None if after is None else tuple(np.asarray(each)[at] for each in after.arrays)
    arrays = [np.array(each) for each in before.arrays]
    new = compress(batch.keys[token], batch.values[token], before.constants, stored)
    for array, each in zip(arrays, new, strict=True):
        array[at] = each
    return before.with_arrays(arrays)


def check_written(batch: Batch, before: TurboQuantPages, after: TurboQuantPages) -> None:
    """New tokens are compressed as the format says, and every other slot keeps its bits."""
    wanted = expected_pages(batch, before, after)
    for name, got, right in zip(ARRAYS, after.arrays, wanted.arrays, strict=True):
        bits = (np.ascontiguousarray(each).view(np.uint8).reshape(*after.shape[:2], -1) for each in (got, right))
        wrong = np.not_equal(*bits).any(axis=-1)
        assert not wrong.any(), f"{name}: wrong bytes in (page, slot) {np.argwhere(wrong)[:8].tolist()}"


def decode(pages: TurboQuantPages) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values that codes stand for, ``[pages, page_size, kv_heads, head_dim]``.

    Both terms of a logit are linear in the query, so a key is the vector whose product with a query they are.
    """
    rotation, projection, *codebooks = (np.asarray(each, np.float64) for each in pages.constants)
    # EasyDeL's keys use half of the indices. One that names no centroid stands for 0.
    key_codebook, value_codebook = (np.pad(each, (0, 16 - len(each))) for each in codebooks)
    key_indices, signs, key_norms, value_indices, value_norms = (np.asarray(each) for each in pages.arrays)
    norms, rest = np.moveaxis(key_norms.astype(np.float64), -1, 0)[..., None]
    keys = norms * (key_codebook[unpack(key_indices, 4)] @ rotation)
    keys += math.sqrt(math.pi / 2) / len(projection) * rest * ((2.0 * unpack(signs, 1) - 1.0) @ projection)
    values = value_norms[..., None].astype(np.float64) * (value_codebook[unpack(value_indices, 4)] @ rotation)
    return keys, values


def expected_results(batch: Batch, pages: TurboQuantPages) -> tuple[np.ndarray, np.ndarray]:
    """Output and logsumexp of ``batch`` over a cache that is up to date."""
    keys, values = decode(pages)
    numbers = np.stack([keys, values], axis=3).reshape(*keys.shape[:2], -1, keys.shape[-1])
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs, batch.sinks)
    output, lse = reference.ragged_page_attention_v2(
        batch.queries, numbers, *index, options=batch.case.options, return_lse=True
    )
    return output, lse


def expected_output(batch: Batch, pages: TurboQuantPages) -> np.ndarray:
    """Output of ``batch`` over a cache that is up to date; tokens of no live row are zeros."""
    return expected_results(batch, pages)[0]


class TurboQuantDriver(KernelDriver):
    """Gives a kernel the pages of a batch as a TurboQuant cache, compressed slot by slot.

    Between calls a cache is an array ``[pages, page_size]`` of records that hold the five arrays of a slot.
    """

    def cache_of(self, batch: Batch, pages: np.ndarray) -> TurboQuantPages:
        case = batch.case
        if pages.dtype.names is None:
            stride = PageLayout.of(self.version, pages.shape, case.kv_heads, case.head_dim, pages.dtype)
            heads = pages.reshape(*pages.shape[:2], -1)[..., : case.kv_heads * stride.head_stride]
            heads = heads.reshape(*pages.shape[:2], case.kv_heads, stride.head_stride)
            keys, values = (heads[..., first : first + case.head_dim] for first in (0, stride.value_offset))
            arrays = compress(keys, values, constants(case.head_dim))
        else:
            arrays = tuple(pages[name] for name in ARRAYS)
        cast = {
            name: jnp.asarray(each, None if each.dtype == np.uint8 else jnp.bfloat16)
            for name, each in zip(ARRAYS, arrays, strict=True)
        }
        return TurboQuantPages(**cast, constants=constants(case.head_dim))

    def pages_of(self, cache: TurboQuantPages) -> np.ndarray:
        arrays = {name: np.asarray(getattr(cache, name)) for name in ARRAYS}
        fields = [(name, each.dtype, each.shape[2:]) for name, each in arrays.items()]
        records = np.empty(cache.shape[:2], fields)
        for name, each in arrays.items():
            records[name] = each
        return records

    def with_new_tokens(self, batch: Batch, pages: np.ndarray) -> np.ndarray:
        return self.pages_of(expected_pages(batch, self.cache_of(batch, pages)))

    def expected_with_lse(self, batch: Batch, outcome: KernelOutcome) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Over the codes that the kernel has stored, so compression is no excuse: the bounds are those of any cache."""
        after = self.cache_of(batch, outcome.pages)
        if self.version == "v2":
            pages = self.cache_of(batch, batch.updated_pages)
        elif not batch.case.options.update_pages:
            pages = self.cache_of(batch, batch.pages)
        else:
            pages = expected_pages(batch, self.cache_of(batch, batch.pages), after)
        output, lse = expected_results(batch, after)
        return output, self.pages_of(pages), lse
