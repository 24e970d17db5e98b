"""What the repository has to say in two places is the same in both."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import easydel_ragged_plugin

LINK = re.compile(r"\]\((?!https?://|#)([^)]*)\)")


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


def test_the_version_is_a_release_or_says_that_it_is_none(repository: Path) -> None:
    version, changes = easydel_ragged_plugin.__version__, (repository / "CHANGELOG.md").read_text()
    released = re.findall(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert version in released or re.fullmatch(r"\d+\.\d+\.\d+\.dev\d+", version)


def test_nothing_is_installed_from_an_index_that_does_not_have_it(repository: Path) -> None:
    """Messages and pages name a checkout or a wheel. When the package has been published, this test goes."""
    command = re.compile(r"\b(pip install|uv add|uv pip install|pipx install)\b[^`\n\"]*easydel-ragged-plugin")
    texts = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
    texts += (repository / "easydel_ragged_plugin").rglob("*.py")
    found = [str(path) for path in texts if command.search(path.read_text(encoding="utf-8"))]
    assert len(texts) > 100
    assert not found
    assert command.search("Run: pip install -U 'easydel-ragged-plugin[host]'")


def test_the_readme_of_an_index_page_has_no_links_into_the_repository(repository: Path) -> None:
    hook = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert LINK.search(readme)
    for each in hook["fancy-pypi-readme"]["substitutions"]:
        readme = re.sub(each["pattern"], each["replacement"], readme)
    assert not LINK.search(readme)
    assert "https://github.com/erfanzar/EasyDeL)" in readme
