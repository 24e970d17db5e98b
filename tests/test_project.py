"""What the repository has to say in two places is the same in both."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def test_pre_commit_has_the_versions_of_the_lint_group(repository: Path) -> None:
    groups = tomllib.loads((repository / "pyproject.toml").read_text())["dependency-groups"]
    hooks = (repository / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"additional_dependencies: \[(.+)\]", hooks)) == set(groups["lint"])


def test_ci_begins_with_the_command_of_the_readme(repository: Path) -> None:
    (command,) = re.findall(r"^python3 (-m venv .*\bnox\b.*)$", (repository / "README.md").read_text(), re.MULTILINE)
    assert f'"$python" {command}\n' in (repository / ".ci" / "run").read_text()


def test_wheels_are_built_and_tested_with_one_zig(repository: Path) -> None:
    groups = tomllib.loads((repository / "pyproject.toml").read_text())["dependency-groups"]
    (zig,) = (each for each in groups["wheels"] if each.startswith("ziglang"))
    assert f'ZIG = "{zig}"\n' in (repository / "native" / "hatch_build.py").read_text()
