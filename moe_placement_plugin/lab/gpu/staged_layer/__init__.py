"""Measure the staged MoE layer: ``python -m moe_placement_plugin.lab.gpu.staged_layer``."""
