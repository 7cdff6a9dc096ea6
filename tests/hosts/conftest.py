"""Hosts for the tests of this folder."""

from __future__ import annotations

import pytest

from .network import made


@pytest.fixture(scope="module")
def hosts():
    """Two hosts, see `network.Hosts`."""
    yield from made("moe")
