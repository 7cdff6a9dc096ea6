"""Fixtures of the verification tests."""

import sys

from tests.loop.conftest import cli

from .accuracy import TINY

__all__ = ["cli"]

# The scripts there import each other, and the tests import them.
if str(TINY) not in sys.path:
    sys.path.append(str(TINY))
