"""One server of processes for all tests here."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def ranks():
    """Starts gloo processes: see `processes.Ranks`."""
    pytest.importorskip("torch", reason="the executors run over torch.distributed")
    from .processes import Ranks

    return Ranks()
