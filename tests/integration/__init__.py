"""Tests on real engines and real links."""
