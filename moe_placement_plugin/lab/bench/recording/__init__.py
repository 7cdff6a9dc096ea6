"""Measure what recording costs."""
