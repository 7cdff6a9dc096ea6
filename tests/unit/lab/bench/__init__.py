"""Tests of lab.bench."""
