"""Execute the commands of the walk through the loop.

Its dashboard asks for metrics that exist.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "loop.md"
DASHBOARD = ROOT / "examples" / "grafana" / "expert-placement.json"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_of_the_walk(tmp_path):
    """In order and in one directory, as a reader would."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) >= 6
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = tmp_path / "bin" / "moe-placement"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from moe_placement_plugin.cli import main; main()" '
        '"$@"\n'
    )
    command.chmod(0o755)
    script = "set -e\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("load.html", "both.html", "decode.json", "both.json", "sglang.json"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert len(json.loads((tmp_path / "sglang.json").read_text())["physical_to_logical_map"]) == 61
    found = json.loads((tmp_path / "simulation.json").read_text())
    # The walk's claim: planning from the load beats the engines' default by far.
    assert found["outcomes"][0]["balancedness"] < 0.5 < 0.9 < found["outcomes"][-1]["balancedness"]


def test_commands_that_need_a_server_are_spelt_right():
    from moe_placement_plugin.cli import VERBS

    for verb in re.findall(r"^\$ moe-placement (\w+)", PAGE.read_text(), re.M):
        assert verb in VERBS
    flags = set(re.findall(r"--expert-[a-z-]+", PAGE.read_text()))
    from moe_placement_plugin.engines.vllm.detect import KEYS

    assert flags <= {f"--{key.replace('_', '-')}" for key in KEYS} | {"--expert-bytes"}


def test_links_exist():
    for target in re.findall(r"\]\((\.\./[^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


def test_dashboard_asks_for_metrics_that_exist(tmp_path):
    pytest.importorskip("prometheus_client", reason="comes with the engines")
    from moe_placement_plugin.recording.metrics import LoadCollector, contiguous

    from ..unit.recording.test_metrics import two_windows

    two_windows(tmp_path / "load")
    known: dict[str, set[str]] = {}
    for family in LoadCollector(tmp_path / "load", lambda load: contiguous(load, 2)).collect():
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    asked = {name for expression in expressions for name in re.findall(r"moe_\w+", expression)}
    assert asked <= set(known), asked - set(known)
    assert set(known) <= asked, "a metric that no panel shows"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
