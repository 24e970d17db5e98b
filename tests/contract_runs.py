"""What the two tests of the contract kits share: mistakes on purpose, and runs of a part of a contract."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class Broken:
    """A mistake and who must find it.

    Attributes:
        name: unique.
        caught_by: the test that must be the first to fail; ``{version}`` in it is the version that is run.
        says: what its message must match.
        select: the part of the contract that runs (pytest's ``-k``).
        replaces: member of the right class in whose place ``mistake`` stands.
        mistake: the wrong member.
        versions: operations that it is a mistake for.
    """

    name: str
    caught_by: str
    says: str
    select: str
    replaces: str
    mistake: Any
    versions: tuple[str, ...]


class Mistakes(list[Broken]):
    """A table of mistakes. ``replaces`` is the member that most of them stand in place of."""

    def __init__(self, replaces: str) -> None:
        super().__init__()
        self.replaces = replaces

    def mistake(
        self,
        name: str,
        *,
        caught_by: str,
        select: str,
        says: str = "largest error",
        replaces: str | None = None,
        versions: tuple[str, ...] = ("v2", "v3"),
    ) -> Callable[[Any], Any]:
        """Enter what follows."""

        def enter(mistake: Any) -> Any:
            self.append(Broken(name, caught_by, says, select, replaces or self.replaces, mistake, versions))
            return mistake

        return enter

    def named(self, name: str) -> Broken:
        """The mistake of this name."""
        return next(broken for broken in self if broken.name == name)

    def parameters(self) -> list[Any]:
        """Each mistake with each of its versions, for pytest."""
        return [
            pytest.param(broken, version, id=f"{broken.name}-{version}")
            for broken in self
            for version in broken.versions
        ]


class Reports:
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

    def assert_catches(self, broken: Broken, version: str) -> None:
        """Exactly the test that must find the mistake has failed, with its words."""
        assert not self.errors, self.errors
        assert len(self.failed) == 1, f"failed: {self.failed}; passed: {self.passed}"
        name, text = self.failed[0]
        wanted = broken.caught_by.format(version=version)
        assert name == wanted, f"got {name}, wanted {wanted}"
        assert re.search(broken.says, text), text


def run_contract(folder: Path, source: str, select: str, *options: str) -> Reports:
    """Run the selected tests of a module with this source, in this process."""
    module = folder / f"test_generated_{zlib.crc32(str(folder).encode())}.py"
    module.write_text(source)
    configuration = folder / "pytest.ini"
    configuration.write_text("[pytest]\n")
    reports = Reports()
    arguments = ["-c", str(configuration), "--rootdir", str(folder), "-W", "ignore", "-k", select, *options]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--capture=no"]
    # Collects garbage over and over at the end of every run, which takes a second with the host in memory. The run
    # around this one does it, too.
    quiet += ["-p", "no:unraisableexception"]
    pytest.main([*arguments, *quiet, str(module)], plugins=[reports])
    return reports
