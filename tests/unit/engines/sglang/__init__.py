"""Tests of engines.sglang."""
