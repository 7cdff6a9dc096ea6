"""Set what holds for all tests.

That is which engine they need, how hypothesis runs, and that names are not waited for.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.forked_command import run_command

ENGINES = ("vllm", "sglang")
"""A folder of this name holds tests that need this engine.

Each engine has an environment of its own.
"""

settings.register_profile("steady", deadline=None)  # shared machines stop now and then
settings.load_profile("steady")

# torch asks for the name of whoever connects to a store. Where no name server answers that takes
# the system's resolver five seconds, for one connection in twenty or so. Processes that tests start
# inherit this.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_ignore_collect(collection_path: Path):
    """Leave out the folders of an engine that this environment does not have."""
    if collection_path.is_dir() and collection_path.name in ENGINES:
        return True if find_spec(collection_path.name) is None else None
    return None


def pytest_collection_modifyitems(items) -> None:
    """Mark each test of an engine's folder by the engine's name."""
    here = Path(__file__).parent
    for item in items:
        for engine in set(ENGINES) & set(item.path.relative_to(here).parts):
            item.add_marker(engine)


@pytest.fixture
def cli():
    """Run ``moe-placement`` as a user does; returns the finished process."""

    def run(*arguments: object, code: int | None = 0) -> subprocess.CompletedProcess:
        done = run_command(*map(str, arguments))
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    return run
