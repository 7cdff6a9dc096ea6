"""Improve a placement by few moves."""
