"""Offer hosts to the tests of this folder."""

from __future__ import annotations

import pytest

from .network import made


@pytest.fixture(scope="module")
def hosts():
    """Make six hosts, see `network.Hosts`; most tests need two."""
    yield from made("moe", 6)
