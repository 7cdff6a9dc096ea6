"""Tests of lab.staged_layer."""
