"""What tests of several folders need: a recorded load, and the command line as a user has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_placement_plugin.formats.plan_or_load import write
from tests.support.loads import skewed


@pytest.fixture
def load_file(tmp_path) -> Path:
    """A recording of three windows."""
    path = tmp_path / "load.safetensors"
    write(skewed(metadata={"model": "tiny", "top_k": 2}), path)
    return path
