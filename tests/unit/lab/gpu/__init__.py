"""Tests of lab.gpu."""
