"""Provide checkpoints and files for all tests of this folder, and watched loading."""

from collections.abc import Iterator

import pytest

from tests.support.vllm_fixtures import checkpoints, files

__all__ = ["checkpoints", "files"]


@pytest.fixture
def loading_is_watched() -> Iterator[None]:
    """Note what loaders bring and fill, as in a server with a placement."""
    from moe_placement_plugin.engines.common.patching import PatchSet
    from moe_placement_plugin.engines.vllm.evidence import evidence_patches

    patches = PatchSet(evidence_patches())
    patches.apply()
    yield
    patches.undo()
