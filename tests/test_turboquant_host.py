"""TurboQuant caches of EasyDeL 0.3.0 in the operations: the results of the host's class, and what it gets wrong."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from turboquant_oracle import check_written, constants, expected_output

from easydel_ragged_plugin import RaggedPageConfig, Unsupported, host, startup
from easydel_ragged_plugin.testing.cases import Batch, Case, Row, build_batch
from easydel_ragged_plugin.testing.driver import Driver
from easydel_ragged_plugin.turboquant import ARRAYS, TurboQuantPages

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(host.host_version() != "0.3.0", reason="TurboQuant caches came with EasyDeL 0.3.0"),
]
PREFILL = Case("turboquant", (Row(7, 7), Row(12, 12), Row(21, 21)), num_tokens=44, num_rows=4)
DECODE = dataclasses.replace(PREFILL, rows=(Row(8, 1), Row(13, 1), Row(22, 1)), num_tokens=4)


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host tunes block sizes on the first call of a shape, for a minute, and keeps what it found in a file."""
    if host.host_version() != "0.3.0":
        return
    from ejkernel.ops.config.cache import ConfigCache

    for version in ("v2", "v3"):
        name = f"ragged_page_attention_{version}_turboquant"
        module = importlib.import_module(f"ejkernel.modules.operations.{name}")
        chooser = getattr(module, f"_{name.removesuffix('turboquant')}tq_executor").chooser
        monkeypatch.setattr(chooser.policy, "cache_miss_fallback", "heuristics")
        monkeypatch.setattr(chooser, "persistent", None)
        monkeypatch.setattr(chooser, "cache", ConfigCache())


class Served:
    """One cache, and the operations of both versions over it: v3's writes, either reads.

    Args:
        case: geometry.
        ours: this package's classes; else those that held the names before.
    """

    def __init__(self, case: Case, ours: bool = True) -> None:
        from easydel.caching.turboquant_ragged_page import TurboQuantRaggedPagesCacheConfig
        from easydel.layers.quantization._turboquant import TurboQuantConfig, TurboQuantConstants

        from easydel_ragged_plugin import operations

        startup.activate()
        classes = {"v2": operations.RaggedPageAttnV2, "v3": operations.RaggedPageAttnV3}
        self.drivers = {version: Driver(each) for version, each in classes.items()}
        self.metadata = self.drivers["v3"].instance().metadata
        self.operations: dict[str, Any] = {}
        for version, each in classes.items():
            held = each if ours else startup.original(f"ragged_page_attention_{version}")
            assert held is not None
            self.operations[version] = held(self.metadata)
        parts = {"mesh": self.metadata.mesh, "partition_manager": self.metadata.partition_manager}
        with self.drivers["v3"].mesh:
            config = TurboQuantRaggedPagesCacheConfig.create(
                **parts,
                turboquant_config=TurboQuantConfig(),
                num_hidden_layers=1,
                num_kv_heads=case.kv_heads,
                kv_head_dim_size=case.head_dim,
                max_model_length=case.pages_per_row * case.page_size,
                page_size=case.page_size,
                hbm_utilization=0.1,
            ).replace(num_pages=case.num_pages)
            rotation, projection, *codebooks = constants(case.head_dim)  # the host takes 20 s to make its own
            made = TurboQuantConstants(*codebooks, rotation, projection, qjl_dim=case.head_dim, bits=4)
            self.view = host.load().TurboQuantRaggedPagesCacheView.init(config, 0, constants=made, **parts)

    def call(self, batch: Batch, version: str = "v3") -> np.ndarray:
        """Output of one call, compiled as a server compiles it; the view has the arrays after it."""
        driver = self.drivers[version]

        def step(pages: Any, metadata: Any, query: Any, key: Any, value: Any, sinks: Any) -> Any:
            view = self.view.replace(**pages)  # a view can't go through jit: it carries its constants as metadata
            output = self.operations[version](
                query=query,
                key=key,
                value=value,
                cache_view=view,
                cache_metadata=metadata,
                softmax_aux=sinks,
                **driver.arguments(batch.case, query.shape[1], None),
            )
            assert version == "v2" or output.cache_view is view
            return output.attention_outputs, {name: getattr(view, name) for name in pages}

        arrays = (jnp.asarray(each[None]) for each in (batch.queries, batch.keys, batch.values))
        sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)
        compiled = jax.jit(step)
        pages = {f"{name}_pages": getattr(self.view, f"{name}_pages") for name in ARRAYS}
        output, pages = compiled(pages, driver.metadata(batch), *arrays, sinks)
        self.view = self.view.replace(**pages)
        return np.asarray(output)[0]

    @property
    def pages(self) -> TurboQuantPages:
        """The cache as the functions take it."""
        from easydel_ragged_plugin import views

        return views.adapter_of(self.view).read(self.view, "v3")

    def take(self, other: Served) -> None:
        """Go on with another's cache."""
        self.view = other.view


def test_results_are_those_of_the_hosts_class() -> None:
    """Prompts, a token after them with what the host has stored, and that token read by v2: with sinks and a cap.

    Softmax in another order of sums: 1e-5. What is stored equals the host's but where a coordinate lies between two
    centroids, or a projection at 0; the oracle says which may be stored, and the outputs are compared over one cache.
    """
    case = dataclasses.replace(PREFILL.with_options(logits_soft_cap=2.0), sinks="heads")
    batch = build_batch(case, "v3")
    ours, theirs = Served(case), Served(case, ours=False)
    empty = ours.pages
    output, wanted = ours.call(batch), theirs.call(batch)
    live = batch.live_tokens
    check_written(batch, empty, ours.pages)
    np.testing.assert_allclose(output, expected_output(batch, ours.pages), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wanted, expected_output(batch, theirs.pages), rtol=1e-5, atol=1e-5)
    for name in ARRAYS:
        got, stored = (np.asarray(getattr(each.pages, name))[batch.written_slots] for each in (ours, theirs))
        assert (got == stored).mean() > 0.995, name
    assert not output[~live].any()


def test_a_cache_of_the_hosts_class_is_read_as_it_reads_it() -> None:
    batch = build_batch(DECODE, "v3")
    prompts = build_batch(PREFILL, "v3")
    ours, theirs = Served(PREFILL), Served(PREFILL, ours=False)
    prompts = dataclasses.replace(prompts, block_tables=batch.block_tables)
    theirs.call(prompts)
    ours.take(theirs)
    for version in ("v2", "v3"):
        wanted, output = theirs.call(batch, version), ours.call(batch, version)
        np.testing.assert_allclose(output[:3], wanted[:3], rtol=1e-5, atol=1e-5, err_msg=version)
        ours.take(theirs)


@pytest.mark.parametrize("how", ["config", "config of TurboQuant", "environment"])
def test_the_hosts_code_serves_unchanged_where_it_is_named(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = build_batch(PREFILL, "v3")
    named, theirs = Served(PREFILL), Served(PREFILL, ours=False)
    if how == "environment":
        monkeypatch.setenv("EASYDEL_RAGGED_KERNEL", "ejkernel")
    else:
        name = "ragged_page_attention_v3" + ("_turboquant" if "of" in how else "")
        named.metadata.operation_configs = {name: RaggedPageConfig(kernel="ejkernel")}
    np.testing.assert_array_equal(named.call(batch)[batch.live_tokens], theirs.call(batch)[batch.live_tokens])
    for name in ARRAYS:
        got, wanted = (np.asarray(getattr(each.view, f"{name}_pages")) for each in (named, theirs))
        np.testing.assert_array_equal(got[batch.written_slots], wanted[batch.written_slots], err_msg=name)
    if how == "environment":
        batch = build_batch(DECODE, "v3")
        named.take(theirs)
        np.testing.assert_array_equal(named.call(batch, "v2")[:3], theirs.call(batch, "v2")[:3])


def test_window_holds_for_every_query() -> None:
    """The host's class lets the window of a row's last query hide keys from the earlier ones."""
    batch = build_batch(PREFILL.with_options(sliding_window=5), "v3")
    ours, theirs = Served(batch.case), Served(batch.case, ours=False)
    output, wanted = ours.call(batch), theirs.call(batch)
    np.testing.assert_allclose(output, expected_output(batch, ours.pages), rtol=1e-5, atol=1e-5)
    start, end = batch.query_start_loc[2:4]
    np.testing.assert_allclose(wanted[end - 1], output[end - 1], rtol=1e-4, atol=1e-4)
    assert np.abs(wanted[start : end - 1] - output[start : end - 1]).max() > 0.1


def test_scales_are_refused() -> None:
    batch = build_batch(PREFILL.with_options(k_scale=2.0), "v3")
    with pytest.raises(Unsupported, match="k_scale with a TurboQuant cache"):
        Served(batch.case).call(batch)


def test_more_bits_than_the_cache_has_room_for_are_refused() -> None:
    """The host stores the indices of 6 bits in 4, and reads something else."""
    batch = build_batch(PREFILL, "v3")
    served = Served(PREFILL)
    served.view.constants = dataclasses.replace(served.view.constants, key_codebook=jnp.zeros(32))
    with pytest.raises(ValueError, match=r"codebook: got shape \(32,\), wanted up to 16 entries.*bits of 2 to 4"):
        served.call(batch)
