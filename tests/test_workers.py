"""What all workers of a job must have in common: their fingerprints, and how these are compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from native_library import needs_library

import easydel_ragged_plugin
from easydel_ragged_plugin import (
    FingerprintMismatch,
    RaggedPageConfig,
    check_fingerprints,
    fingerprint,
    hookimpl,
    hooks,
    override_config,
    workers,
)
from easydel_ragged_plugin.kernels import cpu_native
from easydel_ragged_plugin.kernels.xla import XlaKernel
from easydel_ragged_plugin.types import AttentionRequest, Kernel


def test_fingerprint_tells_versions_kernels_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    found = fingerprint()
    assert found["easydel-ragged-plugin"] == easydel_ragged_plugin.__version__
    assert found["jax"] == jax.__version__
    assert {"kernel cpu_native", "kernel xla", "kernel ejkernel"} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())
    assert found == fingerprint()
    with easydel_ragged_plugin.override_config(num_queries_per_block=8):
        assert fingerprint()["config"] != found["config"]
    monkeypatch.setenv("EASYDEL_RAGGED_KERNEL", "xla")
    assert "kernel='xla'" in fingerprint()["config"]


def test_the_odd_one_out_is_named() -> None:
    good: dict[str, str] = {"jax": "0.9.2", "kernel cpu_native": "avx2"}
    check_fingerprints({"a": good, "b": dict(good)})
    workers: dict[Any, Any] = dict.fromkeys("abcd", good)
    with pytest.raises(FingerprintMismatch) as raised:
        check_fingerprints({"first": {**good, "jax": "0.8.3"}, **workers})
    assert str(raised.value).startswith("1 of 5 workers differ, measured by a, b, c and 1 more:\n")
    assert "  first: jax is 0.8.3, not 0.9.2\n" in str(raised.value)


def test_a_worker_without_the_plugin_is_named() -> None:
    with pytest.raises(FingerprintMismatch) as raised:
        check_fingerprints({0: None, 1: {"jax": "0.9.2"}})
    assert "1 of 2 workers differ, measured by 1:\n  0: has no easydel-ragged-plugin; install it" in str(raised.value)
    with pytest.raises(FingerprintMismatch, match="2 of 2 workers differ"):
        check_fingerprints({0: None, 1: None})


def test_a_missing_fact_is_named() -> None:
    with pytest.raises(FingerprintMismatch, match="1: operation v3 is missing, not ours"):
        check_fingerprints({0: {"operation v3": "ours"}, 1: {}})


def test_no_workers_are_an_error() -> None:
    with pytest.raises(ValueError, match="got none, wanted at least one"):
        check_fingerprints({})


def test_one_process_agrees_with_itself() -> None:
    check_fingerprints()


# What differs is named.


def difference(change: Callable[[], None]) -> dict[str, tuple[str, str]]:
    """What :func:`check_fingerprints` has to tell apart after ``change``: by name, on this worker and on the others."""
    before = fingerprint()
    change()
    after = fingerprint()
    names = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    with pytest.raises(FingerprintMismatch) as raised:
        check_fingerprints({"changed": after, **dict.fromkeys("abc", before)})
    assert "1 of 4 workers differ" in str(raised.value)
    for name in names:
        assert f"{name} is {after.get(name, 'missing')}, not {before.get(name, 'missing')}" in str(raised.value)
    return {name: (after.get(name, "missing"), before.get(name, "missing")) for name in names}


@pytest.mark.parametrize("variable", [name for name in workers.VARIABLES if name != "EASYDEL_RAGGED_KERNEL"])
def test_a_variable_that_changes_programs(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert difference(lambda: monkeypatch.setenv(variable, "1")) == {variable: ("1", "unset")}


def test_a_variable_that_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYDEL_RAGGED_KERNEL", "xla")
    found = difference(lambda: monkeypatch.setenv("EASYDEL_RAGGED_KERNEL", "warp"))
    assert found["EASYDEL_RAGGED_KERNEL"] == ("warp", "xla")
    assert found["selection of v3 decode"][1] == "xla kernel='xla'"
    assert found["selection of v3 decode"][0].startswith("kernel 'warp' is unknown.")


def test_every_variable_is_compared_or_left_to_the_kernels() -> None:
    sources = "".join(path.read_text("utf-8") for path in Path(easydel_ragged_plugin.__file__).parent.rglob("*.py"))
    known = set(re.findall(r"EASYDEL_RAGGED_[A-Z]+(?:_[A-Z]+)*", sources))
    in_fingerprints = {"EASYDEL_RAGGED_CACHE", "EASYDEL_RAGGED_NATIVE_LIBRARY"}
    only_speed = {"EASYDEL_RAGGED_HUGE_PAGES"}
    assert known - set(workers.VARIABLES) == in_fingerprints | only_speed


@needs_library
def test_an_instruction_set() -> None:
    best = cpu_native.isa_levels()[0]
    try:
        cpu_native.set_isa(best)
        found = difference(lambda: cpu_native.set_isa("baseline"))
    finally:
        cpu_native.set_isa(None)
    (value,) = found.values()
    assert found.keys() == {"kernel cpu_native"}
    assert value[0].startswith("baseline")
    assert value[1].startswith(best)


@needs_library
def test_a_native_library_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = Path(cpu_native.KERNEL.facts()["library"]).read_bytes()
    for name, more in (("one", b""), ("same", b""), ("other", b"!")):
        (tmp_path / name).write_bytes(content + more)
    monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_LIBRARY", str(tmp_path / "one"))
    one = fingerprint()
    monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_LIBRARY", str(tmp_path / "same"))
    assert fingerprint() == one
    found = difference(lambda: monkeypatch.setenv("EASYDEL_RAGGED_NATIVE_LIBRARY", str(tmp_path / "other")))
    assert found.keys() == {"kernel cpu_native"}


class Configured:
    """A hook plugin that sets a block size for long steps with v3."""

    def __init__(self, pages: int) -> None:
        self.pages = pages

    @hookimpl
    def ragged_config(self, request: AttentionRequest) -> RaggedPageConfig | None:
        if request.version == "v3" and request.num_tokens > 100:
            return RaggedPageConfig(num_kv_pages_per_block=self.pages)
        return None


class OtherKernel(XlaKernel):
    """A kernel whose numbers depend on something."""

    name = "other"
    seed = 1

    def fingerprint(self) -> str:
        return f"seed {self.seed}"


class WithKernel:
    """A hook plugin that adds a kernel."""

    def __init__(self) -> None:
        self.kernel = OtherKernel()

    @hookimpl
    def ragged_kernels(self) -> list[Kernel]:
        return [self.kernel]


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """Registers hook plugins, in order, until the test ends."""
    plugins: list[Any] = []

    def registered(*wanted: Any) -> None:
        for plugin in wanted:
            hooks.register(plugin)
            plugins.append(plugin)

    yield registered
    for plugin in plugins:
        hooks.unregister(plugin)


def test_a_hook_plugin(registered: Callable[..., None]) -> None:
    found = difference(lambda: registered(Configured(2)))
    assert found["hooks"] == (f"{__name__}:Configured", "none")
    assert found.keys() == {"hooks", "selection of v3 prefill"}


def test_a_hook_plugin_of_a_distribution_and_its_version(registered: Callable[..., None]) -> None:
    from importlib import metadata

    module: Any = ModuleType("pluggy.made_up")
    module.ragged_selected = hookimpl(lambda: None, specname="ragged_selected")
    found = difference(lambda: registered(module))
    assert found["hooks"][0] == f"pluggy.made_up = pluggy.made_up (pluggy {metadata.version('pluggy')})"


def test_the_order_of_hook_plugins(registered: Callable[..., None]) -> None:
    first, second = Configured(2), WithKernel()
    registered(first, second)
    one = fingerprint()
    hooks.unregister(first)
    hooks.register(first)
    other = fingerprint()
    assert {name for name in one if one[name] != other[name]} == {"hooks"}
    with pytest.raises(
        FingerprintMismatch, match=r"hooks is .*WithKernel, .*Configured, not .*Configured, .*WithKernel"
    ):
        check_fingerprints({"a": one, "b": one, "c": other})


def test_what_a_hook_configures(registered: Callable[..., None]) -> None:
    plugin = Configured(2)
    registered(plugin)
    chosen = fingerprint()["selection of v3 decode"]
    found = difference(lambda: setattr(plugin, "pages", 4))
    assert found == {
        "selection of v3 prefill": (f"{chosen} num_kv_pages_per_block=4", f"{chosen} num_kv_pages_per_block=2")
    }


def test_what_a_kernel_of_a_hook_says_of_itself(registered: Callable[..., None]) -> None:
    plugin = WithKernel()
    registered(plugin)
    assert fingerprint()["selection of v2 decode"] == "other"
    assert difference(lambda: setattr(plugin.kernel, "seed", 2)) == {"kernel other": ("seed 2", "seed 1")}


def test_an_override_that_selection_sees() -> None:
    before = fingerprint()
    with override_config(num_queries_per_block=8):
        after = fingerprint()
    differing = {name for name in before if before[name] != after[name]}
    probes = {f"selection of {version} {part}" for version in ("v2", "v3") for part in ("decode", "prefill")}
    assert differing == {"config", *probes}
