"""Test the script for GPU hosts, on a host without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="checkpoints are made with torch")
pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from tests.support.paths import ROOT  # noqa: E402


@pytest.mark.slow
def test_the_script_for_gpu_hosts_goes_through_its_steps(tmp_path):
    def run(*steps: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [ROOT / "benchmarks/gpus.sh", tmp_path / "out", *steps],
            capture_output=True,
            text=True,
            env=env,
            timeout=300,
        )

    refused = run("fingerprints", "servings")
    assert (
        refused.returncode == 2
        and "unknown step servings; usage" in refused.stderr
        and not (tmp_path / "out" / "fingerprints.json").exists()
    )
    done = run("fingerprints")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "=== fingerprints, vllm, 2 ranks" in done.stdout
        and (tmp_path / "out" / "fingerprints-vllm.txt").stat().st_size
    )
    assert json.loads((tmp_path / "out" / "fingerprints.json").read_text())
