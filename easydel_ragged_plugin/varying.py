"""Which mesh axes a value varies over, inside of ``jax.shard_map``.

``shard_map`` follows for each value over which of its mesh axes devices may hold different numbers (``check_vma``, on
by default). Most functions of JAX join the axes of their arguments. A loop does not: what it carries must vary over
all of them from the start, and a constant varies over none. Outside of ``shard_map``, and with ``check_vma=False``,
nothing varies and nothing here has an effect.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["result_type", "vary", "varying_axes"]

Tree = TypeVar("Tree")

# JAX's name of the set changed: `vma` up to 0.9, a part of `manual_axis_type` in 0.12.
_IN_MANUAL_AXIS_TYPE = "manual_axis_type" in inspect.signature(jax.ShapeDtypeStruct).parameters


def varying_axes(tree: Any) -> frozenset[str]:
    """Names of the mesh axes that any array of ``tree`` varies over."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind: Any = jax.typeof(leaf)
        axes |= kind.manual_axis_type.varying if _IN_MANUAL_AXIS_TYPE else kind.vma
    return axes


def vary(tree: Tree, like: Any) -> Tree:
    """``tree``, each array of which varies over the axes of ``like``, too. The numbers are the same."""
    axes = varying_axes(like)
    if not axes:
        return tree

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)


def result_type(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the axes of ``like``: for ``ffi_call`` and ``pallas_call``."""
    axes = varying_axes(like)
    # An aval that varies needs a mesh to vary over.
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec()) if axes else None
    varies: dict[str, Any] = {"vma": axes}
    if _IN_MANUAL_AXIS_TYPE:
        varies = {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, **varies)
