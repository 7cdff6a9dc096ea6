"""Measure experts that move between GPUs: ``python -m moe_placement_plugin.lab.gpu.exchange``."""
