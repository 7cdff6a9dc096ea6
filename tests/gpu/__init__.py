"""Check what no CPU build has: sleep, async EPLB, drafts and gpt-oss on GPU kernels."""
