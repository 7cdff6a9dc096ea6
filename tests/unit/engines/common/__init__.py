"""Tests of engines.common."""
