"""Test engines.sglang."""
