"""Measure one MoE layer."""
