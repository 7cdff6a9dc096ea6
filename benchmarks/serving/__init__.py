"""Serving with each strategy, side by side, on real engines: ``python -m benchmarks.serving --help``."""
