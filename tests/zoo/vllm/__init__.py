"""Load every MoE architecture of vLLM, tiny, by vLLM's own loader under a placement."""
