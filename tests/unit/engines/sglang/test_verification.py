"""Test how the level of verification reaches the workers, and what the check of the tables sees."""

from __future__ import annotations

import types

import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang import slot_digests
from moe_placement_plugin.engines.sglang.hook_registry import Hook, HookSet
from moe_placement_plugin.engines.sglang.state import STATE, settings_of, verifies

from .test_flags import TWO, arguments, refused, resolve


@pytest.fixture(autouse=True)
def forgotten():
    """Forget what one test asks for before the next."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    yield
    STATE.settings = None


def level(server_args) -> str | None:
    settings = settings_of(server_args)
    return None if settings is None else settings.verification.level


def flag(value: str) -> tuple[str, str]:
    return ("--expert-placement-verify", value)


ZIGZAG = (*TWO, "--expert-placement-strategy", "zigzag")


@pytest.mark.parametrize("value", ["off", "replicas", "checkpoint"])
def test_the_level_reaches_the_workers(models, value):
    server_args = resolve(arguments(models["qwen32"], *ZIGZAG, *flag(value)))
    assert level(server_args) == value
    assert verifies() == (value != "off")


def test_a_placement_is_verified_by_default_and_stock_is_not(models):
    assert level(resolve(arguments(models["qwen32"], *ZIGZAG))) == "replicas"
    STATE.settings = None
    assert level(resolve(arguments(models["qwen32"], *TWO))) is None
    assert not verifies()


def test_yaml_and_engine_arguments(models, tmp_path):
    from sglang import Engine

    config = tmp_path / "server.yaml"
    config.write_text(
        "tp-size: 2\nep-size: 2\nexpert-placement-strategy: zigzag\nexpert-placement-verify: "
        "checkpoint\n"
    )
    assert level(resolve(arguments(models["qwen32"], "--config", str(config)))) == "checkpoint"
    own = {
        "model_path": str(models["qwen32"]),
        "device": "cpu",
        "tp_size": 2,
        "ep_size": 2,
        "expert_placement_strategy": "zigzag",
    }
    assert level(Engine.server_args_class(**own, expert_placement_verify="off")) == "off"
    with pytest.raises(
        Exception,
        match="--expert-placement-verify twice: expected one of off, replicas, checkpoint",
    ):
        Engine.server_args_class(**own, expert_placement_verify="twice")


def test_an_unknown_level_is_refused_by_the_command_line(models, capsys):
    with pytest.raises(SystemExit):
        resolve(arguments(models["qwen32"], *ZIGZAG, *flag("twice")))
    assert "--expert-placement-verify: invalid choice: 'twice'" in capsys.readouterr().err


def test_alone_it_needs_expert_parallelism(models):
    assert level(resolve(arguments(models["qwen32"], *TWO, *flag("replicas")))) == "replicas"
    assert "--expert-placement-verify replicas with --ep-size 1" in refused(
        arguments(models["qwen32"], "--tp-size", "2", *flag("replicas"))
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("checkpoint", "--load-format", "dummy"),
            "there is no checkpoint to compare with; use replicas",
        ),
        (
            ("checkpoint", "--load-format", "sharded_state"),
            "does not work with `--load-format` sharded_state",
        ),
        (
            ("checkpoint", "--cpu-offload-gb", "1"),
            "--cpu-offload-gb: it would keep the model of the clean load",
        ),
        (
            ("replicas", "--load-format", "dummy", "--ep-num-redundant-experts", "2"),
            "2 redundant experts: replicas are random and differ",
        ),
    ],
)
def test_what_cannot_be_verified_is_refused(models, more, message):
    assert message in refused(
        arguments(models["qwen32"], *ZIGZAG, "--expert-placement-verify", *more)
    )


def test_random_replicas_are_not_verified_by_default(models):
    dummy = ("--load-format", "dummy")
    assert level(resolve(arguments(models["qwen32"], *ZIGZAG, *dummy))) == "replicas"
    assert (
        level(
            resolve(arguments(models["qwen32"], *ZIGZAG, *dummy, "--ep-num-redundant-experts", "2"))
        )
        == "off"
    )


def tables(slots: list[int], experts: int) -> types.SimpleNamespace:
    """Make SGLang's metadata of one layer, in as many tensors of its own as on a GPU."""
    held = torch.tensor([slots])
    width = max(slots.count(expert) for expert in range(experts))
    slots_of = torch.full((1, experts, width), -1)
    for expert in range(experts):
        where = [slot for slot, held_expert in enumerate(slots) if held_expert == expert]
        slots_of[0, expert, : len(where)] = torch.tensor(where)
    return types.SimpleNamespace(
        physical_to_logical_map=held,
        physical_to_logical_map_cpu=held.clone(),
        logical_to_all_physical_map=slots_of,
        logical_to_all_physical_map_cpu=slots_of.clone(),
        logical_to_rank_dispatch_physical_map=slots_of[..., 0].clone(),
        num_logical_experts=experts,
        num_layers=1,
    )


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        (
            "logical_to_rank_dispatch_physical_map",
            (0, 2),
            "layer 0: tokens of expert 2 go to slot 0, which holds expert 3",
        ),
        (
            "physical_to_logical_map_cpu",
            (0, 1),
            r"layer 0: SGLang's physical_to_logical_map differs between device and host at \[1\]",
        ),
        (
            "logical_to_all_physical_map_cpu",
            (0, 3, 1),
            r"logical_to_all_physical_map differs between device and host at \[3, 1\]",
        ),
    ],
)
def test_tables_that_contradict_each_other_are_noticed(name, at, message):
    metadata = tables([3, 1, 0, 2, 0, 3], 4)
    slot_digests.check_map(metadata)
    getattr(metadata, name)[at] = 0
    with pytest.raises(PlacementError, match=message):
        slot_digests.check_map(metadata)


def test_the_expert_of_a_slot_is_the_one_in_force():
    layer = types.SimpleNamespace(
        layer_id=0,
        moe_ep_rank=1,
        _num_local_routed=3,
        _num_global_routed=6,
        num_fused_shared_experts=1,
    )
    metadata = tables([3, 1, 0, 2, 0, 3], 4)
    assert slot_digests.slot_experts(layer, metadata).tolist() == [2, 0, 3, 4]
    metadata.physical_to_logical_map[0, 3] = 1
    assert slot_digests.slot_experts(layer, metadata).tolist() == [1, 0, 3, 4]
    layer.layer_id = 7  # beyond the table: SGLang loads it by its own ids
    assert slot_digests.slot_experts(layer, metadata).tolist() == [3, -1, -1, 4]
    assert slot_digests.slot_experts(layer, None).tolist() == [3, 4, 5, 6]


def test_a_lost_hook_is_noticed_by_the_others():
    hooks = HookSet(
        [
            Hook(
                name="verify-lost",
                target="json:dumps",
                hook=lambda original, *args: original(*args),
                why="a test",
            )
        ]
    )
    with pytest.raises(
        PlacementError, match="SGLang did not apply the hooks verify-lost in this process"
    ):
        hooks.require_applied()
