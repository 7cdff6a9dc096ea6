"""Test engines.vllm."""
