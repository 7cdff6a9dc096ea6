"""Test how our placement and planner reach SGLang's EPLB.

They go from flags to windows of its load.
"""

from __future__ import annotations

import pickle
import re
import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang import eplb, eplb_policy, state
from moe_placement_plugin.engines.sglang.state import STATE, settings_of

from .test_flags import TWO, arguments, plugins, refused, resolve  # noqa: F401

EPLB = ("--enable-eplb", "--expert-placement-strategy", "eplb")


def test_strategy_eplb_begins_where_eplb_does(models):
    asked = settings_of(
        resolve(
            arguments(
                models["qwen32"],
                *TWO,
                *EPLB,
                "--ep-num-redundant-experts",
                "4",
                "--expert-rebalance",
                '{"min_gain": 0.1}',
            )
        )
    )
    assert asked.plan.physical_to_logical[3].tolist() == [*range(32), 0, 1, 2, 3]
    arrived = pickle.loads(pickle.dumps(asked))
    assert arrived.rebalancing.moves and arrived.rebalancing.rules == {"min_gain": 0.1}
    padded = settings_of(
        resolve(arguments(models["qwen30"], "--tp-size", "4", "--ep-size", "4", *EPLB))
    )
    assert padded.placement.padding == 2 and padded.plan.physical_to_logical[0].tolist() == [
        *range(30),
        0,
        1,
    ]


def test_other_strategies_and_loads_are_where_eplb_begins(models, files):
    zigzag = settings_of(
        resolve(
            arguments(
                models["qwen32"], *TWO, "--enable-eplb", "--expert-placement-strategy", "zigzag"
            )
        )
    )
    assert zigzag.rebalancing.moves and zigzag.plan.physical_to_logical[0].tolist() == [
        *range(0, 32, 2),
        *range(1, 32, 2),
    ]
    planned = settings_of(
        resolve(
            arguments(models["qwen32"], *TWO, *EPLB, "--expert-placement-file", str(files["load"]))
        )
    )
    assert planned.rebalancing.plans and not zigzag.rebalancing.plans
    by_file = settings_of(
        resolve(
            arguments(
                models["qwen32"],
                *TWO,
                "--enable-eplb",
                "--expert-placement-file",
                str(files["permutation"]),
            )
        )
    )
    assert by_file.rebalancing.moves and by_file.rebalancing.plans
    assert planned.rebalancing.moves and planned.plan.physical_to_logical[0].tolist() != list(
        range(32)
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            (*TWO, "--expert-placement-strategy", "eplb", "--expert-rebalance", "{}"),
            "without --enable-eplb",
        ),
        (
            (
                *TWO,
                "--expert-placement-strategy",
                "zigzag",
                "--enable-eplb",
                "--expert-rebalance",
                "{}",
            ),
            "nothing of ours rebalances",
        ),
        ((*TWO, "--enable-eplb", "--expert-rebalance", "{}"), "add it, or leave it out"),
        (
            (*TWO, *EPLB, "--expert-rebalance", '{"min_gian": 1}'),
            "'min_gian' is not one of min_gain",
        ),
        ((*TWO, *EPLB, "--eplb-algorithm", "deepseek"), "--eplb-algorithm deepseek.*both decide"),
        (
            ("--tp-size", "4", "--ep-size", "2", *EPLB),
            "--tp-size 4 and --ep-size 2.*make them equal",
        ),
        ((*TWO, *EPLB, "--load-format", "dummy"), "--load-format dummy"),
        ((*TWO, "--eplb-algorithm", "expert_placement"), "expert_placement without --enable-eplb"),
        (
            (*TWO, *EPLB, "--expert-rebalance", '{"calibration": "/no/such"}'),
            "calibration '/no/such' is neither a file",
        ),
    ],
)
def test_what_would_not_go_well_is_refused(models, more, words):
    assert re.search(words, message := refused(arguments(models["qwen32"], *more))), message


def test_our_planner_as_an_algorithm_with_any_strategy(models):
    ours = ("--enable-eplb", "--eplb-algorithm", "expert_placement")
    zigzag = resolve(
        arguments(models["qwen32"], *TWO, *ours, "--expert-placement-strategy", "zigzag")
    )
    assert settings_of(zigzag).rebalancing.plans and settings_of(zigzag).plan.strategy == "zigzag"
    alone = resolve(arguments(models["qwen32"], *TWO, *ours))
    assert settings_of(alone).rebalancing.plans and settings_of(alone).strategy == "eplb"


def test_a_model_that_does_not_list_its_experts(monkeypatch):
    layer = torch.nn.Module()
    layer.layer_id, layer.num_local_experts, layer.num_fused_shared_experts = 2, 5, 0
    layer.w2_weight, layer.correction_bias = (
        torch.nn.Parameter(torch.ones(5, 3)),
        torch.nn.Parameter(torch.ones(5)),
    )
    monkeypatch.setattr(eplb, "expert_layers", lambda model: {"mlp.experts": layer})
    model = torch.nn.Module()
    eplb.list_weights(model)
    layer.w2_weight.data = torch.zeros(5, 3)  # as a transformation after loading does
    assert [t.data_ptr() for t in model.routed_experts_weights_of_layer[2]] == [
        layer.w2_weight.data_ptr()
    ]
    listed = types.SimpleNamespace(routed_experts_weights_of_layer={})
    eplb.list_weights(listed)
    assert listed.routed_experts_weights_of_layer == {}
    layer.num_fused_shared_experts = 1
    with pytest.raises(PlacementError, match="--disable-shared-experts-fusion"):
        eplb.list_weights(torch.nn.Module())


def test_forward_passes_are_put_together_into_windows_of_their_phase():
    counts = np.zeros((40, 1, 2), dtype=np.int32)
    counts[:34, 0, 0] = 1
    found, of = eplb_policy.windows(counts, ["decode"] * 40, 16)
    assert (
        found.shape == (16, 1, 2)
        and found.sum() == 34
        and set(found[:, 0, 0]) == {2, 3}
        and set(of) == {"decode"}
    )
    assert eplb_policy.windows(counts[:3], ["mixed"] * 3)[0][:, 0, 0].tolist() == [1, 1, 1]
    none, _ = eplb_policy.windows(counts[34:], ["decode"] * 6)
    assert not none.any() and len(none) == 1
    found, of = eplb_policy.windows(counts, ["prefill", "decode"] * 20, 4)
    assert found[:, 0, 0].sum() == 34 and of == ("prefill",) * 4 + ("decode",) * 4


def test_a_pass_is_what_its_batch_was_where_the_recorder_keeps_it(monkeypatch):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from moe_placement_plugin.engines.sglang import eplb_phases

    monkeypatch.setattr(STATE, "passes", state.ForwardPasses())
    monkeypatch.setattr(eplb_phases, "_one_batch", lambda: True)
    accumulator = types.SimpleNamespace(
        _global_physical_count_of_buffered_step=types.SimpleNamespace(_curr_index=2)
    )

    def append(self, *args):
        self._global_physical_count_of_buffered_step._curr_index = (
            self._global_physical_count_of_buffered_step._curr_index + 1
        ) % 4

    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED):
        eplb_phases._start(lambda *args: None, None, types.SimpleNamespace(forward_mode=mode))
        eplb_phases._append(append, accumulator, 0, "", {}, {})
    assert eplb_phases.phases_of_passes(4) == ["mixed", "mixed", "prefill", "decode"]
    monkeypatch.setattr(eplb_phases, "_one_batch", lambda: False)
    assert eplb_phases.phases_of_passes(4) == ["mixed"] * 4
