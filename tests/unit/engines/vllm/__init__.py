"""Tests of engines.vllm."""
