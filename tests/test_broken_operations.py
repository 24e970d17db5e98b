"""The contract kit catches operations that are wrong in one way (see ``broken_operations.py``).

The oracle without a mistake passes the whole contract (see ``test_contract.py``). For each mistake it is stated which
test must be the first to fail, with which words. So a test that has lost its teeth shows here.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from broken_operations import BROKEN
from contract_runs import Broken, Reports, run_contract

pytestmark = pytest.mark.host


_MODULE = """
import pytest
import broken_operations
from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract, oracle_operation
from easydel_ragged_plugin.testing.capabilities import PASSED_OPTIONS

class TestGenerated(RaggedPageAttentionContract):
"""


def run_class(folder: Path, body: str, select: str, *options: str) -> Reports:
    """Run a part of the contract on the class with this body."""
    return run_contract(folder, _MODULE + textwrap.indent(textwrap.dedent(body), "    "), select, *options)


@pytest.mark.parametrize(("broken", "version"), BROKEN.parameters())
def test_is_caught(broken: Broken, version: str, tmp_path: Path) -> None:
    body = f"""
        capabilities = Capabilities(options=PASSED_OPTIONS | {{"attention_chunk_size", "update_pages"}})

        @pytest.fixture
        def operation(self):
            return broken_operations.broken_operation({broken.name!r}, {version!r})
        """
    run_class(tmp_path, body, broken.select, "-x").assert_catches(broken, version)


_RIGHT = """
    capabilities = Capabilities(options=frozenset(("softmax_scale", "logits_soft_cap")))
    known_failures = {known_failures}

    @pytest.fixture
    def operation(self):
        return oracle_operation("v3")
    """


_RENAMED = """
    capabilities = Capabilities(version={version})

    @pytest.fixture
    def operation(self):
        return type("Renamed", (oracle_operation("v2"),), {{"get_impl_name": classmethod(lambda cls: "mine")}})
    """


def test_an_operation_of_another_name_says_which_it_is(tmp_path: Path) -> None:
    select = "test_name_and_metadata or test_host_creates or test_requirements or (test_values and mixed)"
    reports = run_class(tmp_path, _RENAMED.format(version="'v2'"), select)
    assert (reports.failed, reports.errors) == ([], [])
    assert {"test_name_and_metadata", "test_requirements", "test_values[mixed]"} <= set(reports.passed)
    other = tmp_path / "other"
    other.mkdir()
    reports = run_class(other, _RENAMED.format(version=None), "test_name_and_metadata")
    ((_, text),) = reports.failed
    assert "got 'mine', wanted one of ragged_page_attention_v2, ragged_page_attention_v3. An operation of" in text
    assert "Capabilities(version='v2')" in text


def test_a_known_failure_that_passes_is_a_failure(tmp_path: Path) -> None:
    body = _RIGHT.format(known_failures={"test_values[decode]": "was wrong once"})
    reports = run_class(tmp_path, body, "test_values and decode")
    assert not reports.errors
    assert reports.failed == [("test_values[decode]", "[XPASS(strict)] was wrong once")]


def test_a_known_failure_by_name_of_the_case_covers_all_its_tests(tmp_path: Path) -> None:
    body = _RIGHT.format(known_failures={"decode": "was wrong once"})
    reports = run_class(tmp_path, body, "decode and not equals")
    assert [name for name, _ in reports.failed] == [
        "test_values[decode]",
        "test_padding_tokens_are_zero[decode]",
        "test_new_tokens_are_stored[decode]",
        "test_other_slots_keep_their_bytes[decode]",
    ]


def test_what_is_not_declared_is_skipped_with_the_reason(tmp_path: Path) -> None:
    reports = run_class(tmp_path, _RIGHT.format(known_failures={}), "test_values and (window-3 or soft-cap)")
    assert reports.passed == ["test_values[soft-cap]"]
    assert [name for name, _ in reports.skipped] == ["test_values[window-3]"]
    assert "does not declare: sliding_window" in reports.skipped[0][1]


def test_an_operation_must_be_named(tmp_path: Path) -> None:
    reports = run_class(tmp_path, "pass", "test_values and soft-cap")
    assert len(reports.errors) == 1
    assert "must define the fixture `operation`" in reports.errors[0]
