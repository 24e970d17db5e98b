"""Registration at start-up in the real host: orders of imports, third parties, spawned processes and Ray workers."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import RunPython
from stand_in import NAMES, OPERATION, third_party, warnings_in

pytestmark = pytest.mark.host

REPORT = f"""
import json, sys
def report():
    from easydel_ragged_plugin import host, startup
    registry = host.registry()
    return {{
        "active": startup.status().active,
        "ours": [registry[name].__module__ for name in {NAMES!r}],
        "before": [startup.original(name).__module__.partition(".")[0] for name in {NAMES!r}],
        "failures": [str(failure) for failure in startup.status().failures],
    }}
"""
GOOD = {"active": True, "ours": ["easydel_ragged_plugin.operations"] * 2, "before": ["easydel"] * 2, "failures": []}


def reported(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(
    "first",
    [
        "import easydel; importlib.import_module(package)",
        "importlib.import_module(package)",
        "import easydel_ragged_plugin.operations",
        "from easydel_ragged_plugin import RaggedPageAttnV3",
        "importlib.import_module('easydel.layers.attention')",
        "import jax, easydel_ragged_plugin; easydel_ragged_plugin.activate(); from easydel import eSurge",
    ],
)
def test_real_host_in_any_order_of_imports(first: str, run: RunPython) -> None:
    # Which of its two names the operations package has must be known without importing the host.
    code = f"import importlib; from easydel_ragged_plugin import host\n{REPORT}\n" + (
        "package = host.OPERATIONS_PACKAGES[host.host_version().startswith('0.2')]\n"
        f"assert 'easydel' not in sys.modules\n{first}\nimport colorsys\nprint(json.dumps(report()))"
    )
    output = run(sys.executable, "-I", "-c", code)
    assert reported(output) == GOOD, output
    assert "Overwriting" not in output, output


def test_real_host_switched_off(run: RunPython) -> None:
    code = f"{REPORT}\nprint(json.dumps(report()))"
    output = run(sys.executable, "-c", code, environment={"EASYDEL_RAGGED_PLUGIN": "0"})
    seen = reported(output)
    assert not seen["active"]
    assert all(module.startswith("easydel.") for module in seen["ours"])


def test_real_host_with_third_parties(tmp_path: Path, run: RunPython) -> None:
    """Broken, slow and duplicate distributions at once, then off and on again, in one process."""
    package = "importlib.import_module(host.OPERATIONS_PACKAGES[host.host_version().startswith('0.2')])"
    operation = OPERATION.replace(
        "from easydel.operations import OperationImpl",
        f"import importlib; from easydel_ragged_plugin import host; OperationImpl = {package}.OperationImpl",
    )
    paths = [
        third_party(tmp_path, "broken-op", "broken = broken_op:Op", broken_op="1 / 0"),
        third_party(tmp_path, "sleeper-op", "op = slow_op:Op", slow_op="import time; time.sleep(5.2)\n" + operation),
        third_party(tmp_path, "a-thief", f"{NAMES[1]} = thief:Op", thief=operation),
    ]
    code = REPORT + textwrap.dedent(
        """
        import easydel_ragged_plugin as plugin
        from easydel_ragged_plugin import host, startup
        registry = host.registry()
        assert registry["op"].__module__ == "slow_op"
        mine = dict(registry)
        plugin.deactivate()
        assert registry["ragged_page_attention_v3"].__module__.startswith("easydel.") and "op" not in registry
        plugin.activate()
        assert registry == mine
        seen = report()
        seen["failures"] = len(seen["failures"])
        print(json.dumps(seen))
        """
    )
    output = run(sys.executable, "-c", code, environment={"PYTHONPATH": os.pathsep.join(paths)})
    assert reported(output) == {**GOOD, "failures": 2}, output
    assert "broken-op: entry point broken = broken_op:Op" in warnings_in(output, "broken-op")[0]
    assert "is slow: it took 5" in warnings_in(output, "sleeper-op")[0]
    assert "easydel-ragged-plugin provides this operation already" in warnings_in(output, "a-thief")[0]


def test_spawned_process_and_ray_actor(tmp_path: Path, run: RunPython) -> None:
    """Workers that import the host themselves; the process that starts them has not."""
    script = tmp_path / "workers.py"
    script.write_text(
        REPORT
        + textwrap.dedent(
            """
            class Worker:
                def report(self):
                    return report()

            if __name__ == "__main__":
                import multiprocessing
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    spawned = pool.apply(report)
                import ray
                ray.init(num_cpus=1, num_gpus=0, include_dashboard=False, configure_logging=False, log_to_driver=False)
                try:
                    actor = ray.get(ray.remote(Worker).remote().report.remote(), timeout=240)
                finally:
                    ray.shutdown()
                assert "easydel" not in sys.modules
                print(json.dumps([spawned, actor]))
            """
        )
    )
    assert reported(run(sys.executable, script)) == [GOOD, GOOD]
