"""Test the planner."""
