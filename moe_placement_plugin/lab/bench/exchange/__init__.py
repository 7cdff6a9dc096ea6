"""Measure the exchange of experts."""
