"""Loads for the tests of the loop."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.formats.plan_or_load import write
from tests.support.forked_command import run_command


def skewed(
    windows: int = 3, layers: int = 4, experts: int = 16, seed: int = 0, **kwargs
) -> ExpertLoad:
    """A load whose first experts are hot, slightly different in every window."""
    rng = np.random.default_rng(seed)
    shape = 1 / np.arange(1, experts + 1)
    counts = rng.poisson(1000 * shape * rng.uniform(0.8, 1.2, (windows, layers, experts)))
    return ExpertLoad(counts.astype(np.int64), **kwargs)


@pytest.fixture
def load_file(tmp_path) -> Path:
    """A recording of three windows."""
    path = tmp_path / "load.safetensors"
    write(skewed(metadata={"model": "tiny", "top_k": 2}), path)
    return path


@pytest.fixture
def cli():
    """Run ``moe-placement`` as a user does; returns the finished process."""

    def run(*arguments: object, code: int | None = 0) -> subprocess.CompletedProcess:
        done = run_command(*map(str, arguments))
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    return run
