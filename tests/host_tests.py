"""Run EasyDeL's own tests of ragged attention and eSurge with this plugin and without; tell what fails only with it.

``python host_tests.py PATH [pytest options]``: PATH is a checkout of EasyDeL or its sdist (``.tar.gz``), of the version
that is installed beside the plugin. The tests are copied, so that they test the installed EasyDeL. Exit code 1: a test
fails with the plugin that passes without, or no test ran. Takes a few minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = (
    "layers/caching",
    "inference/test_request_distribution_bounds.py",
    "inference/test_dp_page_sharding.py",
    "inference/test_model_executor_aot_binding.py",
    "inference/test_esurge_data_parallel_axis_regressions.py",
    "inference/test_model_runner_window_alignment.py",
    "inference/test_pr254_smoke.py",
    "inference/test_sequence_buffer_condense.py",
    "infra/test_operation_cache_config_decode_requirements.py",
)

# Written beside the tests: the run says itself whose operations it tested.
WITNESS = """
import sys

def pytest_sessionfinish():
    found = {}
    for name in ("easydel.operations", "easydel.layers.operations"):
        if name in sys.modules:
            registry = sys.modules[name].OperationRegistry
            found = {registry.get(f"ragged_page_attention_{v}").__module__.partition(".")[0] for v in ("v2", "v3")}
    with open("ragged_witness.txt", "w") as file:
        file.write(" ".join(sorted(found)))
"""


def copy_tests(source: Path, folder: Path) -> Path:
    """The ``tests`` folder of a checkout or sdist, copied to ``folder``."""
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(folder / "sdist", filter="data")
        (source,) = (folder / "sdist").iterdir()
    if not (source / "tests").is_dir():
        raise SystemExit(f"{source} has no folder tests: give a checkout of EasyDeL, or an sdist that contains them")
    return Path(shutil.copytree(source / "tests", folder / "tests"))


def run(tests: Path, active: bool, options: list[str]) -> tuple[dict[str, str], str]:
    """Outcome of each test, and the package that served the operations."""
    (tests / "ragged_witness.py").write_text(WITNESS)
    found = [name for name in TESTS if (tests / name).exists()]
    report = tests / "report.xml"
    report.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "EASYDEL_RAGGED_PLUGIN": "1" if active else "0", "PYTHONPATH": path}
    switches = (
        "-q",
        "-p",
        "ragged_witness",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        f"--junitxml={report}",
    )
    command = [sys.executable, "-m", "pytest", *switches, *options, *found]
    subprocess.run(command, cwd=tests, env=environment, check=False)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = min(kinds, default="passed")
    return outcomes, (tests / "ragged_witness.txt").read_text()


def main(path: str, *options: str) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        tests = copy_tests(Path(path).resolve(), Path(scratch))
        without, served_without = run(tests, False, list(options))
        with_us, served_with = run(tests, True, list(options))
    print(f"\nwithout the plugin, served by {served_without or 'nobody'}: {count(without)}")
    print(f"with the plugin, served by {served_with or 'nobody'}: {count(with_us)}")
    worse = [name for name, outcome in with_us.items() if outcome in BAD and without.get(name) not in BAD]
    missing = sorted(without.keys() - with_us.keys())
    for name in worse:
        print(f"FAILS ONLY WITH THE PLUGIN: {name}")
    for name in missing:
        print(f"DID NOT RUN WITH THE PLUGIN: {name}")
    if served_with != "easydel_ragged_plugin" or served_without != "easydel":
        print("the plugin was not switched as it should have been: nothing is shown")
        return 1
    return 1 if worse or missing or not with_us else 0


BAD = {"failure", "error"}


def count(outcomes: dict[str, str]) -> str:
    kinds = sorted(set(outcomes.values()), reverse=True)
    return ", ".join(f"{list(outcomes.values()).count(kind)} {kind}" for kind in kinds)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
