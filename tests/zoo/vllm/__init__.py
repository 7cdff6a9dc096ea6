"""Every MoE architecture of vLLM, tiny, loaded by vLLM's own loader under a placement."""
