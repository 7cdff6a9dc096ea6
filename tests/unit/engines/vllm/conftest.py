"""Provide checkpoints and files for all tests of this folder."""

from tests.support.vllm_fixtures import checkpoints, files

__all__ = ["checkpoints", "files"]
