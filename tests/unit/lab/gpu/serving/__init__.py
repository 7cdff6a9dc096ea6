"""Tests of lab.gpu.serving."""
