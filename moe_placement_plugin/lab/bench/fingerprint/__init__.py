"""Measure how long digests of weights take."""
