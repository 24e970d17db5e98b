"""The Mosaic kernel's numbers without a GPU, in JAX's interpreter for GPUs, and what it refuses.

The interpreter runs the barriers, the copies and the rings of the real program, one program after the other. What the
compilers make of it is in test_mosaic_compile.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import QUICK_TO_COMPILE, WRONG_STARTS, overlapping_rows
from mosaic_cases import (
    EVERY_CASE,
    EVERY_ROW,
    INTERPRETED,
    KNOWN_FAILURES,
    SEVERAL_BLOCKS,
    in_its_shape,
    not_interpreted,
    on_hopper,
)

from easydel_ragged_plugin import RaggedPageConfig, prepare, ragged_page_attention_v3, select
from easydel_ragged_plugin.errors import Unsupported
from easydel_ragged_plugin.kernels import pallas_mosaic_gpu
from easydel_ragged_plugin.kernels.pallas_gpu import tiles
from easydel_ragged_plugin.kernels.pallas_gpu.tiles import Card
from easydel_ragged_plugin.kernels.pallas_gpu.work import Column
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import KERNEL, LongRows, assembler, sizes
from easydel_ragged_plugin.kernels.pallas_mosaic_gpu.work import work_of
from easydel_ragged_plugin.layout import PageLayout, page_shape
from easydel_ragged_plugin.rows import Rows
from easydel_ragged_plugin.testing import KernelContract
from easydel_ragged_plugin.testing.cases import Row, build_batch, case_named
from easydel_ragged_plugin.testing.compare import assert_close, assert_same_pages
from easydel_ragged_plugin.testing.kernel_contract import KernelResults
from easydel_ragged_plugin.testing.kernel_driver import KernelDriver
from easydel_ragged_plugin.types import AttentionRequest

REASON = not_interpreted()
if REASON is not None and os.environ.get("EASYDEL_RAGGED_TEST_MOSAIC") == "require":
    raise RuntimeError(REASON)
interprets = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LAW_CASE = in_its_shape([case_named("mixed")])[0]
# The other one takes minutes in an interpreter.
MORE = tuple(case for case in EVERY_CASE if case.name != "long-context")


@interprets
class TestMosaicInBrief(KernelResults):
    """Rows with few tokens are decoded by Triton's kernel here, as they are for a user."""

    kernel: ClassVar = INTERPRETED
    compiler_options: ClassVar = QUICK_TO_COMPILE
    versions: ClassVar = ("v3",)
    cases: ClassVar = (SEVERAL_BLOCKS,)


@interprets
@pytest.mark.long
@pytest.mark.once
class TestMosaicInEveryCase(KernelContract):
    kernel: ClassVar = INTERPRETED
    config: ClassVar = EVERY_ROW
    compiler_options: ClassVar = QUICK_TO_COMPILE
    law_case: ClassVar = LAW_CASE
    cases: ClassVar = MORE
    known_failures: ClassVar = KNOWN_FAILURES


def request(**changes: Any) -> AttentionRequest:
    """bfloat16, 32 query heads for 8 kv heads, head_dim 128, pages of 128 tokens: a request that it takes."""
    fields = {
        "version": "v3", "q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 128, "dtype": "bfloat16",
        "cache": None, "tokens": 512, **changes,
    }  # fmt: skip
    dtype = np.dtype(jnp.dtype(fields["dtype"]))
    cache = np.dtype(jnp.dtype(fields["cache"] or fields["dtype"]))
    version, kv_heads, head_dim = fields["version"], fields["kv_heads"], fields["head_dim"]
    shape = page_shape(version, 64, fields["page_size"], kv_heads, head_dim, cache)
    layout = PageLayout.of(version, shape, kv_heads, head_dim, cache)
    return AttentionRequest(
        version, "gpu", fields["tokens"], fields["q_heads"], kv_heads, head_dim, 8, 16, 64, dtype, cache, layout
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection finds the kernel on this platform, interpreted."""
    monkeypatch.setitem(select.BUILT_IN, INTERPRETED.name, INTERPRETED)


@interprets
@pytest.mark.once
@pytest.mark.usefixtures("interpreted")
def test_layers_of_a_loop_share_what_is_prepared() -> None:
    """Two layers of ``lax.scan`` over a long row, two short ones, and a token of none."""
    case = dataclasses.replace(SEVERAL_BLOCKS, name="scanned", rows=(Row(40, 1), Row(33, 20), Row(3, 2)), num_tokens=24)
    batch = build_batch(dataclasses.replace(case, sinks=None), "v3")
    index = tuple(map(jnp.array, (batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution)))
    call = (batch.queries, batch.keys, batch.values, jnp.array(batch.pages), *index)
    options = {**case.options.keywords(), "config": INTERPRETED.name}

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def layers(queries: Any, keys: Any, values: Any, pages: Any, *index: Any) -> Any:
        prepared = prepare(ragged_page_attention_v3, *call[:4], *index, **options)

        def layer(pages: Any, _: Any) -> Any:
            found = ragged_page_attention_v3(queries, keys, values, pages, *index, prepared=prepared, **options)
            return found[::-1]

        return jax.lax.scan(layer, pages, length=2)

    pages, outputs = map(np.asarray, layers(*call))
    expected, expected_pages = batch.expected()
    for output in outputs:
        assert_close(output, expected, batch.case)
        assert not output[~batch.live_tokens].any()
    assert_same_pages(pages, expected_pages)


@interprets
@pytest.mark.long
@pytest.mark.once
@pytest.mark.parametrize(("wrong", "start"), WRONG_STARTS)
def test_good_rows_keep_tokens_that_a_wrong_start_gives_to_others(wrong: int, start: int, monkeypatch: Any) -> None:
    """Tokens that two rows claim are stored twice: either result will do, and so it is no fault that they race."""
    from easydel_ragged_plugin.kernels.pallas_mosaic_gpu import attend

    lenient = dataclasses.replace(attend.interpreter(), detect_races=False)
    monkeypatch.setattr(attend, "interpreter", lambda: lenient)
    batch, claimed_once = overlapping_rows(wrong, start, head_dim=64, page_size=16, dtype="bfloat16")
    outcome = KernelDriver(INTERPRETED, "v3", EVERY_ROW, QUICK_TO_COMPILE).call(batch)
    expected, pages = batch.expected()
    assert_same_pages(outcome.pages, pages)
    assert_close(outcome.output[claimed_once], expected[claimed_once], batch.case)


def test_lists_of_work() -> None:
    """Long rows have tiles, the others parts of decode, and all an update. One that lacks a page loses its tiles."""
    made = request()
    start, count, context = [0, 300, 305, 309, 349], [300, 5, 4, 40, 0], [500, 40, 4, 50, 0]
    rows = Rows(*(jnp.array([*each, 0, 0, 0], jnp.int32) for each in (start, count, context)))
    found = jax.jit(work_of, static_argnums=range(4))(made, tiles.choose(made, RaggedPageConfig()), 32, 4, rows)

    def of_rows(listed: Any) -> list[int]:
        return sorted(int(each[Column.ROW]) for each in np.asarray(listed) if each[Column.TOKENS])

    tiles_of_rows = [*[0] * 10, 1, 3, 3]
    assert of_rows(found.tiles) == tiles_of_rows
    assert of_rows(found.others.parts) == [2]
    assert set(of_rows(found.others.update)) == {0, 1, 2, 3}
    assert found.others.prefill is None
    np.testing.assert_array_equal(np.flatnonzero(found.others.used), np.arange(305, 309))
    np.testing.assert_array_equal(np.flatnonzero(found.has_token(made)), [*range(305), *range(309, 349)])

    needed = np.full((8, 16), -1)
    needed[:, :4] = 0
    needed[0, 2] = 64  # of 64 pages
    lacking = found.with_pages(made, jnp.array(needed))
    assert of_rows(lacking.tiles) == tiles_of_rows[10:]
    np.testing.assert_array_equal(np.flatnonzero(lacking.has_token(made)), [*range(300, 305), *range(309, 349)])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("check_vma", [True, False])
def test_older_jax_does_not_trace_it_in_a_shard_map_that_checks(check_vma: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(pallas_mosaic_gpu, "FOLLOWS_AXES_JAX", (99,))
    found: list[str | None] = [KERNEL.refuses(request())]

    def body(array: Any) -> Any:
        found.append(KERNEL.refuses(request()))
        return array

    mesh, spec = jax.sharding.Mesh(jax.devices()[:1], ("x",)), jax.sharding.PartitionSpec("x")
    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma), jnp.ones(1))
    refusal = f"JAX {jax.__version__} can't trace it inside of jax.shard_map, unless with check_vma=False"
    assert found == [None, refusal if check_vma else None]


@pytest.mark.once
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"version": "v2", "q_heads": 8, "head_dim": 64, "page_size": 16, "dtype": "float16"}, None),
        ({"q_heads": 64, "kv_heads": 1, "head_dim": 256, "page_size": 256}, None),
        ({"dtype": "float32"}, "queries: float32; takes bfloat16, float16"),
        ({"cache": "float8_e5m2"}, "cache: float8_e5m2; takes that of the queries, bfloat16"),
        ({"head_dim": 80}, "head_dim 80; takes 64, 128, 256"),
        ({"page_size": 8}, "page_size 8; takes 16, 32, 64, 128, 256"),
        ({"page_size": 48}, "page_size 48; takes 16, 32, 64, 128, 256"),
        ({"q_heads": 96}, "12 query heads for a kv head; takes 1 to 8, and multiples of 8 up to 64"),
        ({"tokens": 4}, "4 tokens in all: no row has so many that it is not decoded"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], reason: str | None) -> None:
    assert KERNEL.refuses(request(**changes)) == reason


@pytest.mark.once
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0), None])
def test_no_other_card(capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for one would end the process."""
    monkeypatch.setattr(tiles, "card", lambda: ("a card", Card(132, 227 * 1024, capability)))
    found = "an unknown one" if capability is None else ".".join(map(str, capability))
    assert KERNEL.refuses(request()) == f"takes compute capability 9.0 alone (Hopper), this is {found}"


@pytest.mark.once
@pytest.mark.parametrize(
    ("packages", "ptxas", "runtime", "bad"),
    [
        ({"nvidia-cuda-nvcc-cu12": "12.6.85"}, None, "12060", None),
        ({"nvidia-cuda-nvcc-cu12": "12.8.93"}, None, "12080", "nvidia-cuda-nvcc-cu12 12.8.93"),
        ({"nvidia-cuda-nvcc": "13.0.88"}, None, "13000", None),
        # XLA takes the library before the program, and a ptxas in the PATH before that of a package.
        ({"nvidia-cuda-nvcc": "13.0.88", "nvidia-nvjitlink-cu12": "12.9.86"}, None, "13000", "nvjitlink-cu12 12.9.86"),
        ({"nvidia-cuda-nvcc": "13.0.88"}, "V12.9.86", "13000", "/ptxas"),
        ({"nvidia-cuda-nvcc": "13.0.88"}, "V13.0.88", "13000", None),
        ({"nvidia-cuda-nvcc": "13.0.88"}, "broken", "13000", None),
        ({}, None, "12070", None),
        ({}, None, "12090", "CUDA 12090"),
        ({}, "broken", "13000", None),
        ({}, None, "", "the version of CUDA is unknown"),
    ],
)
def test_assemblers_that_miscompile(
    packages: dict[str, str], ptxas: str | None, runtime: str, bad: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    """Of the packages that bring one, and the ptxas in the PATH. Without any, the version of CUDA of JAX's client."""

    class Device:
        class client:
            platform_version = f"PJRT C API\ncuda {runtime}"

    def version_of(name: str) -> str:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "version", version_of)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    monkeypatch.setattr(assembler, "SYSTEM_PTXAS", str(tmp_path / "none" / "ptxas"))
    monkeypatch.setenv("PATH", str(tmp_path))
    if ptxas is not None:
        program = tmp_path / "ptxas"
        program.write_text("#!/bin/sh\nexit 1\n" if ptxas == "broken" else f"#!/bin/sh\necho release, {ptxas}\n")
        program.chmod(0o755)
    found = assembler.versions.__wrapped__()  # once in a process
    monkeypatch.setattr(assembler, "versions", lambda: found)
    reason = assembler.miscompiles.__wrapped__()
    assert (reason is None) == (bad is None)
    assert bad is None or bad in str(reason)


def test_long_rows_that_decode_can_not_leave() -> None:
    with pytest.raises(ValueError, match="more_than: got -1, wanted None or an int of at least 0"):
        LongRows(-1)
    config = RaggedPageConfig(kernel_config=LongRows(5))
    with pytest.raises(Unsupported, match="tiles of 16 queries hold 4 tokens of 4 query heads"):
        KERNEL._more_than(request(), config)


def test_tiles_of_every_group_are_whole() -> None:
    """What a copy brings is whole tiles of 8 rows, and what is stored in parts is a power of two."""
    for group in range(1, 65):
        found = sizes.choose(request(q_heads=group, kv_heads=1))
        if group > 8 and group % 8:
            assert found is None
            continue
        assert found is not None
        assert found.tokens * group <= sizes.QUERIES < 2 * (found.tokens + 8) * group
        assert (found.tokens if found.heads_first else group) % 8 == 0
        assert not found.tokens & (found.tokens - 1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sizes_fit_hopper(head_dim: int) -> None:
    found = sizes.choose(request(head_dim=head_dim))
    assert found is not None
    assert found.shared_bytes(request(head_dim=head_dim)) <= 227 * 1024 - 1024  # barriers
