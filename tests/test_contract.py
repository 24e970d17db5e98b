"""The contract kit on this package's operations, on the oracle itself, and on the host's built-in operations."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from kernel_calls import FEW

from easydel_ragged_plugin import host
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing import CASES, Capabilities, Case, build_batch, case_named
from easydel_ragged_plugin.testing.cases import one_of_each
from easydel_ragged_plugin.testing.contract import RaggedPageAttentionContract, assert_close
from easydel_ragged_plugin.testing.oracle import oracle_operation

pytestmark = pytest.mark.host

OPTIONS = frozenset(each.name for each in dataclasses.fields(Options))

HOST = host.host_version()


def built_in(version: str) -> type:
    """The host's own class, whether or not this package has taken its name."""
    from easydel_ragged_plugin import startup

    registry = host.registry()
    name = f"ragged_page_attention_{version}"
    return startup.original(name) or registry[name]


def failures(*groups: tuple[str, tuple[str, ...]]) -> dict[str, str]:
    """Test names to reasons, from (reason, names) pairs."""
    return {name: reason for reason, names in groups for name in names}


class TestOracleV2(RaggedPageAttentionContract):
    """The kit finds nothing wrong with what it compares to."""

    capabilities: ClassVar = Capabilities(options=OPTIONS)

    @pytest.fixture
    def operation(self) -> type:
        return oracle_operation("v2")


class TestOracleV3(RaggedPageAttentionContract):
    capabilities: ClassVar = Capabilities(options=OPTIONS)

    @pytest.fixture
    def operation(self) -> type:
        return oracle_operation("v3")


# Everything that the kit knows, and nothing left out.
_OURS = Capabilities(options=OPTIONS, forward_methods=("native", "cpu", "gpu", "cuda", "rocm", "tpu"))


@pytest.mark.usefixtures("as_users_compile")
class TestOursV2(RaggedPageAttentionContract):
    """No known failure."""

    capabilities: ClassVar = _OURS

    @pytest.fixture
    def operation(self) -> type:
        from easydel_ragged_plugin.operations import RaggedPageAttnV2

        return RaggedPageAttnV2


@pytest.mark.usefixtures("as_users_compile")
class TestOursV3(RaggedPageAttentionContract):
    capabilities: ClassVar = _OURS

    @pytest.fixture
    def operation(self) -> type:
        from easydel_ragged_plugin.operations import RaggedPageAttnV3

        return RaggedPageAttnV3


# What the built-ins never claimed. Everything that they do claim stays in, and fails below where they are wrong.
_BUILT_IN = Capabilities(
    nan_in_dead_slots=False,
    invalid_rows=False,
    strict_arguments=False,
    compute_dtype_none_keeps_precision=False,
)
_NAN = "a NaN in any gathered page reaches the result, because masked values are multiplied by 0"
_PAIRS = "sliding_window as a pair, which Gemma 4 passes, is a TypeError in ejkernel"
_GROUPS = "softmax_aux of shape [kv_heads, n] is a TypeError in ejkernel, against the operation's own annotation"
_HEAD_DIM_64 = "head_dim 64 can not run: the new keys do not reshape to the cache's layout"
_TABLE = "tables wider than 64 pages and no multiple of 64 wide are read with a clamped slice"
_SUMS = "probabilities and sums are held in bfloat16"
_ENDLESS = "a sliding_window from 2**31 on overflows an int32"
_WINDOW = "the window is measured from the row's last query, so every other query of a prefill sees the wrong keys"


class BuiltIn(RaggedPageAttentionContract):
    """One of the host's own classes, on what it fails and on a few cases more.

    Nothing here changes it, so the other kinds of cases are for ``nox -s host_in_every_case``.
    """

    capabilities: ClassVar = _BUILT_IN

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            fails = {name.partition("[")[2].rstrip("]") or name for name in self.known_failures}
            cases = [
                pytest.param(case, id=case.name, marks=() if case.name in fails or case in FEW else pytest.mark.long)
                for case in CASES
                if case.name in fails or case in one_of_each(CASES)
            ]
            metafunc.parametrize("case", cases)


class TestBuiltInV2(BuiltIn):
    """The host's own v2 on XLA."""

    known_failures: ClassVar = failures(
        (_NAN, ("test_values[poisoned-slots]",)),
        (_PAIRS, ("window-pair", "test_window_past_the_context_equals_none[window5]")),
        (_ENDLESS, tuple(f"test_window_past_the_context_equals_none[{window}]" for window in (2**31, 2**64))),
        (_GROUPS, ("sinks-per-kv-head",)),
        (
            _TABLE,
            (*(f"test_values[table-{width}-pages]" for width in (65, 100, 127, 200)), "test_values[long-context]"),
        ),
        ("NaN when a whole block of keys lies outside the window", ("test_values[window-past-a-block]",)),
        (
            _SUMS,
            (
                "test_values[bfloat16]",
                "test_values[bfloat16-head-dim-64]",
                "test_values[bfloat16-long-sum]",
                "test_values[gqa-9-3-head-dim-64-bfloat16]",
                "test_values[float8-e4m3]",
                "test_values[float8-e4m3-head-dim-128]",
            ),
        ),
        ("compute_dtype=None means bfloat16, also for float32 models", ("test_compute_dtype_none_keeps_precision",)),
    )

    @pytest.fixture
    def operation(self) -> type:
        return built_in("v2")


class TestBuiltInV3(BuiltIn):
    """The host's own v3 on XLA."""

    known_failures: ClassVar = failures(
        (_NAN, ("test_values[poisoned-slots]",)),
        (_PAIRS, ("window-pair", "test_window_past_the_context_equals_none[window5]")),
        (_ENDLESS, tuple(f"test_window_past_the_context_equals_none[{window}]" for window in (2**31, 2**64))),
        (_GROUPS, ("sinks-per-kv-head",)),
        (
            _HEAD_DIM_64,
            (
                "head-dim-64",
                "head-dim-64-window-sinks",
                "gqa-9-3-head-dim-64",
                "gqa-9-3-head-dim-64-bfloat16",
                "bfloat16-head-dim-64",
                "float16",
                "long-context",
            ),
        ),
        (
            _WINDOW,
            tuple(
                f"test_values[{name}]"
                for name in (
                    "window-1",
                    "window-3",
                    "window-7",
                    "window-freed-zeros",
                    "window-freed-stale",
                    "window-past-a-block",
                    "all-options",
                )
            ),
        ),
        (
            "each table entry has a copy of its page, so a page named twice loses new keys",
            ("test_values[repeated-page]",),
        ),
        *(
            [
                (
                    "keys whose dtype is not the cache's can not be written",
                    (
                        "float32-on-bfloat16-cache",
                        "bfloat16-on-float32-cache",
                        "float8-e4m3",
                        "float8-e4m3-head-dim-128",
                        "float8-e5m2",
                        "float8-saturates",
                        "test_view_is_not_returned_where_the_host_would_cast_it",
                    ),
                )
            ]
            if HOST == "0.2.0.2"
            else [
                # Four float8 heads in 32 bits: the reshape of head_dim 64 succeeds there, into the wrong places.
                (_HEAD_DIM_64, ("test_values[float8-e4m3]", "test_new_tokens_are_stored[float8-e4m3]")),
                (
                    "values past the largest finite float8 become NaN",
                    ("test_values[float8-saturates]", "test_new_tokens_are_stored[float8-saturates]"),
                ),
            ]
        ),
    )

    @pytest.fixture
    def operation(self) -> type:
        return built_in("v3")


SCALED = [case for case in CASES if {"k_scale", "v_scale", "scale_arrays"} & case.options.given().keys()]


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("case", SCALED, ids=[case.name for case in SCALED])
def test_functions_take_scales(case: Case, version: str) -> None:
    """The host passes no scales, so these cases meet the functions and not the operations."""
    import jax.numpy as jnp

    import easydel_ragged_plugin

    batch = build_batch(case, version)
    expected, pages = batch.expected()
    index = [jnp.array(a) for a in (batch.context_lens, batch.block_tables, batch.query_start_loc)]
    query, key, value = (jnp.array(a) for a in (batch.queries, batch.keys, batch.values))
    keywords = {**case.options.keywords(), **batch.scales}
    sinks = None if batch.sinks is None else jnp.array(batch.sinks)
    if version == "v2":
        output = easydel_ragged_plugin.ragged_page_attention_v2(
            query, jnp.array(batch.updated_pages), *index, jnp.array(batch.num_seqs), sinks, **keywords
        )
    else:
        output, new_pages = easydel_ragged_plugin.ragged_page_attention_v3(
            query, key, value, jnp.array(batch.pages), *index, jnp.array(batch.distribution), sinks, **keywords
        )
        assert np.array_equal(np.asarray(new_pages).view(np.uint8), pages.view(np.uint8))
    assert_close(np.asarray(output), expected, case)


@pytest.mark.parametrize("kernel", ["xla", "cpu_native"])
def test_q_scale_means_what_it_means_in_ejkernel(kernel: str) -> None:
    """A step of quantization, which cancels; this package does without, and must not multiply by it."""
    import jax.numpy as jnp

    import easydel_ragged_plugin
    from easydel_ragged_plugin.kernels import cpu_native

    if kernel == "cpu_native" and cpu_native.availability() is not None:
        pytest.skip(str(cpu_native.availability()))
    batch = build_batch(case_named("decode"), "v3", poison="finite")
    arrays = (batch.queries, batch.keys, batch.values, batch.pages)
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)
    theirs, ours, without = (
        np.asarray(
            easydel_ragged_plugin.ragged_page_attention_v3(
                *map(jnp.asarray, (*arrays, *index)), config=name, q_scale=q
            )[0]
        )[batch.live_tokens]
        for name, q in (("ejkernel", 0.5), (kernel, 0.5), (kernel, None))
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    assert np.array_equal(ours, without)
