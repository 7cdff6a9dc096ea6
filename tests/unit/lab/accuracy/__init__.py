"""Tests of lab.accuracy."""
