"""Compile and share what the planner's inner loops have in common."""
