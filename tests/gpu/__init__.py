"""Checks of what no CPU build has: sleep, async EPLB, drafts and gpt-oss on the engines' GPU kernels."""
