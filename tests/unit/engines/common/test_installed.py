"""Test which engines are installed."""

from __future__ import annotations

import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.engines.common import installed


def test_engines_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    assert installed.installed_engines() == {}
    with pytest.raises(PlacementError, match="neither vLLM nor SGLang is installed: install one"):
        installed.require_engine()
    monkeypatch.setattr(installed, "find_spec", lambda name: object() if name == "vllm" else None)
    assert installed.require_engine() == "vllm"
    with pytest.raises(
        PlacementError,
        match="sglang is not installed in this environment .found: vllm.: install it",
    ):
        installed.require_engine("sglang")
