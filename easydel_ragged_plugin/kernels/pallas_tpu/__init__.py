"""TPU kernel in Pallas, lowered by Mosaic: one code for v2, v3 and v3 with head_dim 64.

=========== ====================================================================================================
blocks.py   sizes of blocks: a table by generation, and what fits VMEM
work.py     lists of work: tiles of queries, and new tokens by page
call.py     what one call of the kernel is: its sizes and its memory
attend.py   the kernel: its cursors, and what becomes of a tile
copies.py   the copies between HBM and the core's own memories
packed.py   loads and stores of rows that share 32-bit words
softmax.py  the online softmax over the keys of a block
update.py   v3's new keys and values
=========== ====================================================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from easydel_ragged_plugin.base2 import LOG2_E
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.layout import LANES, packing
from easydel_ragged_plugin.rows import Rows, live_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands

from .blocks import Blocks, Shapes, choose, generation_name, too_large

if TYPE_CHECKING:
    from .call import Call, Results

__all__ = ["KERNEL", "PallasTPU"]

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
MOST_HEAD_DIM = 256
COPIED = "XLA stores such pages in another order on a TPU, and copies them at each call. Use v3"
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
        reason = unavailable()
        if reason is not None:
            return reason
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
        refused = _refuses_v2(request) if request.version == "v2" else None
        return refused or too_large(request)

    def facts(self) -> dict[str, Any]:
        """Whether JAX has what it is made with, and the generation of this process's TPU."""
        reason = unavailable()
        if reason is not None:
            return {"available": False, "reason": reason}
        return {"available": True, "reason": None, "generation": generation_name()}

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """See :meth:`easydel_ragged_plugin.types.Kernel.forward`."""
        from .attend import attend
        from .call import Call
        from .update import merged_slots
        from .work import chunked_tables, query_tiles, segments_to_write

        blocks, shapes = choose(request, config), Shapes.of(request)
        with jax.named_scope("ragged_page_attention_tpu"):
            rows = live_rows(request, operands)
            arrays = {"tables": chunked_tables(operands.block_tables), "pages": operands.pages}
            arrays |= {name: getattr(operands, name) for name in request.options.scale_arrays}
            segments = None
            if request.writes_pages:
                assert operands.keys is not None  # api.py made both
                assert operands.values is not None
                arrays["new"] = merged_slots(request, operands.keys, operands.values, shapes.slot)
                segments = segments_to_write(request, rows, operands)
            found = []
            for block, decode in ((blocks.decode, True), (blocks.prefill, False)):
                if not decode and request.num_tokens == 1:
                    break
                gathered = decode and request.num_rows < request.num_tokens
                tokens = request.num_rows if gathered else request.num_tokens
                call = Call(request, block, shapes, tokens, request.writes_pages and decode, decode)
                first = jnp.arange(tokens, dtype=jnp.int32) if gathered else rows.query_start
                work = query_tiles(request, block, rows, first, decode=decode)
                queries = _first_queries(rows, operands.queries) if gathered else operands.queries
                arrays["queries"] = _queries(call, queries)
                if operands.sinks is not None:
                    arrays["sinks"] = _sinks(call, operands.sinks)
                results, arrays["pages"] = attend(call, work, segments, arrays, self._interpreter())
                found.append(_cut(call, results))
            output, lse = _joined(request, rows, found)
            return Attended(output, arrays["pages"], lse)

    def _interpreter(self) -> Any:
        if self.interpret is not True:
            return self.interpret
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams()


def unavailable() -> str | None:
    """Why Pallas for TPUs can't be imported; or None. That of some versions of JAX imports absl-py, undeclared."""
    version = jax.__version__
    try:
        import_module("jax.experimental.pallas.tpu")
    except ModuleNotFoundError as error:
        if error.name == "absl":
            return f"absl-py is not installed, which Pallas for TPUs of JAX {version} imports (pip install absl-py)"
        return f"JAX {version} has no Pallas for TPUs: {error}"
    return None


def _refuses_v2(request: AttentionRequest) -> str | None:
    """Why v2's pages, whose heads share one axis, can't be read as rows of 32-bit words; or None."""
    stored = 2 * request.num_kv_heads
    if request.head_dim % LANES:
        return f"v2 with head_dim {request.head_dim}, no multiple of {LANES}: {COPIED}"
    if stored % packing(request.cache_dtype) or (stored % SUBLANES and stored not in (2, 4)):
        return f"v2 with {request.num_kv_heads} kv heads in {request.cache_dtype.name}: {COPIED}"
    return None


def _first_queries(rows: Rows, queries: jax.Array) -> jax.Array:
    """The first new token of each row: ``[rows, q_heads, head_dim]``. Of a step with a long prompt, decode is laid out
    for its rows alone."""
    return queries[jnp.clip(rows.query_start, 0, queries.shape[0] - 1)]


def _in_joints(call: Call, array: jax.Array) -> jax.Array:
    """``[..., q_heads, n]`` as ``[..., joints, heads of a joint, group, n]``, padded with zeros."""
    request, before = call.request, [(0, 0)] * (array.ndim - 2)
    split = array.reshape(*array.shape[:-2], request.num_kv_heads, request.group_size, array.shape[-1])
    missing = call.joints * call.joined - request.num_kv_heads
    padding = (*before, (0, missing), (0, call.shapes.group - request.group_size), (0, 0))
    return jnp.pad(split, padding).reshape(
        *array.shape[:-2], call.joints, call.joined, call.shapes.group, array.shape[-1]
    )


def _queries(call: Call, queries: jax.Array) -> jax.Array:
    """``[joints, tokens, rows of a token / pack, pack, lanes]`` in the dtype of the products."""
    shapes, pack = call.shapes, packing(call.shapes.operand)
    padded = jnp.pad(queries.astype(shapes.operand), ((0, 0), (0, 0), (0, shapes.lanes - queries.shape[-1])))
    split = jnp.moveaxis(_in_joints(call, padded), 0, 1)  # [joints, tokens, heads of a joint, group, lanes of a head]
    if call.joined > 1:
        own = jnp.eye(call.joined, dtype=bool).reshape(1, 1, call.joined, 1, call.joined, 1)
        split = jnp.where(own, split[..., None, :], jnp.zeros_like(split[..., None, :]))
    return split.reshape(call.joints, call.tokens, call.token_rows // pack, pack, call.lanes)


def _sinks(call: Call, sinks: jax.Array) -> jax.Array:
    """``[joints, rows, 128]`` float32, in base 2."""
    from .softmax import HIDDEN

    based = jnp.minimum(sinks.astype(jnp.float32) * LOG2_E, -HIDDEN)[:, None]
    rows = _in_joints(call, based).reshape(call.joints, 1, call.token_rows, 1)
    tile = jnp.broadcast_to(rows, (call.joints, call.block.tokens, call.token_rows, LANES))
    return tile.reshape(call.joints, call.rows, LANES)


def _cut(call: Call, results: Results) -> tuple[jax.Array, jax.Array | None]:
    """Output ``[tokens, q_heads, head_dim]`` and logsumexp ``[tokens, q_heads]`` of a call."""
    request, shapes, tokens = call.request, call.shapes, call.tokens
    heads, group = request.num_kv_heads, request.group_size
    first = request.head_dim if shapes.shares_rows else 0
    split = results.output.reshape(call.joints, tokens, call.joined, shapes.group, call.joined, shapes.lanes)
    own = jnp.stack([split[:, :, each, :group, each, first : first + request.head_dim] for each in range(call.joined)])
    output = own.transpose(2, 1, 0, 3, 4).reshape(tokens, -1, request.head_dim)[:, : request.num_q_heads]
    if results.lse is None:
        return output, None
    lse = results.lse.reshape(tokens, call.joined, shapes.group, LANES)[:, :, :group, : call.joints]
    return output, lse.transpose(0, 3, 1, 2).reshape(tokens, -1)[:, : heads * group]


def _joined(
    request: AttentionRequest, rows: Rows, found: list[tuple[jax.Array, jax.Array | None]]
) -> tuple[jax.Array, jax.Array | None]:
    """Of each token the results of the call that it is in; zeros, and -inf, for tokens of no live row."""
    token = jnp.arange(request.num_tokens, dtype=jnp.int32)[:, None]
    start, end = rows.query_start[None, :], (rows.query_start + rows.num_queries)[None, :]
    inside, one = (token >= start) & (token < end), rows.num_queries[None, :] == 1
    output: Any = jnp.zeros((request.num_tokens, request.num_q_heads, request.head_dim), found[0][0].dtype)
    lse: Any = None if found[0][1] is None else jnp.full(output.shape[:2], -jnp.inf, jnp.float32)
    for (of_call, lse_of_call), chosen in zip(found, (inside & one, inside & ~one), strict=False):
        live = jnp.any(chosen, axis=1)[:, None]
        if of_call.shape[0] != request.num_tokens:  # of each row, not of each token
            row = jnp.argmax(chosen, axis=1)
            of_call, lse_of_call = of_call[row], None if lse_of_call is None else lse_of_call[row]
        output = jnp.where(live[..., None], of_call, output)
        lse = None if lse_of_call is None else jnp.where(live, lse_of_call, lse)
    return output.astype(request.query_dtype), lse


KERNEL = PallasTPU()
