"""Options and results of a call: what is refused while tracing, what a kernel must declare, what comes back."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import easydel_ragged_plugin
from easydel_ragged_plugin import (
    RaggedPageConfig,
    Unsupported,
    explain,
    hookimpl,
    hooks,
    options,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
    select,
    types,
)
from easydel_ragged_plugin.config import KERNEL_VARIABLE
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.kernels.xla import XlaKernel
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.request import FORMATS
from easydel_ragged_plugin.testing.batches import Batch, Version
from easydel_ragged_plugin.testing.cases import build_batch, case_named
from easydel_ragged_plugin.testing.compare import assert_close, assert_lse_close, assert_same_pages
from easydel_ragged_plugin.types import AttentionRequest, Kernel

VERSIONS: tuple[Version, ...] = ("v2", "v3")
NUMBERS = ("softmax_scale", "logits_soft_cap", "q_scale", "k_scale", "v_scale")


# Options check themselves.


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "got True, wanted one Python number, known while tracing"),
        ("2", "got '2', wanted one Python number"),
        (np.ones(2), r"got array\(\[1., 1.\]\), wanted one Python number"),
        (float("nan"), "got nan, wanted a finite number"),
        (float("inf"), "got inf, wanted a finite number"),
    ],
)
def test_numbers_are_finite_and_known(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        Options(**{name: value})


SCALES = [name for name in NUMBERS if name != "logits_soft_cap"]
SIZES = r"wanted a magnitude between 1.18e-38 and 1.7e\+38: kernels hold it in float32"


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("value", [1e39, 1e-39, 2.0**-127, 2.0**128, np.float64(1e300), 5e-324, 2**200])
def test_scales_are_numbers_of_float32(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got {re.escape(str(float(value)))}, {SIZES}"):
        Options(**{name: value})


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("value", [2.0**-126, 2.0**127, 1e36, 3])
def test_scales_at_the_ends_of_float32_are_taken(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    assert getattr(Options(**given), name) == value


@pytest.mark.parametrize("value", [0, 0.0, -(2.0**127), -(2.0**-126)])
def test_softmax_scale_may_be_negative_or_zero(value: Any) -> None:
    assert Options(softmax_scale=value).softmax_scale == value


@pytest.mark.parametrize("name", [*NUMBERS, "mask_value"])
def test_ints_that_no_float_holds_are_refused(name: str) -> None:
    given: dict[str, Any] = {name: -(10**400) if name == "mask_value" else 10**400}
    with pytest.raises(ValueError, match=f"^{name}: got a number that is too large for a float, wanted one of float32"):
        Options(**given)


def test_soft_caps_have_an_end_below_alone() -> None:
    with pytest.raises(ValueError, match=rf"^logits_soft_cap: got 1e-39, {SIZES}"):
        Options(logits_soft_cap=1e-39)
    assert Options(logits_soft_cap=1e300).soft_cap is None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_product_of_scales_that_float32_does_not_hold_is_refused(version: Version) -> None:
    arguments = arguments_of(build_batch(case_named("mixed"), version))
    for scale, k_scale in ((1e30, 1e30), (1e-30, 1e-30), (-1e30, np.array([1.0, 1e30], np.float32))):
        with pytest.raises(
            ValueError, match=rf"^softmax_scale \* k_scale, {re.escape(str(scale))} \* .*: got .*, {SIZES}"
        ):
            explain(FUNCTIONS[version], *arguments, softmax_scale=scale, k_scale=k_scale)
    explain(FUNCTIONS[version], *arguments, softmax_scale=0.0, k_scale=1e30)


@pytest.mark.parametrize("name", ["softmax_scale", "logits_soft_cap", "q_scale"])
def test_numbers_are_known_while_tracing(name: str) -> None:
    def traced(value: Any) -> Any:
        Options(**{name: value})
        return value

    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted one Python number, known while tracing"):
        jax.eval_shape(traced, 2.0)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "softmax_scale"])
@pytest.mark.parametrize("value", [0, -1.5])
def test_caps_and_scales_are_above_zero(name: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name}: got {float(value)}, wanted a number above 0, or None to switch it"
    ):
        Options(**{name: value})


PAIR = r"wanted a pair of token counts, or -1 for no limit"
COUNT = r"wanted an int of at least 1 \(the query's own token counts\), a pair \(left, right\), or None for no window"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sliding_window", 0, f"got 0, {COUNT}"),
        ("sliding_window", True, f"got True, {COUNT}"),
        ("sliding_window", 2.0, f"got 2.0, {COUNT}"),
        ("sliding_window", (3,), rf"got \(3,\), {COUNT}"),
        ("sliding_window", (3, 0.5), rf"got \(3, 0.5\), {COUNT}"),
        ("sliding_window", (-2, 0), rf"got \(-2, 0\), {PAIR}"),
        ("sliding_window", (0, -2), rf"got \(0, -2\), {PAIR}"),
        ("attention_chunk_size", 0, "got 0, wanted a number of tokens, an int of at least 1, or None"),
        ("attention_chunk_size", True, "got True, wanted a number of tokens"),
        ("attention_chunk_size", 8.0, "got 8.0, wanted a number of tokens"),
        ("attention_chunk_size", (8, 0), r"got \(8, 0\), wanted a number of tokens"),
        ("scale_arrays", ("q_scale",), "got q_scale, wanted some of k_scale, v_scale"),
        ("mask_value", -1.0, "got -1.0, wanted None or a number up to -1e.09. Masked keys have no weight"),
        ("mask_value", float("nan"), "got nan, wanted None or a number"),
        ("mask_value", "low", "got 'low', wanted None or a number"),
        ("compute_dtype", "nonsense", "got 'nonsense', wanted a float dtype such as jnp.float32, or None"),
        ("compute_dtype", jnp.int32, "got int32, wanted float32, bfloat16, float16 or float64, or None"),
        ("compute_dtype", jnp.float8_e5m2, "got float8_e5m2, wanted float32, bfloat16, float16 or float64"),
        ("vmem_limit_bytes", 0, "got 0, wanted a number of bytes of at least 1, or None"),
        ("vmem_limit_bytes", 1.5, "got 1.5, wanted a number of bytes"),
        ("vmem_limit_bytes", True, "got True, wanted a number of bytes"),
    ],
)
def test_other_options_say_what_they_want(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        Options(**{name: value})


EVERY: dict[str, Any] = {
    "softmax_scale": -0.5,
    "sliding_window": (6, 3),
    "attention_chunk_size": 8192,
    "logits_soft_cap": 30.0,
    "k_scale": 2.0,
    "v_scale": 3.0,
    "scale_arrays": ("k_scale", "v_scale"),
    "sinks": True,
    "compute_dtype": np.dtype("float32"),
    "vmem_limit_bytes": 4096,
    "update_pages": False,
    "q_scale": 0.5,
    "mask_value": float("-inf"),
    "optimized": True,
}
HINTS = {"q_scale", "mask_value", "optimized"}
ARRAYS: dict[str, Any] = {"scale_arrays": ("k_scale", "v_scale"), "sinks": True}
"""Options that are arrays of the call, and no keywords."""


def test_every_option_is_tested_here() -> None:
    assert list(EVERY) == [each.name for each in dataclasses.fields(Options)]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"sliding_window": np.int64(3)}, 3),
        ({"sliding_window": [np.int32(2), 0]}, (2, 0)),
        ({"softmax_scale": np.float32(0.5)}, 0.5),
        ({"logits_soft_cap": jnp.asarray(2)}, 2.0),
        ({"compute_dtype": jnp.bfloat16}, np.dtype(jnp.bfloat16)),
        ({"mask_value": -1e9}, -1e9),
        ({"optimized": 1}, True),
        ({"k_scale": None}, None),
        ({"attention_chunk_size": np.int32(8)}, 8),
        ({"update_pages": None}, True),
        ({"scale_arrays": ["v_scale", "k_scale"]}, ("k_scale", "v_scale")),
    ],
)
def test_what_is_kept_are_python_values(given: dict[str, Any], kept: Any) -> None:
    ((name, _),) = given.items()
    value = getattr(Options(**given), name)
    assert value == kept
    assert type(value) is type(kept)
    assert hash(Options(**given)) == hash(Options(**{name: kept}))


def test_options_are_frozen_and_equal_by_value() -> None:
    every = Options(**EVERY)
    assert every == Options(**EVERY)
    assert len({every, Options(**EVERY), Options()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        every.sinks = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="k_scale: got 0"):
        dataclasses.replace(every, k_scale=0)


def test_given_are_those_that_are_set() -> None:
    assert options.NO_OPTIONS.given() == {}
    every = Options(**EVERY)
    assert every.given() == EVERY
    assert every.given(hints=False).keys() == EVERY.keys() - HINTS
    assert Options(k_scale=1.0).given() == {"k_scale": 1.0}  # set, though it changes nothing


def test_keywords_are_those_of_the_public_functions() -> None:
    every = Options(**EVERY)
    assert Options(**every.keywords(), **ARRAYS) == every
    assert every.keywords().keys() == options.KEYWORDS
    assert every.keywords().keys() <= inspect.signature(ragged_page_attention_v3).parameters.keys()
    of_v2 = inspect.signature(ragged_page_attention_v2).parameters.keys()
    assert every.keywords().keys() - of_v2 == {"update_pages"}


@pytest.mark.parametrize(
    ("given", "window"),
    [
        (None, None),
        (1, 1),
        (7, 7),
        ((0, 0), 1),
        ((6, 3), 7),
        ((6, -1), 7),
        ((-1, 0), None),
        (2**31 - 1, 2**31 - 1),
        (2**31, None),
        (sys.maxsize, None),
        (2**64, None),
        ((sys.maxsize, 0), None),
        ((2**31 - 1, 0), None),
        ((2**31 - 2, 2**64), 2**31 - 1),
    ],
)
def test_window_counts_the_query_itself(given: Any, window: int | None) -> None:
    assert Options(sliding_window=given).window == window


def test_chunks_past_all_positions_hide_nothing() -> None:
    assert Options(attention_chunk_size=2**31 - 1).chunk == 2**31 - 1
    assert Options(attention_chunk_size=2**31).chunk is None
    assert not Options(attention_chunk_size=2**64, sliding_window=2**64).is_local
    assert Options(attention_chunk_size=4).is_local
    assert Options(sliding_window=4).is_local


def test_text_has_what_changes_a_result() -> None:
    assert str(Options()) == ""
    assert str(Options(sliding_window=3, sinks=True, optimized=True)) == "sliding_window=3 sinks"
    assert str(Options(update_pages=False, q_scale=0.5)) == "update_pages=False"


# A kernel declares what it honors.


@dataclasses.dataclass(frozen=True)
class NewerOptions(Options):
    """As in a later version, with an option that none of today's kernels has heard of."""

    alibi: float | None = dataclasses.field(default=None, metadata={"check": options._number})


class OfAHook(XlaKernel):
    """A kernel of a hook, which came with today's package."""

    name = "of_a_hook"


class Newer(OfAHook):
    """One that honors the new option."""

    name = "newer"
    features = dataclasses.replace(XlaKernel.features, options=XlaKernel.features.options | {"alibi"})


class Plugin:
    def __init__(self, *kernels: Kernel) -> None:
        self.kernels = kernels

    @hookimpl
    def ragged_kernels(self) -> tuple[Kernel, ...]:
        return self.kernels


@pytest.fixture(autouse=True)
def of_a_hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    hooks.register(Plugin(OfAHook()), "today")
    yield
    hooks.unregister("today")


@pytest.fixture
def newer() -> Iterator[None]:
    hooks.register(Plugin(Newer()), "tomorrow")
    yield
    hooks.unregister("tomorrow")


def arguments_of(batch: Batch) -> tuple[Any, ...]:
    """Positional arguments of the public function for this batch."""
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc)
    sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)
    if batch.version == "v2":
        arrays: tuple[Any, ...] = (batch.queries, batch.updated_pages, *index, batch.num_seqs)
    else:
        arrays = (batch.queries, batch.keys, batch.values, batch.pages, *index, batch.distribution)
    return (*map(jnp.asarray, arrays), sinks)


FUNCTIONS: dict[Version, Any] = {"v2": ragged_page_attention_v2, "v3": ragged_page_attention_v3}


def request_for(kernel: Kernel, **changes: Any) -> AttentionRequest:
    """A request for a platform and a cache that the kernel takes, with the new option set."""
    plain = explain(ragged_page_attention_v3, *arguments_of(build_batch(case_named("mixed"), "v3"))).request
    cache_format = next(each for each in FORMATS if each.name in kernel.features.cache_formats)
    platform = "cpu" if "cpu" in kernel.platforms else min(kernel.platforms)
    changes = {"options": NewerOptions(alibi=0.5), "cache_format": cache_format, "platform": platform, **changes}
    return dataclasses.replace(plain, **changes)


NAMES = ("of_a_hook", *select.BUILT_IN)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_a_kernel_does_not_declare_is_its_reason(name: str) -> None:
    kernel = select.kernels()[name]
    request = request_for(kernel)
    assert select.why_not(kernel, request, RaggedPageConfig()) == "takes no alibi"
    with_cap = request_for(kernel, options=NewerOptions(alibi=0.5, logits_soft_cap=2.0))
    assert select.why_not(kernel, with_cap, RaggedPageConfig()) == "takes no alibi"
    default = request_for(kernel, options=NewerOptions())
    assert select.why_not(kernel, default, RaggedPageConfig()) == kernel.refuses(default)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_is_named_refuses_the_option_by_name(name: str) -> None:
    request = request_for(select.kernels()[name])
    with pytest.raises(Unsupported, match=f"^{name}: takes no alibi. Request: .*alibi=0.5"):
        select.select(request, RaggedPageConfig(kernel=name))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "tt"])
def test_no_kernel_is_left(platform: str) -> None:
    """The refusal lists what each kernel says, those first that come first."""
    request = request_for(select.kernels()["xla"], platform=platform)
    with pytest.raises(Unsupported) as refusal:
        select.select(request)
    told = dict(each.split(": ", 1) for each in str(refusal.value).partition(". Request")[0].split("; "))
    assert list(told) == ["of_a_hook", *select.ORDER.get(platform, select.ELSEWHERE)]
    assert told.pop("turboquant") == "takes no plain cache"
    assert set(told.values()) == {"takes no alibi"}


@pytest.mark.usefixtures("newer")
def test_a_kernel_that_declares_the_option_runs() -> None:
    _, selection = select.select(request_for(select.kernels()["newer"]))
    assert selection.kernel == "newer"
    reasons = {refusal.kernel: refusal.reason for refusal in selection.refusals}
    assert reasons["of_a_hook"] == reasons["xla"] == reasons["cpu_native"] == "takes no alibi"


def test_a_hint_needs_no_declaration() -> None:
    hints = NewerOptions(mask_value=-1e10, optimized=True, q_scale=0.5)
    request = request_for(select.kernels()["of_a_hook"], options=hints)
    assert not HINTS & XlaKernel.features.options
    assert select.select(request)[1].kernel == "of_a_hook"


def test_every_option_that_is_declared_exists() -> None:
    for kernel in select.BUILT_IN.values():
        assert kernel.features.options <= EVERY.keys()


# The logsumexp.


KERNELS = [
    "xla",
    pytest.param(
        "cpu_native",
        marks=pytest.mark.skipif(
            cpu_native.availability() is not None or "lse" not in cpu_native.KERNEL.features.results,
            reason=f"cpu_native: {cpu_native.availability()}",
        ),
    ),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_lse_is_the_last_result(version: Version, jit: bool, kernel: str) -> None:
    """v2 gives a pair, v3 a triple; without it they give what they always gave."""
    batch = build_batch(case_named("sinks"), version)
    expected, expected_pages, expected_lse = batch.expected_with_lse()

    def call(*arrays: Any, return_lse: bool) -> Any:
        return FUNCTIONS[version](*arrays, return_lse=return_lse, config=kernel)

    call = jax.jit(call, static_argnames="return_lse") if jit else call
    output, *pages, lse = call(*arguments_of(batch), return_lse=True)
    assert len(pages) == (1 if version == "v3" else 0)
    assert lse.dtype == jnp.float32
    assert lse.shape == batch.queries.shape[:2]
    assert np.isneginf(lse[~batch.live_tokens]).all()
    assert not batch.live_tokens.all()
    assert_close(np.asarray(output), expected, batch.case)
    assert_lse_close(np.asarray(lse), expected_lse, batch.case)
    plain = call(*arguments_of(batch), return_lse=False)
    output = plain if version == "v2" else plain[0]
    assert_close(np.asarray(output), expected, batch.case)
    if version == "v3":
        assert len(plain) == 2
        assert_same_pages(np.asarray(pages[0]), expected_pages)
        assert_same_pages(np.asarray(plain[1]), expected_pages)


@pytest.mark.parametrize("version", VERSIONS)
def test_lse_of_bfloat16_queries_is_float32(version: Version) -> None:
    arguments = arguments_of(build_batch(case_named("bfloat16"), version))
    *_, lse = jax.eval_shape(lambda *arrays: FUNCTIONS[version](*arrays, return_lse=True), *arguments)
    assert lse.dtype == jnp.float32


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_without_it_refuse_it_by_name(version: Version) -> None:
    arguments = arguments_of(build_batch(case_named("mixed"), version))
    with pytest.raises(Unsupported, match=r"^ejkernel: gives no logsumexp \(return_lse\).*with logsumexp"):
        explain(FUNCTIONS[version], *arguments, return_lse=True, config="ejkernel")


class WithoutLse(XlaKernel):
    name = "without_lse"
    features = dataclasses.replace(XlaKernel.features, results=frozenset())


def test_kernels_of_hooks_are_passed_over_unless_they_declare_it() -> None:
    arguments = arguments_of(build_batch(case_named("mixed"), "v3"))
    hooks.unregister("today")
    hooks.register(Plugin(WithoutLse()), "today")
    assert explain(ragged_page_attention_v3, *arguments).kernel == "without_lse"
    selection = explain(ragged_page_attention_v3, *arguments, return_lse=True)
    assert selection.kernel != "without_lse"
    assert select.Refusal("without_lse", "gives no logsumexp (return_lse)") in selection.refusals
    assert selection.request.return_lse
    assert "with logsumexp" in str(selection)


# Annotations mean something at run time, too: users' tools read them.

# `status` is in a module that imports nothing, not even what its annotations name; `hookimpl` is a marker of pluggy.
WITHOUT_HINTS = {"CUSTOM_CALLS", "status", "hookimpl"}
HOST_ONLY = {"RaggedPageAttnV2", "RaggedPageAttnV3"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(
            pytest.param(easydel_ragged_plugin, name, id=name, marks=[pytest.mark.host] if name in HOST_ONLY else [])
            for name in easydel_ragged_plugin.__all__
            if name not in WITHOUT_HINTS
        ),
        *(pytest.param(types, name, id=f"types.{name}") for name in types.__all__ if name != "Version"),
        pytest.param(options, "Options", id="options.Options"),
    ],
)
def test_annotations_resolve(module: Any, name: str) -> None:
    found = getattr(module, name)
    hints = typing.get_type_hints(found)
    if inspect.isfunction(found):
        assert hints.keys() == {*inspect.signature(found).parameters, "return"}
