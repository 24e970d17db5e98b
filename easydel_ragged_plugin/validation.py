"""Checks of a call's static arguments: shapes, dtypes and options.

Every function raises ValueError with what was got, what was wanted and what to do next. All of it runs while a call
is traced, so nothing has been written when it raises.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from .errors import Unsupported
from .layout import Version
from .turboquant import TurboQuantPages

__all__ = [
    "check_index_arrays",
    "check_mask_value",
    "check_options",
    "check_scales",
    "check_shapes",
    "float_dtype",
    "number",
    "positive",
    "sinks_per_head",
    "specs_of",
    "window_tokens",
]

LARGEST_MASK_VALUE = -1e9
"""A mask value up to this one leaves a masked key no weight in float32, which is what the kernels compute."""


def check_shapes(version: Version, queries: Any, keys: Any, values: Any, pages: Any) -> int:
    """Check queries, keys, values and pages against one another; the number of kv heads."""
    coded = isinstance(pages, TurboQuantPages)
    for name, array, form in (
        ("queries", queries, "[tokens, q_heads, head_dim]"),
        ("keys", keys, "[tokens, kv_heads, head_dim]"),
        ("values", values, "[tokens, kv_heads, head_dim]"),
    ):
        if array is None:
            continue
        if len(array.shape) != 3:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, wanted {form}. Reshape a batch axis away.")
        stored = name != "queries" and not coded and array.dtype == pages.dtype
        if not (is_wide_float(array.dtype) or stored):
            raise ValueError(
                f"{name}: got dtype {array.dtype}, wanted a float dtype of at least 16 bits. "
                "Cast with .astype(jnp.bfloat16)."
            )
    num_tokens, num_q_heads, head_dim = queries.shape
    if not num_tokens or not num_q_heads or not head_dim:
        raise ValueError(f"queries: got shape {tuple(queries.shape)}, wanted at least one token, head and element.")
    if coded:
        pages.check(head_dim)
    else:
        check_page_array(version, pages)
    if keys is None:
        num_kv_heads = pages.shape[2] if coded else pages.shape[2] // 2
    else:
        if tuple(keys.shape) != tuple(values.shape):
            raise ValueError(f"values: got shape {tuple(values.shape)}, wanted the keys' {tuple(keys.shape)}.")
        if (keys.shape[0], keys.shape[2]) != (num_tokens, head_dim):
            raise ValueError(
                f"keys: got shape {tuple(keys.shape)}, wanted [{num_tokens}, kv_heads, {head_dim}] as the queries have."
            )
        num_kv_heads = keys.shape[1]
        if coded and num_kv_heads != pages.shape[2]:
            raise ValueError(f"keys: got {num_kv_heads} kv heads, wanted the {pages.shape[2]} of the TurboQuant cache.")
    if not num_kv_heads or num_q_heads % num_kv_heads:
        raise ValueError(
            f"queries: got {num_q_heads} heads over {num_kv_heads} kv heads, wanted a multiple. "
            "Every kv head serves the same number of query heads."
        )
    return num_kv_heads


def check_page_array(version: Version, pages: Any) -> None:
    rank = 4 if version == "v2" else 5
    if len(pages.shape) != rank:
        raise ValueError(
            f"kv_pages: got shape {tuple(pages.shape)}, wanted {rank} axes for {version}. "
            f"page_shape({version!r}, ...) gives the shape."
        )
    if not (jnp.issubdtype(pages.dtype, jnp.floating) or pages.dtype == jnp.int8):
        raise ValueError(f"kv_pages: got dtype {pages.dtype}, wanted a float dtype or int8.")
    if 0 in pages.shape:
        raise ValueError(f"kv_pages: got shape {tuple(pages.shape)}, wanted at least one page of one token.")


def check_index_arrays(
    context_lens: Any, query_start_loc: Any, block_tables: Any, distribution: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    for name, array, ranks in (
        ("context_lens", context_lens, (1,)),
        ("query_start_loc", query_start_loc, (1,)),
        ("block_tables", block_tables, (1, 2)),
        ("distribution", distribution, (1,)),
    ):
        if not hasattr(array, "shape") or len(array.shape) not in ranks:
            raise ValueError(
                f"{name}: got {getattr(array, 'shape', type(array).__name__)}, wanted an array of rank {ranks[-1]}."
            )
        if array.dtype != np.int32:
            raise ValueError(f"{name}: got dtype {array.dtype}, wanted int32. Cast with .astype(jnp.int32).")
    num_rows = context_lens.shape[0]
    if not num_rows:
        raise ValueError("context_lens: got no rows, wanted at least one. Skip the call for an empty batch.")
    if query_start_loc.shape != (num_rows + 1,):
        raise ValueError(
            f"query_start_loc: got shape {tuple(query_start_loc.shape)}, wanted ({num_rows + 1},): a start for "
            f"each of the {num_rows} rows, and the end of the last."
        )
    if distribution.shape != (3,):
        raise ValueError(
            f"distribution: got shape {tuple(distribution.shape)}, wanted (3,): decode_end, prefill_end, total."
        )
    size = math.prod(block_tables.shape)
    if not size or size % num_rows or (len(block_tables.shape) == 2 and block_tables.shape[0] != num_rows):
        raise ValueError(
            f"block_tables: got shape {tuple(block_tables.shape)}, wanted [{num_rows}, pages_per_row] (or flat) "
            "with at least one page for each row of context_lens."
        )
    tables = jnp.asarray(block_tables).reshape(num_rows, size // num_rows)
    return jnp.asarray(context_lens), jnp.asarray(query_start_loc), tables


def float_dtype(name: str, value: Any, default: Any) -> np.dtype:
    try:
        dtype = np.dtype(default if value is None else value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, wanted a float dtype such as jnp.float32, or None.") from None
    if not is_wide_float(dtype):
        raise ValueError(f"{name}: got {dtype.name}, wanted float32, bfloat16, float16 or float64, or None.")
    return dtype


def is_wide_float(dtype: Any) -> bool:
    """Whether ``dtype`` is a float of at least 16 bits: the shorter ones store keys and values, and compute nothing."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize >= 2


def number(name: str, value: Any) -> float:
    if isinstance(value, (bool | str, jax.core.Tracer)) or np.ndim(value) != 0:
        raise ValueError(f"{name}: got {value!r}, wanted one Python number, known while tracing.")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{name}: got {result}, wanted a finite number.")
    return result


def positive(name: str, value: Any) -> float:
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name}: got {result}, wanted a number above 0, or None to switch it off.")
    return result


def window_tokens(value: Any) -> int | None:
    """Tokens that a query sees, its own included, from an int or a (left, right) pair."""
    if value is None:
        return None
    integral = (int, np.integer)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, integral) for part in value):
        left, right = (int(part) for part in value)
        if left < -1 or right < -1:
            raise ValueError(f"sliding_window: got {value!r}, wanted a pair of token counts, or -1 for no limit.")
        return None if left == -1 else left + 1
    if isinstance(value, bool) or not isinstance(value, integral) or value < 1:
        raise ValueError(
            f"sliding_window: got {value!r}, wanted an int of at least 1 (the query's own token counts), a pair "
            "(left, right), or None for no window."
        )
    return int(value)


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Scales, the VMEM ceiling and the hint, checked."""
    for name in ("q_scale", "k_scale", "v_scale"):
        if options[name] is not None:
            options[name] = positive(name, options[name])
    limit = options["vmem_limit_bytes"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"vmem_limit_bytes: got {limit!r}, wanted a number of bytes of at least 1, or None.")
    options["optimized"] = bool(options["optimized"])
    return options


def check_scales(pages: Any, options: dict[str, Any]) -> None:
    """Refuse scales that the cache can't have, and ask for those that it must have."""
    given = [name for name in ("q_scale", "k_scale", "v_scale") if options[name] is not None]
    if isinstance(pages, TurboQuantPages):
        if given:
            raise Unsupported(f"{' and '.join(given)} with a TurboQuant cache, which keeps norms of its own.")
        return
    # An integer says nothing without the factor that makes it a key or a value.
    missing = [name for name in ("k_scale", "v_scale") if options[name] is None]
    if jnp.issubdtype(pages.dtype, jnp.integer) and missing:
        raise ValueError(
            f"{' and '.join(missing)}: got None, wanted the size of one step of the {pages.dtype} cache. Keys and "
            "values are stored divided by them."
        )


def check_mask_value(value: Any) -> None:
    # -inf is a fine mask value, so _number does not fit.
    if value is not None and not (isinstance(value, int | float | np.number) and value <= LARGEST_MASK_VALUE):
        raise ValueError(
            f"mask_value: got {value!r}, wanted None or a number up to {LARGEST_MASK_VALUE:g}: masked keys have no "
            "weight in these kernels, and a larger value asks for one."
        )


def sinks_per_head(softmax_aux: Any, num_q_heads: int, num_kv_heads: int) -> jax.Array:
    """One float32 sink logit for each query head; several sinks of a kv head add up in the softmax's sum."""
    sinks = jnp.asarray(softmax_aux)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"softmax_aux: got dtype {sinks.dtype}, wanted a float dtype.")
    sinks = sinks.astype(jnp.promote_types(sinks.dtype, jnp.float32))
    if sinks.shape == (num_q_heads,):
        return sinks
    if sinks.ndim == 2 and sinks.shape[0] == num_kv_heads and sinks.shape[1] > 0:
        return jnp.repeat(jax.nn.logsumexp(sinks, axis=1), num_q_heads // num_kv_heads)
    raise ValueError(
        f"softmax_aux: got shape {sinks.shape}, wanted ({num_q_heads},): one logit for each query head, or "
        f"({num_kv_heads}, sinks): the sinks of each kv head."
    )


def specs_of(
    version: Version, mesh: Mesh | None, in_specs: tuple[PartitionSpec | None, ...] | None
) -> tuple[PartitionSpec | None, PartitionSpec | None]:
    """Partition specs of queries and pages."""
    if mesh is None:
        if in_specs is not None:
            raise ValueError("in_specs: got specs without a mesh. Pass mesh= as well.")
        return None, None
    wanted = (6, 7) if version == "v2" else (8, 9)
    if in_specs is None or len(in_specs) not in wanted:
        got = "None" if in_specs is None else f"{len(in_specs)} specs"
        raise ValueError(f"in_specs: got {got}, wanted one for each of the {wanted[1]} positional arguments, in order.")
    return in_specs[0], in_specs[1 if version == "v2" else 3]
