"""TPU kernel in Pallas, lowered by Mosaic: one code for v2, v3 and v3 with head_dim 64.

========== =====================================================================================================
blocks.py  sizes of blocks: a table by generation, and what fits VMEM
work.py    lists of work: tiles of queries, and new tokens by page
attend.py  the kernel: cursors, copies, and what becomes of a tile
tiles.py   what is computed with a block of keys
update.py  v3's new keys and values
========== =====================================================================================================
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.rows import Rows, live_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands

from .blocks import Block, Blocks, Shapes, choose

if TYPE_CHECKING:
    from .attend import Results

__all__ = ["KERNEL", "PallasTPU"]

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
MOST_HEAD_DIM = 256
SUBLANES = 8


class PallasTPU(Kernel):
    """Ragged page attention v2 and v3 on TPUs.

    Block sizes in place of those that it would choose go into ``RaggedPageConfig(kernel_config=Blocks(...))``.

    Args:
        interpret: run on a CPU, slowly, in Pallas' TPU interpret mode: what the tests do. Parameters of that mode may
            be given in its place.
    """

    name = "pallas_tpu"
    platforms = frozenset({"tpu"})
    technologies = frozenset({"pallas"})
    features = Features(
        options=frozenset(
            {
                "softmax_scale",
                "sliding_window",
                "attention_chunk_size",
                "logits_soft_cap",
                "k_scale",
                "v_scale",
                "scale_arrays",
                "sinks",
                "compute_dtype",
                "update_pages",
                "vmem_limit_bytes",
            }
        ),
        results=frozenset({"lse"}),
    )
    label = "Pallas TPU (this package)"
    color = "#7c3aed"
    config_type = Blocks

    def __init__(self, *, interpret: Any = False) -> None:
        self.interpret = interpret
        if interpret:
            self.platforms = self.platforms | {"cpu"}

    def refuses(self, request: AttentionRequest) -> str | None:
        """See :meth:`easydel_ragged_plugin.types.Kernel.refuses`."""
        if importlib.util.find_spec("jax.experimental.pallas.tpu") is None:
            return f"JAX {jax.__version__} has no Pallas backend for TPUs"
        for what, dtype, known in (
            ("queries", request.query_dtype, COMPUTE_DTYPES),
            ("compute_dtype", request.compute_dtype, COMPUTE_DTYPES),
            ("cache", request.cache_dtype, CACHE_DTYPES),
        ):
            if dtype.name not in known:
                return f"{what}: {dtype.name}; takes {', '.join(known)}"
        if request.head_dim > MOST_HEAD_DIM:
            return f"head_dim {request.head_dim}, more than {MOST_HEAD_DIM}"
        if request.return_lse and request.num_kv_heads > LANES:
            return f"return_lse with {request.num_kv_heads} kv heads, more than {LANES}"
        return _refuses_v2(request) if request.version == "v2" else None

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        from .attend import Call, attend
        from .update import merged_slots
        from .work import chunked_tables, query_tiles, segments_to_write

        blocks, shapes = choose(request, config), Shapes.of(request)
        with jax.named_scope("ragged_page_attention_tpu"):
            rows = live_rows(request, operands)
            arrays = {
                "queries": _queries(request, shapes, operands.queries),
                "tables": chunked_tables(operands.block_tables),
                "pages": operands.pages,
            }
            for name in request.options.scale_arrays:
                arrays[name] = getattr(operands, name)
            segments = None
            if request.writes_pages:
                assert operands.keys is not None  # api.py made both
                assert operands.values is not None
                slot = operands.pages.shape[2:]
                arrays["new"] = merged_slots(request, operands.keys, operands.values, slot)
                segments = segments_to_write(request, rows, operands)
            results, pages, written = None, operands.pages, False
            for block, decode in ((blocks.decode, True), (blocks.prefill, False)):
                if not decode and request.num_tokens == 1:
                    break
                call = Call(request, block, shapes, request.writes_pages and not written, decode)
                work = query_tiles(request, block, rows, _tiles(rows, block, decode))
                arrays["pages"] = pages
                sinks = _sinks(request, shapes, operands.sinks, block)
                with_sinks = arrays if sinks is None else {**arrays, "sinks": sinks}
                results, pages = attend(call, work, segments, with_sinks, results, self._interpreter())
                written = True
            assert results is not None
            return Attended(*_cut(request, shapes, rows, results, pages))

    def _interpreter(self) -> Any:
        if self.interpret is not True:
            return self.interpret
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams()


def _refuses_v2(request: AttentionRequest) -> str | None:
    """Why v2's pages, whose heads share one axis, can't be read as rows of 32-bit words; or None."""
    stored = 2 * request.num_kv_heads
    if request.head_dim % LANES:
        return f"v2 with head_dim {request.head_dim}, no multiple of {LANES}"
    if stored % packing(request.cache_dtype) or (stored % SUBLANES and stored not in (2, 4)):
        return f"v2 with {request.num_kv_heads} kv heads in {request.cache_dtype.name}: they are padded in memory"
    return None


def _tiles(rows: Rows, block: Block, decode: bool) -> jax.Array:
    """Tiles of each row: of those with one new token, or of those with more."""
    if decode:
        return (rows.num_queries == 1).astype(jnp.int32)
    tiles = lax.div(rows.num_queries + (block.tokens - 1), jnp.int32(block.tokens))
    return jnp.where(rows.num_queries > 1, tiles, 0)


def _queries(request: AttentionRequest, shapes: Shapes, queries: jax.Array) -> jax.Array:
    """``[kv_heads, tokens, group / pack, pack, lanes]`` in the dtype of the products."""
    heads, tokens, pack = request.num_kv_heads, request.num_tokens, packing(shapes.operand)
    split = queries.astype(shapes.operand).reshape(tokens, heads, request.group_size, request.head_dim)
    padding = (shapes.group - request.group_size, shapes.lanes - request.head_dim)
    padded = jnp.pad(split, ((0, 0), (0, 0), (0, padding[0]), (0, padding[1])))
    return padded.swapaxes(0, 1).reshape(heads, tokens, shapes.group // pack, pack, shapes.lanes)


def _sinks(request: AttentionRequest, shapes: Shapes, sinks: jax.Array | None, block: Block) -> jax.Array | None:
    """``[kv_heads, rows of a tile, 128]`` float32, in base 2."""
    if sinks is None:
        return None
    from .tiles import HIDDEN, LOG2_E

    based = jnp.minimum(sinks.astype(jnp.float32) * LOG2_E, -HIDDEN).reshape(request.num_kv_heads, 1, -1, 1)
    padded = jnp.pad(based, ((0, 0), (0, 0), (0, shapes.group - request.group_size), (0, 0)))
    tile = (request.num_kv_heads, block.tokens, shapes.group, LANES)
    return jnp.broadcast_to(padded, tile).reshape(request.num_kv_heads, block.tokens * shapes.group, LANES)


def _cut(
    request: AttentionRequest, shapes: Shapes, rows: Rows, results: Results, pages: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Output, pages and logsumexp, in the forms of :class:`~easydel_ragged_plugin.types.Attended`. Calls leave what is
    of no live row undefined: here it becomes zero, and -inf."""
    token = jnp.arange(request.num_tokens, dtype=jnp.int32)[:, None]
    end = rows.query_start + rows.num_queries
    live = jnp.any((token >= rows.query_start[None, :]) & (token < end[None, :]), axis=1)
    group, first = request.group_size, request.head_dim if shapes.shares_rows else 0
    output = results.output.reshape(request.num_kv_heads, request.num_tokens, shapes.group, shapes.lanes)
    output = output[:, :, :group, first : first + request.head_dim].swapaxes(0, 1)
    output = jnp.where(live[:, None, None, None], output, jnp.zeros_like(output))
    shape = (request.num_tokens, request.num_q_heads, request.head_dim)
    output = output.reshape(shape).astype(request.query_dtype)
    if results.lse is None:
        return output, pages, None
    lse = results.lse[:, :group, : request.num_kv_heads].swapaxes(1, 2)
    lse = jnp.where(live[:, None, None], lse, -jnp.inf).reshape(shape[:2])
    return output, pages, lse


KERNEL = PallasTPU()
