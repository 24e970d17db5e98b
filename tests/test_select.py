"""Choice of kernel and configuration: order, precedence, hooks, refusals."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel_ragged_plugin import (
    RaggedPageConfig,
    Unsupported,
    hookimpl,
    hooks,
    override_config,
    ragged_page_attention_v2,
    select,
)
from easydel_ragged_plugin.config import KERNEL_VARIABLE, as_config, current_override
from easydel_ragged_plugin.kernels.xla import XlaKernel
from easydel_ragged_plugin.layout import PageLayout, Version, page_shape
from easydel_ragged_plugin.options import Options
from easydel_ragged_plugin.testing.cases import build_batch, case_named
from easydel_ragged_plugin.types import Attended, AttentionRequest, Operands

F4 = np.dtype("float32")
LAYOUT = PageLayout.of("v3", page_shape("v3", 8, 4, 2, 32, F4), 2, 32, F4)
REQUEST = AttentionRequest("v3", "cpu", 4, 4, 2, 32, 4, 8, 8, F4, F4, LAYOUT)


class Picky(XlaKernel):
    """A kernel that refuses for a reason that a test sets."""

    name = "picky"
    platforms = frozenset({"cpu"})
    technologies = frozenset({"picky"})
    reason: str | None = None
    by_name: str | None = None

    def refuses(self, request: AttentionRequest) -> str | None:
        return self.reason

    def only_by_name(self, request: AttentionRequest) -> str | None:
        assert self.reason is None, "it is not asked about what it can't run"
        return self.by_name


class Plugin:
    """A plugin with every hook."""

    def __init__(self) -> None:
        self.kernel: Any = Picky()
        self.config: Any = None
        self.seen: list[select.Selection] = []

    @hookimpl
    def ragged_kernels(self) -> list[Any]:
        return [self.kernel]

    @hookimpl
    def ragged_config(self, request: AttentionRequest) -> Any:
        return self.config

    @hookimpl
    def ragged_selected(self, selection: Any) -> None:
        self.seen.append(selection)


@pytest.fixture
def plugin() -> Iterator[Plugin]:
    plugin = Plugin()
    hooks.register(plugin, "test plugin")
    yield plugin
    hooks.unregister(plugin)


@pytest.fixture(autouse=True)
def no_kernel_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)


def chosen(request: AttentionRequest = REQUEST, config: RaggedPageConfig | None = None) -> str:
    return select.select(request, config)[1].kernel


@pytest.mark.parametrize(
    ("platform", "order"),
    [
        ("cpu", ["cpu_native", "xla", "turboquant", "ejkernel"]),
        ("gpu", ["pallas_gpu", "xla", "turboquant", "ejkernel"]),
        ("tpu", ["pallas_tpu", "xla", "turboquant"]),
        ("tt", ["xla", "turboquant"]),
    ],
)
def test_order_of_each_platform(platform: str, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel in turn is chosen when those before it refuse, and nothing is left when all do."""
    request = dataclasses.replace(REQUEST, platform=platform)
    refusing: set[str] = set()
    monkeypatch.setattr(select, "why_not", lambda kernel, *_: "it refuses" if kernel.name in refusing else None)
    chosen_in_turn = []
    for _ in order:
        chosen_in_turn.append(chosen(request))
        refusing.add(chosen_in_turn[-1])
    assert chosen_in_turn == order
    with pytest.raises(Unsupported, match="; ".join(f"{name}: it refuses" for name in order)):
        chosen(request)


def test_kernel_of_a_hook_comes_first(plugin: Plugin) -> None:
    assert chosen() == "picky"
    assert plugin.seen[-1].kernel == "picky"


def test_refusal_falls_back_and_is_logged(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    plugin.kernel.reason = "head_dim 32 on a Sunday"
    with caplog.at_level(logging.WARNING, logger="easydel_ragged_plugin"):
        _, selection = select.select(REQUEST)
        select.select(REQUEST)
    assert selection.kernel != "picky"
    assert select.Refusal("picky", "head_dim 32 on a Sunday") in selection.refusals
    ours = [record for record in caplog.records if "picky" in record.getMessage()]
    assert [record.getMessage() for record in ours] == [
        f"picky was passed over for {selection.kernel}: head_dim 32 on a Sunday"
    ]


def logged_about_picky(caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, logger="easydel_ragged_plugin"):
        _, selection = select.select(REQUEST)
    assert selection.kernel != "picky"
    return [record.getMessage() for record in caplog.records if "picky" in record.getMessage()]


def test_kernel_that_runs_only_by_name_is_left_out(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    """It is no fallback, so nothing is logged; and a kernel that is not there, or refuses, says that."""
    plugin.kernel.by_name = "it has not been tried"
    assert logged_about_picky(caplog) == []
    assert select.Refusal("picky", "only by name: it has not been tried") in select.select(REQUEST)[1].refusals
    _, selection = select.select(REQUEST, RaggedPageConfig(kernel="xla"))
    assert select.Refusal("picky", "only by name: it has not been tried") in selection.refusals
    assert chosen(config=RaggedPageConfig(kernel="picky")) == "picky"
    with pytest.raises(Unsupported, match=r"picky: only by name: it has not been tried; .*xla: is "):
        chosen(config=RaggedPageConfig(platform="picky"))
    plugin.kernel.reason = "head_dim 32"
    assert select.Refusal("picky", "head_dim 32") in select.select(REQUEST)[1].refusals


@pytest.mark.parametrize("improves_on", [None, "xla"])
def test_refusal_of_what_improves_on_another_kernel_is_not_logged(
    improves_on: str | None, plugin: Plugin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_warned", set())
    plugin.kernel.improves_on = improves_on
    plugin.kernel.reason = "head_dim 32"
    assert len(logged_about_picky(caplog)) == (improves_on is None)


def test_named_kernel_runs_or_raises(plugin: Plugin) -> None:
    plugin.kernel.reason = "head_dim 32"
    with pytest.raises(Unsupported, match=r"picky: head_dim 32\. Request: v3 on cpu"):
        chosen(config=RaggedPageConfig(kernel="picky"))
    assert chosen(config=RaggedPageConfig(kernel="xla")) == "xla"


def test_precedence(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(call: RaggedPageConfig | None = None) -> RaggedPageConfig:
        return select.resolve_config(REQUEST, call)

    assert resolved() == RaggedPageConfig()
    monkeypatch.setenv(KERNEL_VARIABLE, "xla")
    assert resolved().kernel == "xla"
    # The call names block sizes and leaves the kernel open: fields merge.
    assert resolved(RaggedPageConfig(num_kv_pages_per_block=2)) == RaggedPageConfig(
        kernel="xla", num_kv_pages_per_block=2
    )
    assert resolved(RaggedPageConfig(kernel="ejkernel")).kernel == "ejkernel"
    plugin.config = RaggedPageConfig(kernel="picky")
    assert resolved(RaggedPageConfig(kernel="ejkernel", num_warps=8)) == RaggedPageConfig(kernel="picky", num_warps=8)
    with override_config(kernel="xla"):
        assert resolved().kernel == "xla"
        with override_config(num_warps=2):
            assert resolved() == RaggedPageConfig(kernel="xla", num_warps=2)
    assert resolved().kernel == "picky"


def test_override_refuses_what_does_not_exist() -> None:
    with pytest.raises(TypeError, match="blocks"), override_config(blocks=2):
        pass
    with pytest.raises(ValueError, match="num_warps: got 0"), override_config(num_warps=0):
        pass


class Twice(Picky):
    """A kernel whose output tells it from others."""

    def forward(self, request: AttentionRequest, config: RaggedPageConfig, operands: Operands) -> Attended:
        attended = super().forward(request, config, operands)
        return attended._replace(output=2 * attended.output)


@pytest.fixture
def compiled() -> Callable[[], float]:
    """A call of a function that is compiled already: the factor of its output, 1 for a right kernel."""
    batch = build_batch(case_named("decode"), "v2", poison="finite")
    arrays = (batch.queries, batch.updated_pages, batch.context_lens, batch.block_tables, batch.query_start_loc)
    expected = batch.expected()[0]
    outer = jax.jit(lambda *arrays: 1 * jax.jit(ragged_page_attention_v2)(*arrays))

    def factor() -> float:
        output = np.asarray(outer(*arrays, batch.num_seqs))
        found = float(np.sum(output * expected) / np.sum(expected * expected))
        np.testing.assert_allclose(output, found * expected, rtol=1e-4, atol=1e-4)
        return round(found, 3)

    return factor


def test_an_override_reaches_functions_that_are_compiled_already(plugin: Plugin, compiled: Callable[[], float]) -> None:
    plugin.kernel = Twice()

    def chosen_for(**fields: Any) -> tuple[float, list[str]]:
        """The output's factor under an override, and the kernels that were chosen meanwhile: none for a known call."""
        before = len(plugin.seen)
        with override_config(**fields):
            return compiled(), [selection.kernel for selection in plugin.seen[before:]]

    assert compiled() == 2
    assert chosen_for() == (2, [])
    assert chosen_for(kernel="xla") == (1, ["xla"])
    assert chosen_for(kernel="xla") == (1, [])
    assert chosen_for(kernel="xla", num_kv_pages_per_block=1) == (1, ["xla"])
    assert chosen_for(num_kv_pages_per_block=1, kernel="xla") == (1, [])
    assert compiled() == 2
    with override_config(kernel="xla"), concurrent.futures.ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(compiled).result() == 2
        assert compiled() == 1
    with pytest.raises(ZeroDivisionError), override_config(kernel="xla"):
        _ = 1 / 0
    assert current_override() == {}
    assert compiled() == 2


def test_plugins_reach_functions_that_are_compiled_already(
    compiled: Callable[[], float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a JAX that can be told; with another one the log says that they do not."""
    monkeypatch.setattr(hooks, "_told", False)
    told = hasattr(jax.make_user_context(), "set_global")
    plugin = Plugin()
    plugin.kernel = Twice()
    assert compiled() == 1
    with caplog.at_level(logging.WARNING, logger="easydel_ragged_plugin"):
        hooks.register(plugin, "twice")
        try:
            assert compiled() == (2 if told else 1)
        finally:
            hooks.unregister("twice")
        assert compiled() == 1
    assert len(plugin.seen) == (1 if told else 0)
    logged = [record.getMessage() for record in caplog.records if "hook plugin" in record.getMessage()]
    assert logged == ([] if told else [logged[0]])
    assert all("'twice' was registered after kernels had been chosen" in line for line in logged)


def test_soft_cap_of_the_config_becomes_the_requests(plugin: Plugin) -> None:
    plugin.config = RaggedPageConfig(logits_soft_cap=30)
    selection = select.select(REQUEST)[1]
    assert selection.request.options.logits_soft_cap == 30.0
    assert "logits_soft_cap=30.0" in str(selection)
    same = dataclasses.replace(REQUEST, options=Options(logits_soft_cap=30.0))
    assert select.select(same)[1].request == same
    other = dataclasses.replace(REQUEST, options=Options(logits_soft_cap=50.0))
    with pytest.raises(ValueError, match=r"logits_soft_cap: the call passes 50.0, and the config has 30.0"):
        select.select(other)


def test_hook_config_of_a_wrong_type_is_refused(plugin: Plugin) -> None:
    plugin.config = {"kernel": "xla"}
    with pytest.raises(ValueError, match="hook ragged_config: got dict"):
        chosen()


def test_hook_kernel_that_is_none_is_refused(plugin: Plugin) -> None:
    plugin.kernel = object()
    with pytest.raises(ValueError, match=r"hook ragged_kernels: got .*wanted an object with name"):
        chosen()


def test_kernel_names_are_unique(plugin: Plugin) -> None:
    plugin.kernel.name = "xla"
    try:
        with pytest.raises(ValueError, match="the name 'xla' is taken"):
            chosen()
    finally:
        plugin.kernel.name = "picky"


def test_bad_hook_implementation_is_refused_by_name() -> None:
    class UnknownHook:
        @hookimpl
        def ragged_kernel(self) -> None: ...

    class UnknownArgument:
        @hookimpl
        def ragged_config(self, shape: Any) -> None: ...

    with pytest.raises(ValueError, match=r"hook plugin 'mine': no hook is called ragged_kernel. Hooks: ragged_config"):
        hooks.register(UnknownHook(), "mine")
    with pytest.raises(ValueError, match=r"(?s)hook plugin 'mine'.*ragged_config.*shape"):
        hooks.register(UnknownArgument(), "mine")
    with pytest.raises(ValueError, match="nothing in it is marked with @hookimpl"):
        hooks.register(object(), "mine")
    assert not hooks.manager().has_plugin("mine")
    assert chosen() == chosen(dataclasses.replace(REQUEST))  # and selection still works


def test_unregistering_a_stranger_is_refused() -> None:
    with pytest.raises(ValueError, match="hook plugin 'nobody' is not registered"):
        hooks.unregister("nobody")


def test_hook_kernel_runs(plugin: Plugin) -> None:
    batch = build_batch(case_named("mixed"), "v2")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)
    output = ragged_page_attention_v2(batch.queries, batch.updated_pages, *index)
    np.testing.assert_allclose(output, batch.expected()[0], rtol=2e-5, atol=2e-5)
    assert plugin.seen[-1].kernel == "picky"


@pytest.mark.parametrize("bad", [{"kernel": ""}, {"num_stages": True}, {"platform": None}, {"num_warps": 1.5}])
def test_config_refuses_bad_fields(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}: got"):
        RaggedPageConfig(**bad)


def test_config_class_instead_of_object_is_refused() -> None:
    with pytest.raises(ValueError, match="config: got type"):
        as_config(RaggedPageConfig)


@pytest.mark.host
def test_host_config_classes_are_accepted() -> None:
    from ejkernel.modules.operations.configs import (
        FlashAttentionConfig,
        RaggedPageAttentionv2Config,
        RaggedPageAttentionv3Config,
    )

    v3 = RaggedPageAttentionv3Config(chunk_prefill_size=64, num_kv_pages_per_block=2, num_warps=8, platform="xla")
    assert as_config(v3) == RaggedPageConfig(
        chunk_prefill_size=64, num_kv_pages_per_block=2, num_warps=8, platform="xla", from_host=True
    )
    v2 = as_config(RaggedPageAttentionv2Config())
    assert v2 is not None
    assert v2.platform == "auto"
    with pytest.raises(ValueError, match="config: got FlashAttentionConfig"):
        as_config(FlashAttentionConfig())


@pytest.mark.host
def test_defaults_of_a_host_config_are_nobodys_choice() -> None:
    """Its classes always hold 4 warps and 1 stage, which would switch off the pipelining of another kernel."""
    from ejkernel.modules.operations.configs import RaggedPageAttentionv2Config, RaggedPageAttentionv3Config

    for host_class in (RaggedPageAttentionv2Config, RaggedPageAttentionv3Config):
        config = as_config(host_class(num_queries_per_block=16))
        assert config is not None
        assert (config.num_queries_per_block, config.num_warps, config.num_stages) == (16, None, None)
        config = as_config(host_class(num_warps=2, num_stages=3))
        assert config is not None
        assert (config.num_warps, config.num_stages) == (2, 3)


@pytest.mark.host
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_ejkernel_is_given_the_host_config_that_was_given(version: Version) -> None:
    """An empty one, too: it means that block sizes are not tuned on the first call."""
    from ejkernel.modules.operations import configs

    from easydel_ragged_plugin.kernels.ejkernel import host_config

    host_class = getattr(configs, f"RaggedPageAttention{version}Config")
    request = dataclasses.replace(REQUEST, version=version)
    for given in (host_class(), host_class(num_warps=4, num_stages=1), host_class(num_stages=3)):
        config = as_config(given)
        assert config is not None
        assert host_config(request, config) == given
    assert host_config(request, RaggedPageConfig()) is None


@pytest.mark.host
def test_ejkernel_by_name_is_the_hosts_call() -> None:
    batch = build_batch(case_named("decode"), "v2", poison="finite")
    index = (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.num_seqs)
    call = jax.jit(lambda *arrays: ragged_page_attention_v2(*arrays, config="ejkernel"))
    output = call(jnp.array(batch.queries), jnp.array(batch.updated_pages), *map(jnp.array, index))
    live = batch.live_tokens
    np.testing.assert_allclose(np.asarray(output)[live], batch.expected()[0][live], rtol=1e-4, atol=1e-4)
