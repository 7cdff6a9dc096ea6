"""Test what the plugin asks of SGLang's resolved arguments, in the form of each version."""

from __future__ import annotations

import types

import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang import (
    combination,
    compat,
    eplb_phases,
    slot_digests,
    support,
)
from moe_placement_plugin.engines.sglang.combination import Combination

# Resolved arguments of a server on 4 ranks: up to 0.5.22, and as 0.5.23 leaves them.
OLD = {"tp_size": 4, "dp_size": 1, "enable_dp_attention": False}
NEW = OLD | {"attn_dp_size": 1}
WIDTHS = [
    (OLD, 1, 1),
    (OLD | {"dp_size": 2}, 1, 2),
    (OLD | {"dp_size": 4, "enable_dp_attention": True}, 4, 1),
    (NEW, 1, 1),
    (NEW | {"dp_size": 2}, 1, 2),
    (NEW | {"attn_dp_size": 4}, 4, 1),
    (NEW | {"attn_dp_size": 2, "dp_size": 3}, 2, 3),
]


@pytest.mark.parametrize(("values", "width", "copies"), WIDTHS)
def test_the_width_of_data_parallel_attention(values, width, copies):
    values = types.SimpleNamespace(**values)
    assert compat.attention_dp_width(values) == width
    assert compat.replicas(values) == copies


@pytest.mark.parametrize(
    ("values", "a2a", "refused"),
    [
        (OLD, "none", None),
        (OLD | {"dp_size": 4, "enable_dp_attention": True}, "none", "route each other's tokens"),
        (OLD | {"dp_size": 4, "enable_dp_attention": True}, "deepep", None),
        (OLD | {"dp_size": 2, "enable_dp_attention": True}, "deepep", "a share of the tokens"),
        (OLD, "deepep", "a share of the tokens"),
        (NEW | {"attn_dp_size": 4}, "none", "route each other's tokens"),
        (NEW | {"attn_dp_size": 4}, "deepep", None),
        (NEW | {"attn_dp_size": 2}, "deepep", "a share of the tokens"),
        (NEW, "deepep", "a share of the tokens"),
    ],
)
def test_what_can_be_recorded(values, a2a, refused):
    """Notice the fault of 0.5.23: attention that is data-parallel looks as if it were not."""
    args = types.SimpleNamespace(**values)
    width = compat.attention_dp_width(args)
    named = Combination("0.5.23", a2a_backend=a2a, tp_size=args.tp_size, attention_dp=width)
    if refused is None:
        support.check(support.RECORDING_RULES, named, "--flag")
        return
    with pytest.raises(PlacementError, match=refused):
        support.check(support.RECORDING_RULES, named, "--flag")


@pytest.mark.parametrize(("a2a", "expected"), [("none", 4), ("deepep", 1)])
@pytest.mark.parametrize("attention_dp", [False, True])
def test_over_how_many_ranks_a_token_is_counted_again(a2a, expected, attention_dp, monkeypatch):
    """Count a token wherever it is routed; how attention is cut does not matter."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.moe import utils

    monkeypatch.setattr(
        utils, "get_moe_a2a_backend", lambda: types.SimpleNamespace(is_none=lambda: a2a == "none")
    )
    group = types.SimpleNamespace(world_size=4)
    monkeypatch.setattr(parallel_state, "get_moe_ep_group", lambda: group)
    monkeypatch.setattr(eplb_phases, "_one_batch", lambda: not attention_dp)
    assert eplb_phases.ranks_that_count_a_token() == expected


@pytest.mark.parametrize(
    ("own", "given", "checkpoint", "expected"),
    [
        ("modelopt_fp4", None, None, "modelopt_fp4"),  # read from hf_quant_config.json
        (None, "fp8", None, "fp8"),
        (None, None, {"quant_method": "mxfp4"}, "mxfp4"),
        ("modelopt_mixed", "modelopt", {"quant_method": "modelopt"}, "modelopt_mixed"),
        (None, None, None, ""),
    ],
)
def test_the_quantization_is_sglangs_own_answer(own, given, checkpoint, expected):
    config = types.SimpleNamespace(
        quantization=own, hf_config=types.SimpleNamespace(quantization_config=checkpoint)
    )
    assert combination._quantization(types.SimpleNamespace(quantization=given), config) == expected


def nvfp4_layer(rank: int, **method):
    import torch

    layer = torch.nn.Module()
    layer._num_local_routed, layer.moe_ep_rank = 2, rank
    scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]), requires_grad=False)
    scale._sglang_require_global_experts = True
    layer.w2_input_scale = scale
    backend = types.SimpleNamespace(is_marlin=lambda: False)
    layer.quant_method = types.SimpleNamespace(_moe_runner_backend=backend, **method)
    return layer


@pytest.mark.parametrize(
    ("experts", "method", "kept"),
    [
        ([2, 3], {}, True),  # the trivial map: a kernel that cuts a block gets its own experts'
        ([3, 2], {}, False),
        ([1, 3], {}, False),
        ([3, 2], {"enable_flashinfer_cutlass_moe": True}, True),  # takes the maximum of all
        ([3, 2], {"enable_flashinfer_trtllm_moe": True}, True),
    ],
)
def test_input_scales_of_all_experts_are_right_unless_a_kernel_cuts_them(experts, method, kept):
    import numpy as np

    found = slot_digests.input_scales(nvfp4_layer(1, **method), np.array(experts), 4)
    assert found == (frozenset({"w2_input_scale"}) if kept else frozenset())
