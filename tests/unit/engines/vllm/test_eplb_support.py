"""Models that vLLM's EPLB cannot move are refused by name, whether vLLM stops at them or not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")

from moe_placement_plugin import PlacementError  # noqa: E402
from moe_placement_plugin.engines.vllm import eplb_support  # noqa: E402
from moe_placement_plugin.engines.vllm.eplb_support import (  # noqa: E402
    check_draft_supported,
    check_supported,
    refusing_unsupported,
)
from tests.support.vllm_layers import eplb_layer  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            AssertionError("Redundant experts are only supported with EPLB."),
            "with redundant experts and without EPLB, which vLLM does not allow",
        ),
        (NotImplementedError("EPLB is not supported AutoAWQMoEMethod."), r"\(AutoAWQMoEMethod\)"),
        (NotImplementedError("EPLB is not supported for MiniCPM yet."), r"\(for MiniCPM yet\)"),
    ],
)
def test_what_vllm_stops_at_is_named_with_the_mend(error, said):
    with pytest.raises(PlacementError, match=said) as refused, refusing_unsupported("AnyModel"):
        raise error
    assert "AnyModel" in str(refused.value) and "leave --enable-eplb out" in str(refused.value)
    assert refused.value.__cause__ is error


@pytest.mark.parametrize("kind", [AssertionError, NotImplementedError, ValueError])
def test_other_errors_stay_as_they_are(kind):
    with pytest.raises(kind, match="something else"), refusing_unsupported("AnyModel"):
        raise kind("something else")


def test_the_installed_vllm_still_says_it_so():
    import inspect

    from vllm.model_executor.layers.fused_moe import layer, routed_experts

    assert "Redundant experts are only supported with EPLB" in inspect.getsource(layer)
    assert "EPLB is not supported" in inspect.getsource(routed_experts)


def test_a_model_without_what_eplb_reads_is_refused(monkeypatch):
    layer = eplb_layer([0, 1, 2, 3, 4, 5, 0, 1], 0)
    layer.moe_config.moe_parallel_config.enable_eplb = True
    values = dict.fromkeys(eplb_support._READ, 1)
    monkeypatch.setattr(eplb_support, "routed_layers", lambda model: {"layers.0": layer})
    monkeypatch.setattr(eplb_support, "mixture_of_experts", lambda model: model)
    check_supported(SimpleNamespace(**values))
    del values["num_routed_experts"]
    with pytest.raises(PlacementError, match="it has no num_routed_experts, which EPLB reads"):
        check_supported(SimpleNamespace(**values))


def test_a_draft_that_waits_for_eplb_in_vain_is_refused(monkeypatch):
    """openPangu's MTP head waits for EPLB, which never registers it.

    It is built for EPLB, so that the first forward pass ends the engine.
    """
    layer = eplb_layer([0, 1, 2, 3, 4, 5, 0, 1], 0)
    layer.moe_config.moe_parallel_config.enable_eplb = True
    monkeypatch.setattr(eplb_support, "routed_layers", lambda model: {"layers.2": layer})
    monkeypatch.setattr(eplb_support, "mixture_of_experts", lambda model: None)
    with pytest.raises(PlacementError, match="draft SimpleNamespace .no MoE model., and layers.2"):
        check_draft_supported(SimpleNamespace())
    layer.moe_config.moe_parallel_config.enable_eplb = False
    check_draft_supported(SimpleNamespace())
    layer.moe_config.moe_parallel_config.enable_eplb = True
    monkeypatch.setattr(eplb_support, "mixture_of_experts", lambda model: model)
    check_draft_supported(SimpleNamespace())
