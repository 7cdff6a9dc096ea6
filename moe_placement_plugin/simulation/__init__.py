"""Predict what a placement costs: simulated steps and the calibrated cost model."""
