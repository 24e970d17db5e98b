"""Kernels that are wrong in one way: the oracle as a kernel, with a single mistake of the kind that real kernels make.

:data:`BROKEN` has each with the part of the contract that runs on it, the test that must be the first to fail, and its
words. What does not concern kernels alone comes from ``broken_operations.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import broken_operations
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from contract_runs import Broken, Mistakes

from easydel_ragged_plugin import reference
from easydel_ragged_plugin.config import RaggedPageConfig
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import CASES
from easydel_ragged_plugin.types import Attended, AttentionRequest, Features, Kernel, Operands
from easydel_ragged_plugin.varying import vary, varying_axes

Forward = Callable[[AttentionRequest, RaggedPageConfig, Operands], Attended]

BROKEN = Mistakes(replaces="forward")
V2_ONLY, V3_ONLY = ("v2",), ("v3",)

mistake = BROKEN.mistake


class OracleKernel(Kernel):
    """Right, slow, and the kit's check of itself: the contract must pass on it."""

    name = "oracle"
    platforms = frozenset({"cpu"})
    technologies = frozenset({"numpy"})
    features = Features(
        options=frozenset(each.name for each in dataclasses.fields(Options)), results=frozenset({"lse"})
    )

    def refuses(self, request: AttentionRequest) -> str | None:
        return None

    def compute(
        self, query: Any, key: Any, value: Any, pages: Any, index: tuple[Any, ...], sinks: Any, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Output, pages and logsumexp in NumPy; the arguments are those of the oracle's operation."""
        lens, tables, starts, last = index
        options = {**options, "return_lse": True}
        if pages.ndim == 4:
            output, lse = reference.ragged_page_attention_v2(query, pages, lens, tables, starts, last, sinks, **options)
            return output, pages, lse
        return reference.ragged_page_attention_v3(
            query, key, value, pages, lens, tables, starts, last, sinks, **options
        )

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        def on_host(operands: Operands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            arrays = jax.tree.map(np.asarray, operands._replace(work=None))
            query, key, value, pages, *index, last, sinks, k_scale, v_scale = arrays[:-1]
            if not request.writes_pages:
                # Operations have them there, too.
                key = value = np.zeros((len(query), request.num_kv_heads, request.head_dim), query.dtype)
            if request.version == "v2":
                last = last[2:]
            scales = {"k_scale": k_scale, "v_scale": v_scale}
            keywords = {**request.options.keywords(), **{name: scales[name] for name in request.options.scale_arrays}}
            output, pages, lse = self.compute(query, key, value, pages, (*index, last), sinks, keywords)
            return output.astype(query.dtype), pages, lse.astype(np.float32)

        heads = jax.ShapeDtypeStruct(operands.queries.shape[:2], jnp.float32)
        results = jax.pure_callback(on_host, (operands.queries, operands.pages, heads), operands)
        output, pages, lse = vary(results, operands)
        return Attended(output, pages, lse if request.return_lse else None)


@functools.cache
def broken_kernel(name: str) -> Kernel:
    """The kernel with the mistake of this name; one in place of a method gets the right method, too."""
    broken = BROKEN.named(name)
    member = broken.mistake
    if broken.replaces in ("compute", "forward"):

        def member(kernel: OracleKernel, *args: Any) -> Any:
            return broken.mistake(functools.partial(getattr(OracleKernel, broken.replaces), kernel), *args)

    return type("BrokenKernel", (OracleKernel,), {broken.replaces: member})()


def of_operations(broken: Broken) -> Broken:
    """A mistake of ``broken_operations.py`` in a kernel."""

    def compute(right: Callable[..., Any], *args: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lse = []

        def without_lse(*args: Any) -> tuple[np.ndarray, np.ndarray]:
            output, pages, found = right(*args)
            lse.append(found)
            return output, pages

        return *broken.mistake(without_lse, *args), lse[0]

    test, _, name = broken.caught_by.rstrip("]").partition("[")
    # One test of kernels has both sides of the cache.
    one_test = {"test_new_tokens_are_stored": "test_pages", "test_other_slots_keep_their_bytes": "test_pages"}
    # A case comes before the version, other parameters after it.
    parts = (name, "{version}") if name in {case.name for case in CASES} else ("{version}", name)
    caught_by = f"{one_test.get(test, test)}[{'-'.join(part for part in parts if part)}]"
    select = re.sub("stored|slots", "test_pages", broken.select)
    return dataclasses.replace(broken, mistake=compute, caught_by=caught_by, select=select)


BROKEN += [
    of_operations(broken)
    for broken in broken_operations.BROKEN
    # What the host passes is no part of a kernel's contract.
    if broken.replaces == "compute" and broken.name != "compute_dtype=None means bfloat16"
]


def with_options(request: AttentionRequest, **changes: Any) -> AttentionRequest:
    return dataclasses.replace(request, options=dataclasses.replace(request.options, **changes))


def without(option: str) -> Callable[..., Attended]:
    def forward(right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        return right(with_options(request, **{option: None}), config, operands)

    return forward


for scale in ("k_scale", "v_scale"):
    mistake(
        f"{scale} ignored",
        caught_by="test_values[float8-scales-{version}]",
        select="test_values and (mixed or scales)",
    )(without(scale))


@mistake(
    "q_scale multiplies the logits",
    caught_by="test_values[float8-scales-{version}]",
    select="test_values and (mixed or float8-scales)",
)
def q_scale_as_a_factor(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    scale = request.softmax_scale * (request.options.q_scale or 1.0)
    return right(with_options(request, softmax_scale=scale), config, operands)


for scale in ("k_scale", "v_scale"):

    def of_first_head(
        right: Forward,
        request: AttentionRequest,
        config: RaggedPageConfig,
        operands: Operands,
        scale: str = scale,
    ) -> Attended:
        array = getattr(operands, scale)
        first: dict[str, Any] = {scale: None if array is None else jnp.broadcast_to(array[:1], array.shape)}
        return right(request, config, operands._replace(**first))

    mistake(
        f"{scale} of the first kv head",
        caught_by="test_values[scales-per-kv-head-{version}]",
        select="test_values and (mixed or scales-per-kv-head)",
    )(of_first_head)


@mistake("window for the row, not for the query", caught_by="test_values[window-3-{version}]", select="window-")
def window_from_the_last_query(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    """Every query sees from where the row's last one does: an earlier one sees less, or nothing but itself."""
    attended, window = right(request, config, operands), request.options.window
    if window is None:
        return attended
    token = jnp.arange(request.num_tokens)
    row = jnp.searchsorted(operands.query_start_loc, token, side="right") - 1
    before_last = operands.query_start_loc[jnp.minimum(row + 1, request.num_rows)] - 1 - token
    output = attended.output
    for distance in range(1, min(window, 8)):
        narrow = right(with_options(request, sliding_window=window - distance), config, operands).output
        output = jnp.where((before_last == distance)[:, None, None], narrow, output)
    return attended._replace(output=output)


@mistake(
    "result in float32",
    caught_by="test_values[gqa-9-3-head-dim-64-bfloat16-{version}]",
    select="test_values and (decode or head-dim-64-bfloat16)",
    says="float32.*bfloat16",
)
def float32_result(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    return attended._replace(output=attended.output.astype(jnp.float32))


@mistake(
    "result with heads and lanes in one axis", caught_by="test_values[decode-{version}]", select="decode", says="shape"
)
def flat_result(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    return attended._replace(output=attended.output.reshape(len(attended.output), -1))


@mistake("a tuple in place of Attended", caught_by="test_values[decode-{version}]", select="decode", says="got tuple")
def plain_tuple(right: Forward, *args: Any) -> Any:
    return tuple(right(*args))


@mistake(
    "padding tokens left as they were",
    caught_by="test_padding_tokens_are_zero[decode-{version}]",
    select="(test_values or padding) and decode",
    says="padding tokens: got values up to 7",
)
def padding_is_garbage(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    nothing = ~attended.output.any(axis=(1, 2), keepdims=True)
    return attended._replace(output=jnp.where(nothing, 7, attended.output))


@mistake(
    "padding tokens left as they were where the logsumexp is requested",
    caught_by="test_logsumexp[decode-{version}]",
    select="decode",
)
def padding_is_garbage_with_lse(right: Forward, request: AttentionRequest, *args: Any) -> Attended:
    return padding_is_garbage(right, request, *args) if request.return_lse else right(request, *args)


@mistake(
    "entries past the context are read where they are not 0",
    caught_by="test_values[stale-table-{version}]",
    select="test_values and (mixed or empty or full or garbage or stale)",
)
def stale_entries_are_read(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    """As a kernel that takes an entry of 0 for the end of a row, and counts one page too many elsewhere."""
    attended = right(request, config, operands)
    entry = jnp.clip(-(-operands.context_lens // request.page_size), 0, request.pages_per_row - 1)
    page = jnp.take_along_axis(operands.block_tables, entry[:, None], axis=1)[:, 0]
    past = entry * request.page_size >= operands.context_lens
    there = past & (page > 0) & (page < request.num_pages)
    extra = jnp.where(there, jnp.nan_to_num(operands.pages[page].reshape(request.num_rows, -1)).std(axis=1), 0)
    row = jnp.searchsorted(operands.query_start_loc, jnp.arange(request.num_tokens), side="right") - 1
    return attended._replace(output=attended.output + 0.01 * extra[jnp.minimum(row, request.num_rows - 1), None, None])


@mistake(
    "table entries that nobody needs make a row malformed",
    caught_by="test_values[garbage-table-{version}]",
    select="test_values and (mixed or stale or garbage)",
)
def all_entries_are_checked(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    bad = (operands.block_tables < 0) | (operands.block_tables >= request.num_pages)
    lens = jnp.where(bad.any(axis=1), -1, operands.context_lens)
    return right(request, config, operands._replace(context_lens=lens))


@mistake(
    "weights of 0 for values that a query does not see",
    caught_by="test_what_is_not_finite_reaches_only_queries_that_see_it[{version}-None-values-inf]",
    select="not_finite and values",
    says="finite where it must not be, or the other way around, in tokens",
)
def values_out_of_sight(right: Forward, request: AttentionRequest, *args: Any) -> Attended:
    """One product for all queries of a row: what is not finite reaches all of them."""
    attended, operands = right(request, *args), args[-1]
    token = jnp.arange(request.num_tokens)
    row = jnp.searchsorted(operands.query_start_loc, token, side="right") - 1
    spoiled = jnp.zeros(request.num_rows + 1, bool).at[row].max(~jnp.isfinite(attended.output).all(axis=(1, 2)))
    return attended._replace(output=jnp.where(spoiled[row][:, None, None], jnp.nan, attended.output))


@mistake("probabilities in bfloat16", caught_by="test_values[decode-{version}]", select="decode", replaces="compute")
def probabilities_in_bfloat16(right: Callable[..., Any], *args: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    exp = np.exp

    def attend_one(*args: Any) -> tuple[np.ndarray, float]:
        with mock.patch.object(np, "exp", lambda logits: exp(logits).astype(ml_dtypes.bfloat16).astype(np.float64)):
            return original(*args)

    original = reference._attend_one
    with mock.patch.object(reference, "_attend_one", attend_one):
        return right(*args)


# The cache.


@mistake("v2 writes", caught_by="test_pages[decode-v2]", select="decode", says="changed", versions=V2_ONLY)
def writes_in_v2(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    return attended._replace(pages=attended.pages.at[0].set(0))


@mistake(
    "padding lanes of a written slot keep their bits",
    caught_by="test_pages[decode-v3]",
    select="decode",
    says="wrong bytes in written",
    versions=V3_ONLY,
)
def padding_lanes_keep_their_bits(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    attended = right(request, config, operands)
    lanes = jnp.arange(attended.pages.shape[-1]) < request.head_dim
    return attended._replace(pages=jnp.where(lanes, attended.pages, operands.pages))


@mistake(
    "new tokens written one slot too far",
    caught_by="test_pages[decode-v3]",
    select="decode",
    says="wrong bytes in written",
    versions=V3_ONLY,
)
def neighboring_slot(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    attended = right(request, config, operands)
    old, new = (each.reshape(*each.shape[:2], -1) for each in (operands.pages, attended.pages))
    written = ((old != new) & ~(jnp.isnan(old) & jnp.isnan(new))).any(axis=-1, keepdims=True)
    pages = jnp.where(jnp.roll(written, 1, axis=1), jnp.roll(new, 1, axis=1), old)
    return attended._replace(pages=pages.reshape(attended.pages.shape))


@mistake(
    "a malformed row is written",
    caught_by="test_invalid_row[v3-None-page past the cache]",
    select="invalid_row",
    says="other bytes than wanted",
    versions=V3_ONLY,
)
def malformed_row_is_written(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    inside = operands._replace(block_tables=jnp.clip(operands.block_tables, 0, request.num_pages - 1))
    return right(request, config, operands)._replace(pages=right(request, config, inside).pages)


@mistake(
    "the last token is taken for unwritten where the call writes none",
    caught_by="test_attending_again_without_writing_changes_nothing[{version}]",
    select="attending_again",
    versions=V3_ONLY,
)
def last_token_is_not_seen(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    if not request.writes_pages:
        operands = operands._replace(context_lens=operands.context_lens - 1)
    return right(request, config, operands)


# The logsumexp.


def change_lse(change: Callable[[jax.Array], jax.Array]) -> Callable[..., Attended]:
    def forward(right: Forward, *args: Any) -> Attended:
        attended = right(*args)
        return attended if attended.lse is None else attended._replace(lse=change(attended.lse))

    return forward


mistake(
    "logsumexp in base 2", caught_by="test_logsumexp[decode-{version}]", select="decode", says="logsumexp: largest"
)(change_lse(lambda lse: lse / np.log(2)))
mistake(
    "parts merged with a logsumexp in base 2",
    caught_by="test_context_in_two_parts_merges_to_the_whole[v2]",
    select="two_parts",
    versions=V2_ONLY,
)(change_lse(lambda lse: lse / np.log(2)))
mistake("logsumexp of dead tokens is 0", caught_by="test_logsumexp[decode-{version}]", select="decode", says="-inf in")(
    change_lse(lambda lse: jnp.where(jnp.isneginf(lse), 0, lse))
)
mistake(
    "logsumexp is NaN", caught_by="test_logsumexp[decode-{version}]", select="decode", says="logsumexp: NaN in tokens"
)(change_lse(lambda lse: jnp.where(jnp.isneginf(lse), lse, jnp.nan)))
mistake("logsumexp in bfloat16", caught_by="test_logsumexp[decode-{version}]", select="decode", says="float32")(
    change_lse(lambda lse: lse.astype(jnp.bfloat16))
)
mistake(
    "logsumexp by head, then token", caught_by="test_logsumexp[decode-{version}]", select="decode", says="got shape"
)(change_lse(lambda lse: lse.T))


@mistake(
    "logsumexp without sinks",
    caught_by="test_logsumexp[sinks-{version}]",
    select="test_logsumexp and (mixed or sinks)",
    says="logsumexp: largest error",
)
def lse_without_sinks(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    plain = right(with_options(request, sinks=False), config, operands._replace(sinks=None))
    return right(request, config, operands)._replace(lse=plain.lse)


@mistake(
    "logsumexp given although nobody requests it",
    caught_by="test_no_logsumexp_unless_requested[{version}]",
    select="decode or requested",
    says="not requested",
)
def lse_in_any_case(right: Forward, request: AttentionRequest, *args: Any) -> Attended:
    return right(dataclasses.replace(request, return_lse=True), *args)


@mistake(
    "no logsumexp, although declared",
    caught_by="test_logsumexp[decode-{version}]",
    select="decode",
    says="got no logsumexp",
)
def lse_never(right: Forward, request: AttentionRequest, *args: Any) -> Attended:
    return right(dataclasses.replace(request, return_lse=False), *args)


# What surrounds the call: settings of JAX, and shard_map.


@mistake(
    "a vector is added to a tile",
    caught_by="test_strict_settings[{version}]",
    select="strict",
    says=r"numpy_rank_promotion(.|\n)*In the case decode",
)
def ranks_are_promoted(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    zeros = jnp.zeros(attended.output.shape[-1], attended.output.dtype)
    return attended._replace(output=attended.output + zeros)


@mistake(
    "indices are compared with others of the default dtype",
    caught_by="test_strict_settings[{version}]",
    select="strict",
    says=r"jax_numpy_dtype_promotion=strict",
)
def dtypes_are_promoted(
    right: Forward, request: AttentionRequest, config: RaggedPageConfig, operands: Operands
) -> Attended:
    live = jnp.arange(request.num_rows) < operands.distribution[2]
    return right(request, config, operands._replace(context_lens=jnp.where(live, operands.context_lens, 0)))


@mistake(
    "default integers are taken for 32 bits",
    caught_by="test_strict_settings_change_no_number[{version}-rank-dtype-x64]",
    select="strict",
)
def default_integers_have_32_bits(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    words = jnp.arange(1).dtype.itemsize // 4
    return attended._replace(output=jnp.roll(attended.output, words - 1, axis=-1))


@mistake(
    "a loop begins with a constant",
    caught_by="test_inside_of_shard_map[{version}]",
    select="shard_map",
    says="varying manual axes",
)
def loop_from_a_constant(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    zeros = jnp.zeros(attended.output.shape, attended.output.dtype)
    total = jax.lax.fori_loop(0, 1, lambda _, total: total + attended.output, zeros)
    return attended._replace(output=total)


@mistake(
    "results of a callback vary over nothing",
    caught_by="test_inside_of_shard_map[{version}]",
    select="shard_map",
    says="got lse that vary over no mesh axis, wanted those of the operands",
)
def lse_of_a_callback(right: Forward, *args: Any) -> Attended:
    attended = right(*args)
    if attended.lse is None or not varying_axes(attended.lse):
        return attended
    kind = jax.ShapeDtypeStruct(attended.lse.shape, attended.lse.dtype)
    return attended._replace(lse=jax.pure_callback(np.asarray, kind, attended.lse))


# What it says of itself.


def describes(name: str, says: str, replaces: str, member: Any) -> None:
    mistake(
        name,
        caught_by="test_description",
        select="description or requested",
        says=says,
        replaces=replaces,
        versions=V3_ONLY,
    )(member)


RIGHT = OracleKernel.features
describes(
    "an option that does not exist",
    "features.options: got alibi, wanted some of attention_chunk_size, compute_dtype",
    "features",
    dataclasses.replace(RIGHT, options=RIGHT.options | {"alibi"}),
)
describes(
    "a cache format that does not exist",
    "features.cache_formats: got zip, wanted some of plain",
    "features",
    dataclasses.replace(RIGHT, cache_formats=frozenset({"plain", "zip"})),
)
describes(
    "a result that does not exist",
    "features.results: got grad, wanted some of lse",
    "features",
    dataclasses.replace(RIGHT, results=frozenset({"lse", "grad"})),
)
describes(
    "facts that JSON does not have",
    "not JSON serializable",
    "facts",
    lambda kernel: {"available": True, "reason": None, "dtypes": {np.float32}},
)
describes(
    "available, for a reason", "assert", "facts", lambda kernel: {"available": True, "reason": "there is no card"}
)
describes("a config_type that is no dataclass", "is_dataclass", "config_type", dict)
describes("objects without a hash", "unhashable", "__hash__", None)
