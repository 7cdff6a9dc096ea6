"""Start gloo ranks for all tests of the staged layer."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the staged layer needs torch")


@pytest.fixture(scope="session")
def ranks():
    """Start eight gloo ranks, shared by all tests."""
    from .ranks import Ranks

    started = Ranks()
    yield started
    started.close()
