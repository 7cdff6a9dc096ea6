"""Tests of lab.demo."""
