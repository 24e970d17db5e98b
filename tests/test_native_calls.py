"""The native library refuses arrays that do not fit together: a program from elsewhere may hand it any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_library import needs_library
from turboquant_oracle import random_pages

from easydel_ragged_plugin import page_shape, ragged_page_attention_v3
from easydel_ragged_plugin.testing.cases import CASES

pytestmark = [pytest.mark.once, needs_library]

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 3, 4, 2, 64, 16
CASE = dataclasses.replace(CASES[0], q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE)
INDEX = (
    jnp.array([9, 20], jnp.int32),
    jnp.array([[0, 1], [2, 3]], jnp.int32),
    jnp.array([0, 1, 3], jnp.int32),
    jnp.array([0, 0, 2], jnp.int32),
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the library, which can be made again with other arrays."""

    target: str
    results: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]
    arrays: tuple[jax.Array, ...]
    attributes: dict[str, Any]

    def make(self) -> list[np.ndarray]:
        call = jax.ffi.ffi_call(self.target, self.results, input_output_aliases=self.aliases)
        return [np.asarray(each) for each in call(*self.arrays, **self.attributes)]

    def having(self, place: int, array: jax.Array) -> Call:
        """With another array, and with its type for the result that it is aliased to."""
        results = list(self.results)
        if place in self.aliases:
            results[self.aliases[place]] = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return dataclasses.replace(
            self, results=results, arrays=(*self.arrays[:place], array, *self.arrays[place + 1 :])
        )

    def without_last(self) -> Call:
        return dataclasses.replace(self, arrays=self.arrays[:-1])

    def with_attribute(self, name: str, more: int) -> Call:
        changed = type(self.attributes[name])(self.attributes[name] + more)
        return dataclasses.replace(self, attributes={**self.attributes, name: changed})

    def without_aliases(self) -> Call:
        return dataclasses.replace(self, aliases={})


def made(cache: str) -> Call:
    """The call that the public function makes."""
    seen = []
    ffi_call = jax.ffi.ffi_call

    def recorded(target: str, results: Any, *, input_output_aliases: Any, **options: Any) -> Any:
        call = ffi_call(target, results, input_output_aliases=input_output_aliases, **options)

        def run(*arrays: jax.Array, **attributes: Any) -> Any:
            types = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in results]
            seen.append(Call(target, types, dict(input_output_aliases), arrays, attributes))
            return call(*arrays, **attributes)

        return run

    pages: Any = jnp.zeros(page_shape("v3", 4, PAGE, KV_HEADS, HEAD_DIM, np.dtype(np.float32)))
    if cache == "codes":
        pages = random_pages(CASE, 4)
    new = jnp.ones((TOKENS, KV_HEADS, HEAD_DIM))
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(jax.ffi, "ffi_call", recorded)
        queries = jnp.ones((TOKENS, Q_HEADS, HEAD_DIM))
        ragged_page_attention_v3(queries, new, new, pages, *INDEX, config="cpu_native")
    (only,) = seen
    return only


# Operands of a call over a plain cache, and over codes.
QUERIES, PAGES, LENS, TABLES, STARTS, _, SINKS, K_SCALE, _, KEYS, VALUES = range(11)
CODES_LENS, CODES_SINKS, ROTATION, BACK, CODEBOOK, INDICES, SIGNS, NORMS, FRESH = 1, 5, 6, 7, 8, 10, 11, 12, 15


def dtype_of(place: int, dtype: str) -> Callable[[Call], Call]:
    return lambda call: call.having(place, call.arrays[place].astype(dtype))


def part_of(place: int, *slices: slice) -> Callable[[Call], Call]:
    return lambda call: call.having(place, call.arrays[place][slices])


def as_matrix(place: int) -> Callable[[Call], Call]:
    return lambda call: call.having(place, call.arrays[place].reshape(call.arrays[place].shape[0], -1))


def of_shape(place: int, *shape: int) -> Callable[[Call], Call]:
    return lambda call: call.having(place, jnp.ones(shape, jnp.float32))


ALL, FIRST = slice(None), slice(1)

PLAIN = [
    (lambda call: call.without_last(), "keys, values or updated pages without the others"),
    (as_matrix(QUERIES), "wrong ranks"),
    (dtype_of(QUERIES, "bfloat16"), "an unsupported dtype"),  # the output is float32
    (part_of(QUERIES, ALL, FIRST), "an output of the wrong shape"),
    (dtype_of(LENS, "float32"), "index arrays that are not int32"),
    (part_of(LENS, FIRST), "metadata of the wrong shape"),
    (part_of(STARTS, slice(2)), "metadata of the wrong shape"),
    (part_of(TABLES, FIRST), "metadata of the wrong shape"),
    (of_shape(SINKS, 1), "wrong sinks"),
    (of_shape(K_SCALE, 3), "wrong scales"),
    (as_matrix(PAGES), "wrong ranks"),
    (dtype_of(PAGES, "int32"), "an unsupported dtype"),
    (part_of(PAGES, ALL, slice(8)), "strides that are not those of the pages"),
    (lambda call: call.with_attribute("token_stride", 8), "strides that are not those of the pages"),
    (dtype_of(KEYS, "int8"), "keys or values of an unsupported dtype"),
    (dtype_of(VALUES, "bfloat16"), "keys or values of an unsupported dtype"),
    (part_of(VALUES, FIRST), "keys or values of the wrong shape"),
    (lambda call: call.without_aliases(), "pages that are not aliased"),
]
CODES = [
    (lambda call: call.without_last(), "a wrong number of arrays"),
    (dtype_of(CODES_LENS, "float32"), "index arrays that are not int32"),
    (of_shape(CODES_SINKS, 1), "wrong sinks"),
    (part_of(QUERIES, ALL, ALL, slice(32)), "an output of the wrong shape"),
    (part_of(ROTATION, ALL, slice(32)), "a wrong rotation"),
    (dtype_of(ROTATION, "float16"), "a wrong rotation"),
    (lambda call: call.having(ROTATION, call.arrays[ROTATION].reshape(-1)), "a wrong rotation"),
    (part_of(BACK, FIRST), "a wrong rotation"),
    (dtype_of(BACK, "float16"), "a wrong rotation"),
    (part_of(CODEBOOK, slice(8)), "a wrong codebook"),
    (dtype_of(CODEBOOK, "float16"), "a wrong codebook"),
    (as_matrix(INDICES), "wrong ranks"),
    (lambda call: call.with_attribute("page_size", 1), "arrays of another page size"),
    (part_of(SIGNS, slice(3)), "arrays of different numbers of pages"),
    (dtype_of(SIGNS, "float32"), "codes of an unsupported dtype"),
    (dtype_of(NORMS, "int32"), "codes of an unsupported dtype"),
    (part_of(FRESH, FIRST), "new codes of the wrong shape"),
    (dtype_of(FRESH, "int8"), "new codes of the wrong shape"),
    (lambda call: call.without_aliases(), "codes that are not aliased"),
]


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    return {cache: made(cache) for cache in ("plain", "codes")}


@pytest.mark.parametrize("cache", ["plain", "codes"])
def test_the_call_as_it_is_made(calls: dict[str, Call], cache: str) -> None:
    """What the tests below spoil is right: it can be made again."""
    assert np.isfinite(calls[cache].make()[0]).all()


@pytest.mark.parametrize(
    ("cache", "spoil", "message"),
    [("plain", *each) for each in PLAIN] + [("codes", *each) for each in CODES],
    ids=[f"plain-{i}" for i in range(len(PLAIN))] + [f"codes-{i}" for i in range(len(CODES))],
)
def test_arrays_that_do_not_fit_are_refused(
    calls: dict[str, Call], cache: str, spoil: Callable[[Call], Call], message: str
) -> None:
    with pytest.raises(Exception, match=f"cpu_native: {message} "):
        spoil(calls[cache]).make()
