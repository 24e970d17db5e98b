"""The kernel ``dense``: attention of each token over all slots of its row, for short block tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from easydel_ragged_plugin import RaggedPageConfig
from easydel_ragged_plugin.rows import is_visible, live_rows
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands

__all__ = ["KERNEL", "Dense"]

MAX_SLOTS = 2048
"""Tokens of a block table. Each token of the batch reads them all, so long tables take too much memory."""


class Dense(Kernel):
    """Ragged page attention v2 with one product over the whole block table, in float32."""

    name = "dense"
    platforms = frozenset({"cpu", "gpu", "tpu"})
    technologies = frozenset({"xla"})
    # All that is not named here is refused before the kernel is asked.
    features = Features(options=frozenset({"softmax_scale", "sliding_window", "compute_dtype"}))

    def refuses(self, request: AttentionRequest) -> str | None:
        """Why it can't run a request whose features it has, or None."""
        if request.version != "v2":
            return f"takes v2, got {request.version}"
        slots = request.pages_per_row * request.page_size
        return None if slots <= MAX_SLOTS else f"takes block tables of up to {MAX_SLOTS} tokens, got {slots}"

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        """The attention of every token, ``[tokens, q_heads, head_dim]`` in the queries' dtype; zeros for padding."""
        rows = live_rows(request, operands)  # malformed rows have no queries
        token, start = jnp.arange(request.num_tokens, dtype=jnp.int32)[:, None], rows.query_start[None, :]
        mine = (token >= start) & (token < start + rows.num_queries[None, :])
        row = mine.argmax(axis=1)
        position = rows.context[row] - rows.num_queries[row] + token[:, 0] - rows.query_start[row]

        # [tokens, slots, kv_heads, 2, head_dim]: keys at 0, values at 1.
        slots = operands.pages.at[operands.block_tables[row]].get(mode="clip").astype(jnp.float32)
        slots = slots.reshape(request.num_tokens, -1, request.num_kv_heads, 2, request.head_dim)
        slot = jnp.arange(slots.shape[1], dtype=jnp.int32)[None, :]
        visible = is_visible(request, slot, position[:, None]) & mine.any(axis=1)[:, None]
        slots = jnp.where(visible[:, :, None, None, None], slots, 0)  # the others may hold NaN

        queries = operands.queries.astype(jnp.float32)
        queries = queries.reshape(request.num_tokens, request.num_kv_heads, request.group_size, request.head_dim)
        logits = request.softmax_scale * jnp.einsum("thgd,tshd->thgs", queries, slots[:, :, :, 0])
        visible = visible[:, None, None, :]
        weights = jnp.where(visible, jax.nn.softmax(logits, where=visible), 0)
        output = jnp.einsum("thgs,tshd->thgd", weights, slots[:, :, :, 1])
        return Attended(output.reshape(operands.queries.shape).astype(request.query_dtype), operands.pages)


KERNEL = Dense()
"""One object for the process: it is part of the key under which JAX keeps a compiled call."""
