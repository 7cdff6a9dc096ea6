"""Tests of rebalancing."""
