"""What tests of several folders need: a recorded load, and the command line as a user has it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moe_placement_plugin.formats.plan_or_load import write
from tests.support.forked_command import run_command
from tests.support.loads import skewed


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
