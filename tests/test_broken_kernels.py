"""The contract of kernels passes on the oracle, and catches kernels that are wrong in one way (``broken_kernels.py``).

For each mistake it is stated which test must be the first to fail, with which words. So a test that has lost its teeth
shows here.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from broken_kernels import BROKEN, OracleKernel
from contract_runs import Broken, Reports, run_contract

from easydel_ragged_plugin.testing import KernelContract


@pytest.mark.once
class TestOracle(KernelContract):
    """The kit finds nothing wrong with what it compares to."""

    kernel: ClassVar = OracleKernel()


def run_class(folder: Path, kernel: str, select: str, *options: str, more: str = "") -> Reports:
    """Run a part of the contract on this kernel, with more in the class's body."""
    source = f"""
import dataclasses
import broken_kernels
from easydel_ragged_plugin.testing import KernelContract, case_named

class TestGenerated(KernelContract):
    kernel = {kernel}
    {more}
"""
    return run_contract(folder, source, select, *options)


@pytest.mark.once
@pytest.mark.parametrize(("broken", "version"), BROKEN.parameters())
def test_is_caught(broken: Broken, version: str, tmp_path: Path) -> None:
    kernel = f"broken_kernels.broken_kernel({broken.name!r})"
    reports = run_class(tmp_path, kernel, broken.select, "-x", more=f"versions = ({version!r},)")
    reports.assert_catches(broken, version)


RIGHT = "broken_kernels.OracleKernel()"


def test_every_test_of_the_contract_catches_a_mistake() -> None:
    tests = {name for name in dir(KernelContract) if name.startswith("test_")}
    assert tests == {broken.caught_by.partition("[")[0] for broken in BROKEN}
    names = [broken.name for broken in BROKEN]
    assert len(set(names)) == len(names)


def test_a_kernel_must_be_named(tmp_path: Path) -> None:
    for kernel in ("broken_kernels.OracleKernel", "None"):  # the class, not an object of it
        (tmp_path / kernel).mkdir()
        reports = run_class(tmp_path / kernel, kernel, "requested or description")
        assert len(reports.errors) == 3
        assert all("TestGenerated.kernel: got" in error for error in reports.errors)
        assert "wanted an object of a class derived from easydel_ragged_plugin.types.Kernel" in reports.errors[0]


def test_a_known_failure_that_passes_is_a_failure(tmp_path: Path) -> None:
    reports = run_class(
        tmp_path,
        RIGHT,
        "test_values and decode",
        more='known_failures = {"test_values[decode-v3]": "was wrong once"}',
    )
    assert not reports.errors
    assert reports.failed == [("test_values[decode-v3]", "[XPASS(strict)] was wrong once")]
    assert reports.passed == ["test_values[decode-v2]"]


PICKY = """

class Picky(broken_kernels.OracleKernel):
    features = dataclasses.replace(broken_kernels.RIGHT, options=frozenset({"sinks"}), results=frozenset())

    def refuses(self, request):
        return None if request.query_dtype == "bfloat16" else f"takes bfloat16, not {request.query_dtype}"

class TestPicky(KernelContract):
    kernel = Picky()
    versions = ("v3",)
"""


def reasons(reports: Reports) -> set[str]:
    """Why tests were skipped."""
    return {text.partition("Skipped: ")[2][:-2] for _, text in reports.skipped}


def test_what_selection_would_not_give_the_kernel_is_skipped_with_its_reason(tmp_path: Path) -> None:
    select = "TestPicky and (decode-v or sinks-v or soft-cap or bfloat16-v or invalid_row or relabel)"
    reports = run_class(tmp_path, "None", select, more=PICKY)
    assert not reports.errors
    assert not reports.failed
    assert {"test_values[bfloat16-v3]", "test_pages[bfloat16-v3]"} <= set(reports.passed)
    assert not {"test_values[decode-v3]", "test_relabelling_pages_changes_nothing[v3]"} & set(reports.passed)
    assert reasons(reports) == {
        "oracle: takes no sliding_window",
        "oracle: takes no logits_soft_cap",
        "oracle: takes no update_pages",
        "oracle: takes bfloat16, not float32",
        "oracle: gives no logsumexp (return_lse)",
        "no v3 cache has this geometry: a page for each token; v3 would need page_size % 2 == 0",
    }


def test_laws_run_on_the_geometry_that_the_kernel_takes(tmp_path: Path) -> None:
    law_case = '    law_case = dataclasses.replace(case_named("mixed"), dtype="bfloat16", head_dim=128)\n'
    reports = run_class(
        tmp_path, "None", "TestPicky and (relabel or chunks_equals or invalid_row)", more=PICKY + law_case
    )
    assert not reports.errors
    assert not reports.failed
    assert "test_relabelling_pages_changes_nothing[v3]" in reports.passed
    assert reasons(reports) == {"oracle: takes no sliding_window"}


def test_kernels_of_another_platform_are_skipped(tmp_path: Path) -> None:
    kernel = 'type("Elsewhere", (broken_kernels.OracleKernel,), {"platforms": frozenset({"tpu"})})()'
    reports = run_class(tmp_path, kernel, "test_values and decode or any_batch")
    assert not reports.passed
    assert reasons(reports) == {"oracle: runs on tpu, not on cpu"}


def test_rows_in_any_order_are_left_out_where_the_class_says_so(tmp_path: Path) -> None:
    reports = run_class(tmp_path, RIGHT, "test_values and (decode or any-order)", more="any_row_order = False")
    assert set(reports.passed) == {"test_values[decode-v2]", "test_values[decode-v3]"}
    assert reasons(reports) == {"oracle: takes rows with one new token first (any_row_order)"}
