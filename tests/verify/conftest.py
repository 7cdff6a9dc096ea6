"""Fixtures of the verification tests."""

from tests.loop.conftest import cli

__all__ = ["cli"]
