"""Serve with each strategy, side by side, on real engines.

``python -m moe_placement_plugin.lab.gpu.serving --help`` says how.
"""
