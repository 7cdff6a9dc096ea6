"""Tests of lab.servers."""
