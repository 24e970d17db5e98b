"""The operations in the host's hands: traps of its contract that the contract kit does not reach."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import easydel_ragged_plugin
from easydel_ragged_plugin import RaggedPageConfig, Unsupported, host, model_config, override_config, startup
from easydel_ragged_plugin.options import KEYWORDS, Options
from easydel_ragged_plugin.testing.cases import CASES, build_batch, case_named
from easydel_ragged_plugin.testing.driver import Driver, ForwardingView

pytestmark = pytest.mark.host
VERSIONS = ("v2", "v3")


def operation_class(version: str) -> Any:
    from easydel_ragged_plugin import operations

    return operations.RaggedPageAttnV2 if version == "v2" else operations.RaggedPageAttnV3


@pytest.fixture(params=VERSIONS)
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(operation_class(request.param))


def call(driver: Driver, *, view: Any = None, metadata: Any = None, **arguments: Any) -> Any:
    """Call the operation eagerly on the mixed batch, with some arguments replaced."""
    batch = build_batch(case_named("mixed"), driver.version)
    pages = batch.pages if driver.version == "v3" else batch.updated_pages
    arrays = {"query": batch.queries[None], "key": batch.keys[None], "value": batch.values[None]}
    return driver.instance()(
        **{
            **{name: jnp.array(array) for name, array in arrays.items()},
            "cache_view": view or driver.view(batch, pages),
            "cache_metadata": metadata or driver.metadata(batch),
            **driver.arguments(batch.case, batch.queries.shape[0], None),
            **arguments,
        }
    )


def test_class_names_do_not_tell_gemma4_to_shorten_its_window(driver: Driver) -> None:
    # EasyDeL's Gemma 4 looks for these words in the class's name, and passes N - 1 for a window of N.
    assert not any(word in driver.operation.__name__.lower() for word in ("ragged", "page", "decode", "unified"))


def test_class_names_lead_to_the_classes(driver: Driver) -> None:
    cls, version = driver.operation, driver.version.upper()
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert getattr(easydel_ragged_plugin, f"RaggedPageAttn{version}") is cls
    assert repr(cls) == f"<class 'easydel_ragged_plugin.operations.RaggedPageAttn{version}'>"


def test_gemma4_passes_its_whole_window(driver: Driver) -> None:
    name = "easydel.modules.gemma4.modeling_gemma4"
    Gemma4Attention = pytest.importorskip(name, reason="EasyDeL 0.2.0.2 has no Gemma 4").Gemma4Attention
    layer = SimpleNamespace(
        sliding_window=20,
        attention_performer=SimpleNamespace(impl=driver.instance()),
        _hf_sliding_window=Gemma4Attention._hf_sliding_window,
    )
    assert Options(sliding_window=Gemma4Attention._kernel_sliding_window(layer)).window == 20


def test_registry_serves_ours_and_keeps_the_hosts() -> None:
    startup.activate()
    loaded = host.load()
    for version in VERSIONS:
        name = f"ragged_page_attention_{version}"
        assert loaded.OperationRegistry.get(name) is operation_class(version)
        previous = startup.original(name)
        assert previous is not None
        assert previous.__module__.startswith("easydel.")


def test_requirements_equal_the_hosts() -> None:
    for version in VERSIONS:
        previous: Any = startup.original(f"ragged_page_attention_{version}")
        assert previous is not None
        ours = operation_class(version)
        for mode in host.load().ExecutionMode:
            assert ours.get_requirements(mode) == previous.get_requirements(mode)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("bias", jnp.zeros((1, 1, 1, 1)), "bias, such as ALiBi's of MPT.*use attn_mechanism='sdpa'"),
        ("causal", False, "causal=False, and no causal mask in mask_info"),
        ("mask_info", SimpleNamespace(token_type_ids_baked_in=True), "mask_info with token_type_ids"),
        ("mask_info", SimpleNamespace(sliding_window_baked_in=True), "mask_info with a sliding window"),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(driver: Driver, argument: str, value: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        call(driver, **{argument: value})


def test_dropout_is_refused_only_where_it_would_act(driver: Driver) -> None:
    call(driver, dropout_prob=0.1, deterministic=True)
    with pytest.raises(Unsupported, match="dropout"):
        call(driver, dropout_prob=0.1, deterministic=False)


def test_unknown_argument_is_named(driver: Driver) -> None:
    with pytest.raises(TypeError, match="got unknown arguments attention_temperature"):
        call(driver, attention_temperature=2.0)


def test_view_without_pages_is_refused(driver: Driver) -> None:
    with pytest.raises(ValueError, match="cache_view: got object, wanted a view with kv_pages"):
        call(driver, view=object())


class UnknownView:
    """A cache view of some other mechanism: it has pages, and they are not ours."""

    def __init__(self, pages: Any, metadata: Any) -> None:
        self.kv_pages, self.metadata = pages, metadata


def test_view_of_an_unknown_class_is_refused_by_name(driver: Driver) -> None:
    batch = build_batch(case_named("mixed"), driver.version)
    known = driver.view(batch, batch.pages)
    latent = UnknownView(jnp.zeros((8, 4, 96)), known.metadata)  # one row of numbers for each token, as MLA stores them
    with pytest.raises(
        ValueError, match=r"got UnknownView with pages of shape \(8, 4, 96\), wanted pages of [45] axes"
    ):
        call(driver, view=latent)
    with pytest.raises(Unsupported, match="pages of type dict"):
        call(driver, view=UnknownView({"quantized": known.kv_pages}, known.metadata))


def test_view_of_the_other_version_is_refused(driver: Driver) -> None:
    other = Driver(operation_class("v3" if driver.version == "v2" else "v2"))
    batch = build_batch(case_named("mixed"), other.version)
    with pytest.raises(
        ValueError, match=f"wanted pages of .* axes, as RaggedPagesCacheView has them for {driver.version}"
    ):
        call(driver, view=other.view(batch, batch.pages))


def test_missing_distribution_is_refused() -> None:
    driver = Driver(operation_class("v3"))
    batch = build_batch(case_named("mixed"), "v3")
    metadata = driver.metadata(batch).replace(request_distribution=None)
    with pytest.raises(ValueError, match="request_distribution: got None"):
        call(driver, metadata=metadata)


def test_bad_call_leaves_the_view_alone() -> None:
    driver = Driver(operation_class("v3"))
    batch = build_batch(case_named("mixed"), "v3")
    view = driver.view(batch, batch.pages)
    before = view.kv_pages
    with pytest.raises(ValueError, match="sliding_window"):
        call(driver, view=view, sliding_window=0)
    assert view.kv_pages is before


def test_layers_that_share_a_cache() -> None:
    """A later layer of Gemma 4 has another's view, keys and values: it stores them again, or nothing where told so."""
    driver = Driver(operation_class("v3"))
    batch = build_batch(case_named("mixed"), "v3")
    view = driver.view(batch, batch.pages)
    first = call(driver, view=view).attention_outputs
    pages = np.asarray(view.kv_pages)
    again = call(driver, view=view).attention_outputs
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(np.asarray(view.kv_pages), pages)
    other = jnp.full((1, *batch.keys.shape), 7.0)
    reading = call(driver, view=view, update_pages=False, key=other, value=other).attention_outputs
    np.testing.assert_array_equal(reading, first)
    np.testing.assert_array_equal(np.asarray(view.kv_pages), pages)


@pytest.mark.parametrize("version", VERSIONS)
def test_config_of_the_host_is_read(version: str) -> None:
    from ejkernel.modules.operations.configs import RaggedPageAttentionv2Config, RaggedPageAttentionv3Config

    driver = Driver(operation_class(version))
    metadata = driver.instance().metadata
    name = f"ragged_page_attention_{version}"
    config_class = RaggedPageAttentionv2Config if version == "v2" else RaggedPageAttentionv3Config
    metadata.operation_configs = {name: config_class(platform="mosaic")}
    assert metadata.get_operation_config(name) is not None
    with pytest.raises(Unsupported, match="the config names platform 'mosaic'"):
        call(driver)
    metadata.operation_configs = {name: object()}
    with pytest.raises(ValueError, match="config: got object"):
        call(driver)
    metadata.operation_configs = None
    call(driver)


@contextlib.contextmanager
def model_of(driver: Driver, **fields: Any) -> Iterator[Any]:
    """Give the operation a model's configuration. Yields the operation's metadata."""
    metadata = driver.instance().metadata
    config = SimpleNamespace(mesh=metadata.mesh, **fields)
    metadata.base_config = config
    try:
        yield metadata
    finally:
        metadata.base_config = metadata.operation_configs = None


def close(output: Any, options: Options, driver: Driver) -> bool:
    """Whether an output of :func:`call` is the oracle's under ``options``."""
    case = dataclasses.replace(case_named("mixed"), options=options)
    expected, _ = build_batch(case, driver.version).expected()
    return np.allclose(np.asarray(output.attention_outputs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("portable", [False, True])
def test_soft_cap_of_the_model_is_taken_where_none_is_passed(
    driver: Driver, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portable:
        monkeypatch.setenv("FORCE_NATIVE_RUNTIME", "true")
    none, model, config, override, passed = (Options(logits_soft_cap=cap) for cap in (None, 0.25, 0.5, 1.0, 2.0))
    assert not close(call(driver), model, driver)
    assert close(call(driver), none, driver)
    with model_of(driver, attn_logit_softcapping=0.25) as metadata:
        assert close(call(driver), model, driver)
        assert close(call(driver, logits_soft_cap=2.0), passed, driver)
        metadata.operation_configs = {driver.name: RaggedPageConfig(logits_soft_cap=0.5)}
        assert close(call(driver), config, driver)
        with override_config(logits_soft_cap=1.0):
            assert close(call(driver), override, driver)
        with pytest.raises(ValueError, match=r"logits_soft_cap: the call passes 2.0, and the config has 0.5"):
            call(driver, logits_soft_cap=2.0)
    with model_of(driver, attn_logit_softcapping=None):
        assert close(call(driver), none, driver)


def test_soft_cap_of_the_model_is_logged_once(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    model_config._say_once.cache_clear()
    with model_of(driver, attn_logit_softcapping=0.25), caplog.at_level(logging.INFO, "easydel_ragged_plugin"):
        call(driver)
        call(driver)
    (line,) = [each.message for each in caplog.records if "attn_logit_softcapping" in each.message]
    assert line.startswith("logits_soft_cap=0.25: EasyDeL does not pass it, so it was taken from")


LLAMA4 = {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]}


def chunked_mask() -> Any:
    """The mask that Llama 4 hands to all of its layers."""
    from ejkernel.types import MaskInfo

    return MaskInfo.from_segments(jnp.ones((1, 16), jnp.int32)).apply_chunked(8)


@pytest.mark.parametrize(("layer", "size"), [(0, 8), (1, None)])
def test_chunks_of_the_mask_are_honored_in_the_layers_that_have_them(
    driver: Driver, layer: int, size: int | None
) -> None:
    batch = build_batch(case_named("mixed"), driver.version)
    view = driver.view(batch, batch.pages if driver.version == "v3" else batch.updated_pages)
    view.layer_index = layer
    with model_of(driver, **LLAMA4):
        output = call(driver, view=view, causal=False, mask_info=chunked_mask())
    assert close(output, Options(attention_chunk_size=size), driver)
    assert not close(output, Options(attention_chunk_size=None if size else 8), driver)


def test_a_mask_that_says_causal_is_taken(driver: Driver) -> None:
    from ejkernel.types import MaskInfo

    causal = MaskInfo.from_segments(jnp.ones((1, 16), jnp.int32)).apply_causal()
    assert close(call(driver, causal=False, mask_info=causal), Options(), driver)


def test_chunks_of_unknown_size_or_layers_are_refused(driver: Driver) -> None:
    arguments = {"causal": False, "mask_info": chunked_mask()}
    with pytest.raises(Unsupported, match="mask_info with chunks, and the model's config has no attention_chunk_size"):
        call(driver, **arguments)
    with model_of(driver, **{**LLAMA4, "layer_types": ["full_attention"] * 0}):
        assert close(call(driver, **arguments), Options(attention_chunk_size=8), driver)
    assert close(call(driver, **arguments, attention_chunk_size=4), Options(attention_chunk_size=4), driver)
    batch = build_batch(case_named("mixed"), driver.version)
    hybrid = ForwardingView(driver.view(batch, batch.pages))
    with (
        model_of(driver, **LLAMA4),
        pytest.raises(Unsupported, match="chunks for some of the 2 layers, and cache_view has layer_index None"),
    ):
        call(driver, view=hybrid, **arguments)


def test_forced_native_runtime_takes_the_portable_kernel(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from easydel_ragged_plugin import hookimpl, hooks

    seen: list[Any] = []

    class Watch:
        @hookimpl
        def ragged_selected(self, selection: Any) -> None:
            seen.append(selection)

    watch = Watch()
    hooks.register(watch)
    try:
        monkeypatch.setenv("FORCE_NATIVE_RUNTIME", "true")
        call(driver)
    finally:
        hooks.unregister(watch)
    assert seen[-1].kernel == "xla"
    assert seen[-1].config.kernel == "xla"


def test_pages_of_another_dtype_survive_the_hosts_cast() -> None:
    # 0.2.0.2's attention layer casts every leaf of the output to the model's dtype: the view alone may carry pages.
    driver = Driver(operation_class("v3"))
    case = next(case for case in CASES if case.cache_dtype == "bfloat16" and case.dtype == "float32")
    outcome = driver.call(build_batch(case, "v3"))
    assert outcome.pages.dtype == jnp.bfloat16
    assert outcome.returned_view == ("none" if host.load().casts_returned_pages else "same")


def test_operation_objects_are_hashable(driver: Driver) -> None:
    # The host's graph definition, which holds them, is a static argument of jit.
    first, second = driver.instance(), driver.operation(driver.instance().metadata)
    assert hash(first) == hash(first)
    assert first != second


def test_every_argument_of_the_attention_layer_is_known() -> None:
    """The host's own list: what its attention layer passes must be an argument of ours, or listed as no concern."""
    import ast
    import inspect
    import textwrap

    from easydel.layers import attention

    module = inspect.getmodule(attention.FlexibleAttentionModule)
    assert module is not None
    tree = ast.parse(textwrap.dedent(inspect.getsource(module)))
    passed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            names = {keyword.arg for keyword in node.keywords if keyword.arg}
            if {"query", "cache_view", "cache_metadata"} <= names:
                passed |= names
    assert passed, "the attention layer builds its arguments another way now: read it again"
    from easydel_ragged_plugin.operations import RaggedPageAttnV3

    ours = KEYWORDS | set(inspect.signature(RaggedPageAttnV3._forward).parameters)
    assert passed <= ours | host.PASSED_ARGUMENTS


def test_positional_heads_of_three_dimensions_keep_their_shape(driver: Driver) -> None:
    batch = build_batch(case_named("mixed"), driver.version)
    flat = {
        name: jnp.array(array)
        for name, array in (("query", batch.queries), ("key", batch.keys), ("value", batch.values))
    }
    output = call(driver, **flat)
    assert output.attention_outputs.shape == batch.queries.shape
    assert isinstance(output.attention_outputs, jax.Array)


def test_the_hosts_update_of_v2_converts_a_bfloat16_cache_and_no_other() -> None:
    # docs/tuning.md and `doctor` say so. Once this fails, EasyDeL or XLA has mended it.
    try:
        from easydel.caching.ragged_page.utils import kv_cache_update_jax
    except ImportError:  # 0.2.0.2
        from easydel.layers.caching.ragged_page.utils import kv_cache_update_jax

    def bytes_beside_the_cache(dtype: str) -> int:
        pages, new = jnp.zeros((8192, 4, 64), dtype), jnp.ones((2, 4, 64), dtype)
        slices, count = jnp.zeros((3, 4), jnp.int32), jnp.ones((1,), jnp.int32)

        def update(pages: jax.Array) -> jax.Array:
            return kv_cache_update_jax(new, slices, pages, count, page_size=64)

        memory = jax.jit(update, donate_argnums=0).lower(pages).compile().memory_analysis()
        assert memory is not None
        return int(memory.temp_size_in_bytes)

    of_cache = 8192 * 4 * 64 * 4  # as float32
    assert bytes_beside_the_cache("bfloat16") >= of_cache
    assert bytes_beside_the_cache("float16") < of_cache // 8
