"""One server of processes for all tests here."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.forkserver import context


@pytest.fixture(scope="session", autouse=True)
def forked_from():
    """Started before a program under test starts one for itself."""
    if find_spec("torch") is not None:
        context()


@pytest.fixture(scope="session")
def ranks():
    """Starts gloo processes: see `processes.Ranks`."""
    pytest.importorskip("torch", reason="the executors run over torch.distributed")
    from .processes import Ranks

    return Ranks()
