"""What the tests take from JAX's private modules, because JAX has no public name for it: here and nowhere else.

JAX may move it in any release. Each comment says what fails then. The package itself uses nothing of the kind.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import numpy as np

# MLIR's Python bindings, to parse a Triton program that a call carries as bytes. Without them the tests of
# test_gpu_lowering.py that look into a program fail.
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]

# A device that is described and not there, for lowering without hardware. Without it nothing lowers for a TPU
# (test_tpu_lowering.py), nor for a GPU from JAX 0.11 on (test_gpu_lowering.py).
from jax._src.mesh import AbstractDevice

# TPU interpret mode. Without it no test of test_pallas_tpu.py runs.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic.interpret import utils as interpret_utils

# An MLIR context that has Triton's dialect. Without it, as without the bindings.
from jax._src.pallas.triton.lowering import _new_ir_context

# The kinds of refs that it knows, and those that it does not: see teach_interpreter_reshaped_refs.
from jax._src.state.indexing import NDIndexer

try:
    from jax._src.state.types import BitcastTransform, ReshapeTransform
except ImportError:  # JAX 0.8 and 0.9.0
    from jax._src.state.types import RefBitcaster as BitcastTransform  # type: ignore[attr-defined, no-redef]
    from jax._src.state.types import RefReshaper as ReshapeTransform  # type: ignore[attr-defined, no-redef]

__all__ = ["_new_ir_context", "described_device", "ir", "races_found", "teach_interpreter_reshaped_refs"]


def described_device(kind: str, num_cores: int, platform: str) -> AbstractDevice:
    """A device for ``AbstractMesh(abstract_device=...)``: ``kind`` as ``jax.Device.device_kind`` would give it."""
    fields: dict[str, Any] = {"device_kind": kind, "num_cores": num_cores, "platform": platform}
    known = {field.name for field in dataclasses.fields(AbstractDevice)}  # JAX 0.9 has no platform
    return AbstractDevice(**{name: value for name, value in fields.items() if name in known})


def races_found() -> bool:
    """Whether TPU interpret mode with ``detect_races`` saw two accesses in no order, in the last call."""
    state: Any = interpret_pallas_call.races
    return bool(state.races_found)


def teach_interpreter_reshaped_refs() -> None:
    """Let TPU interpret mode load from and store to refs that are reshaped or bitcast. JAX's own knows only indices.

    Without it the tests of test_pallas_tpu.py fail with "'ReshapeTransform' object has no attribute 'indices'".
    """
    names = {"get": _get, "store": _store, "swap": _swap}
    known = {name: getattr(interpret_pallas_call, name) for name in names}
    if getattr(known["get"], "knows_reshaped_refs", False):
        return
    plain = {name: _without_token(name, each) for name, each in known.items()}
    for name, wrap in names.items():
        taught = _like(name, known[name], functools.partial(wrap, plain["get"], plain[name]))
        taught.knows_reshaped_refs = True
        setattr(interpret_pallas_call, name, taught)


def _takes_token(known: Any) -> bool:
    """Whether a function of the interpreter takes a token before all else, and returns it before what it found.

    They do from JAX 0.10 on. The interpreter calls them from programs, and without their guard, as ``__wrapped__``.
    """
    return next(iter(inspect.signature(known).parameters)) == "token"


def _without_token(name: str, known: Any) -> Any:
    """A function of the interpreter that takes and returns what those of JAX 0.9 do."""
    if not _takes_token(known):
        return known

    def plain(*arguments: Any, **keywords: Any) -> Any:
        found = known.__wrapped__(None, *arguments, **keywords)
        return None if name == "store" else found[1]

    return plain


def _like(name: str, known: Any, plain: Any) -> Any:
    """``plain``, which takes and returns what those of JAX 0.9 do, in the place of ``known``."""
    if not _takes_token(known):
        return plain

    def function(token: Any, *arguments: Any, **keywords: Any) -> Any:
        found = plain(*arguments, **keywords)
        return token if name == "store" else (token, found)

    return interpret_pallas_call.fail_on_exception(function)


def _cast_words(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The bits of ``array`` as another dtype. Rows (axis -2) share words, as in the registers of a TPU."""
    dtype = np.dtype(dtype)
    ratio = dtype.itemsize / array.dtype.itemsize
    if ratio == 1:
        return array.view(dtype)
    if ratio < 1:
        parts = np.ascontiguousarray(array)[..., None].view(dtype)  # [..., rows, lanes, parts]
        moved = np.moveaxis(parts, -1, -2)
        return np.ascontiguousarray(moved).reshape(*array.shape[:-2], -1, array.shape[-1])
    rows = array.reshape(*array.shape[:-2], -1, int(ratio), array.shape[-1])
    return np.ascontiguousarray(np.moveaxis(rows, -2, -1)).view(dtype)[..., 0]


def _index(transform: Any, shape: tuple[int, ...]) -> Any:
    """The NumPy index of one transform; IndexError where NumPy would silently cut it."""
    index = interpret_utils.to_range((transform,))
    for each, size in zip(index, shape, strict=False):
        if (
            isinstance(each, slice)
            and each.stop > each.start
            and not 0 <= each.start < each.stop <= size + each.step - 1
        ):
            raise IndexError(f"{index} of an array of shape {shape}")
    return index


def _read(array: np.ndarray, transforms: Any) -> np.ndarray:
    for each in transforms:
        if isinstance(each, ReshapeTransform):
            array = array.reshape(each.shape)
        elif isinstance(each, BitcastTransform):
            array = _cast_words(array, each.dtype)
        else:
            array = array[_index(each, array.shape)]
    return np.ascontiguousarray(array)


def _written(array: np.ndarray, transforms: Any, value: np.ndarray) -> np.ndarray:
    """``array`` with ``value`` in the part that the transforms name."""
    if not transforms:
        return np.broadcast_to(value, array.shape)
    first, *rest = transforms
    if isinstance(first, ReshapeTransform):
        return _written(array.reshape(first.shape), rest, value).reshape(array.shape)
    if isinstance(first, BitcastTransform):
        return _cast_words(_written(_cast_words(array, first.dtype), rest, value), array.dtype)
    array, index = array.copy(), _index(first, array.shape)
    array[index] = _written(array[index], rest, value)
    return array


def _split(transforms: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The indices up to the first transform of another kind, and the rest."""
    others = [i for i, each in enumerate(transforms) if not isinstance(each, NDIndexer)]
    cut = others[0] if others else len(transforms)
    return tuple(transforms[:cut]), jax.tree.map(int, tuple(transforms[cut:]))


def _get(get: Any, known: Any, *arguments: Any, **keywords: Any) -> Any:
    *place, transforms = arguments[:5]
    indices, rest = _split(transforms)
    found = known(*place, indices if rest else transforms, *arguments[5:], **keywords)
    return _read(np.asarray(found), rest) if rest else found


def _store(get: Any, known: Any, *arguments: Any, **keywords: Any) -> Any:
    *place, transforms, value = arguments[:6]
    indices, rest = _split(transforms)
    if rest:
        whole = np.asarray(get(*place, indices))
        transforms, value = indices, _written(whole, rest, np.asarray(value))
    return known(*place, transforms, value, *arguments[6:], **keywords)


def _swap(get: Any, known: Any, *arguments: Any, **keywords: Any) -> Any:
    *place, transforms, value, mask = arguments[:7]
    indices, rest = _split(transforms)
    if not rest:
        return known(*arguments, **keywords)
    if mask is not None:
        raise NotImplementedError("a masked store to a ref that is reshaped or bitcast")
    whole = np.asarray(get(*place, indices))
    known(*place, indices, _written(whole, rest, np.asarray(value)), None, *arguments[7:], **keywords)
    return _read(whole, rest)
