"""Measure the planner."""
