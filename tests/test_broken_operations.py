"""The contract kit catches operations that are wrong in one way (see ``broken_operations.py``).

The oracle without a mistake passes the whole contract (see ``test_contract.py``). For each mistake it is stated which
test must be the first to fail, with which words. So a test that has lost its teeth shows here.
"""

from __future__ import annotations

import re
import textwrap
import zlib
from pathlib import Path

import pytest
from broken_operations import BROKEN, Broken

pytestmark = pytest.mark.host


class _Reports:
    """A pytest plugin that keeps what happened."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self.errors: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rsplit("::", 1)[-1]
        if report.failed and report.when == "call":
            self.failed.append((name, str(report.longrepr)))
        elif report.skipped:
            self.skipped.append((name, str(report.longrepr)))
        elif report.failed:
            self.errors.append(f"{name}: {report.longrepr}")
        elif report.passed and report.when == "call":
            self.passed.append(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(str(report.longrepr))


def run_contract(folder: Path, class_body: str, select: str, *options: str) -> _Reports:
    """Run a part of the contract on the class with this body, in this process."""
    module = folder / f"test_generated_{zlib.crc32(str(folder).encode())}.py"
    module.write_text(
        f"""
import pytest
import broken_operations
from easydel_ragged_plugin.testing import Capabilities, RaggedPageAttentionContract, oracle_operation

class TestGenerated(RaggedPageAttentionContract):
{textwrap.indent(textwrap.dedent(class_body), "    ")}
"""
    )
    configuration = folder / "pytest.ini"
    configuration.write_text("[pytest]\n")
    reports = _Reports()
    arguments = ["-c", str(configuration), "--rootdir", str(folder), "-W", "ignore", "-k", select, *options]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--capture=no"]
    # Collects garbage over and over at the end of every run, which takes a second with the host in memory. The run
    # around this one does it, too.
    quiet += ["-p", "no:unraisableexception"]
    pytest.main([*arguments, *quiet, str(module)], plugins=[reports])
    return reports


@pytest.mark.parametrize(
    ("broken", "version"),
    [pytest.param(broken, version, id=f"{broken.name}-{version}") for broken in BROKEN for version in broken.versions],
)
def test_is_caught(broken: Broken, version: str, tmp_path: Path) -> None:
    body = f"""
        @pytest.fixture
        def operation(self):
            return broken_operations.broken_operation({broken.name!r}, {version!r})
        """
    reports = run_contract(tmp_path, body, broken.select, "-x")
    assert not reports.errors
    assert len(reports.failed) == 1, f"nothing failed; passed: {reports.passed}"
    name, text = reports.failed[0]
    assert name == broken.caught_by
    assert re.search(broken.says, text), text


_RIGHT = """
    capabilities = Capabilities(sliding_window=False)
    known_failures = {known_failures}

    @pytest.fixture
    def operation(self):
        return oracle_operation("v3")
    """


def test_a_known_failure_that_passes_is_a_failure(tmp_path: Path) -> None:
    body = _RIGHT.format(known_failures={"test_values[decode]": "was wrong once"})
    reports = run_contract(tmp_path, body, "test_values and decode")
    assert not reports.errors
    assert reports.failed == [("test_values[decode]", "[XPASS(strict)] was wrong once")]


def test_a_known_failure_by_name_of_the_case_covers_all_its_tests(tmp_path: Path) -> None:
    body = _RIGHT.format(known_failures={"decode": "was wrong once"})
    reports = run_contract(tmp_path, body, "decode and not equals")
    assert [name for name, _ in reports.failed] == [
        "test_values[decode]",
        "test_padding_tokens_are_zero[decode]",
        "test_new_tokens_are_stored[decode]",
        "test_other_slots_keep_their_bytes[decode]",
    ]


def test_what_is_not_declared_is_skipped_with_the_reason(tmp_path: Path) -> None:
    reports = run_contract(tmp_path, _RIGHT.format(known_failures={}), "test_values and (window-3 or soft-cap)")
    assert reports.passed == ["test_values[soft-cap]"]
    assert [name for name, _ in reports.skipped] == ["test_values[window-3]"]
    assert "does not declare: sliding_window" in reports.skipped[0][1]


def test_an_operation_must_be_named(tmp_path: Path) -> None:
    reports = run_contract(tmp_path, "pass", "test_values and soft-cap")
    assert len(reports.errors) == 1
    assert "must define the fixture `operation`" in reports.errors[0]
