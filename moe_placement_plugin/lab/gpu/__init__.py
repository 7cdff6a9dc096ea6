"""Measure servers, exchanges and layers on GPUs."""
