"""Bad input is refused with one message that names the value, the rule and the mend."""

import json

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement, PlacementError, Topology
from moe_placement_plugin.core.model_shape import ModelShape
from moe_placement_plugin.formats.plan_or_load import write as write_file
from moe_placement_plugin.strategies.resolve import resolve_placement

SHAPE = ModelShape((1, 2, 3), 4, name="tiny")
TWO = Topology(2)


def plan(**changes):
    fields = {"rows": [[3, 2, 1, 0]] * 3, "experts": 4, "slots": (2, 2), "ids": (1, 2, 3)} | changes
    return Placement(fields["rows"], fields["experts"], fields["slots"], fields["ids"])


def write(tmp_path, thing):
    path = tmp_path / "file"
    if isinstance(thing, (Placement, ExpertLoad)):
        write_file(thing, path)
    elif isinstance(thing, bytes):
        path.write_bytes(thing)
    else:
        path.write_text(json.dumps(thing))
    return path


@pytest.mark.parametrize("strategy", ["linear", "zigzag", "balanced", "eplb"])
def test_a_plan_wins_over_the_strategy(tmp_path, strategy):
    path = write(tmp_path, plan())
    assert resolve_placement(strategy, path, SHAPE, TWO) == plan()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["linear", "eplb"])
def test_a_load_goes_to_eplb(tmp_path, strategy):
    counts = np.array([[[100, 100, 1, 1]] * 3])
    p = resolve_placement(strategy, write(tmp_path, ExpertLoad(counts)), SHAPE, TWO)
    assert p.strategy == "eplb" and p.layer_ids == (1, 2, 3)
    assert p.overall_balancedness(counts[0]) == 1.0


def test_sglang_forms(tmp_path):
    rows = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
    p = resolve_placement("eplb", write(tmp_path, {"physical_to_logical_map": rows}), SHAPE, TWO)
    assert p.layer_ids == (1, 2, 3) and p.physical_to_logical.tolist() == rows[1:]
    load = {"logical_count": [[0] * 4, [9, 9, 1, 1], [9, 9, 1, 1], [9, 9, 1, 1]]}
    assert (
        resolve_placement("eplb", write(tmp_path, load), SHAPE, TWO).overall_balancedness(
            np.array(load["logical_count"])[1:]
        )
        == 1.0
    )


def test_plans_numbered_by_moe_layer_or_by_all_layers(tmp_path):
    by_moe = plan(ids=(0, 1, 2))
    assert resolve_placement("eplb", write(tmp_path, by_moe), SHAPE, TWO).layer_ids == (1, 2, 3)
    by_all = plan(rows=[[0, 1, 2, 3]] + [[3, 2, 1, 0]] * 3, ids=(0, 1, 2, 3))
    assert resolve_placement("eplb", write(tmp_path, by_all), SHAPE, TWO) == plan()


def test_plans_with_redundant_experts(tmp_path):
    path = write(tmp_path, plan(rows=[[0, 1, 2, 2, 3, 0]] * 3, slots=(3, 3)))
    assert resolve_placement("eplb", path, SHAPE, TWO, num_redundant=2).num_redundant == 2


@pytest.mark.parametrize(
    "strategy, thing, more, message",
    [
        ("nonsense", None, {}, "unknown expert placement strategy 'nonsense'"),
        (
            "eplb",
            None,
            {},
            "eplb places experts by a recorded load and has none: add --expert-placement-file",
        ),
        (
            "zigzag",
            ExpertLoad(np.ones((1, 3, 4))),
            {},
            "recorded load, which strategy zigzag does not use: choose eplb",
        ),
        ("eplb", ExpertLoad(np.ones((1, 3, 5))), {}, "5 experts per layer, the model has 4"),
        (
            "eplb",
            ExpertLoad(np.ones((1, 5, 4)), (4, 5, 6, 7, 8)),
            {},
            "the load has 5 layers, the model has 3 MoE layers",
        ),
        (
            "eplb",
            plan(rows=[[0, 1, 2, 3, 4]] * 3, experts=5, slots=(3, 2)),
            {},
            "plan for 5 experts, the model has 4",
        ),
        ("eplb", plan(slots=(1, 1, 1, 1)), {}, "plan for 4 EP ranks, the engine runs 2"),
        (
            "eplb",
            plan(rows=[[3, 2, 1, 0]] * 2, ids=(0, 1)),
            {},
            "plan for 2 layers, the model has 3 MoE layers",
        ),
        (
            "eplb",
            plan(rows=[[3, 2, 1, 0]] * 5, ids=(1, 2, 3, 4, 5)),
            {},
            "plan for 5 layers up to 5, the model's last MoE layer is 3",
        ),
        (
            "eplb",
            plan(rows=[[0, 1, 2, 2, 3, 0]] * 3, slots=(3, 3)),
            {},
            "2 redundant experts, the engine is started with 0",
        ),
        ("eplb", plan(), {"num_redundant": 2}, "0 redundant experts, the engine is started with 2"),
        (
            "eplb",
            plan(slots=(3, 1)),
            {"slots_per_rank": (2, 2)},
            r"slots, this engine needs \[2, 2\]",
        ),
        (
            "eplb",
            {"physical_to_logical_map": [[0, 1, 2]]},
            {},
            "3 slots do not divide over 2 EP ranks",
        ),
        ("eplb", {"physical_to_logical_map": [[0, 1, 1, 2]]}, {}, "no slot for expert 3"),
        ("eplb", {"physical_to_logical_map": []}, {}, "list of layers"),
        ("eplb", {"hello": 1}, {}, "neither a plan"),
        ("eplb", [1, 2], {}, "neither a plan"),
        ("eplb", b"hello", {}, "is not JSON"),
        (
            "eplb",
            {"logical_count": [[-1.0] * 4] * 3},
            {},
            "is -1.0: token counts must be finite and not negative",
        ),
        ("eplb", b'{"logical_count": [[NaN, 1, 1, 1]]}', {}, "is nan: token counts"),
        ("eplb", ExpertLoad(np.zeros((2, 3, 4))), {}, r"empty \(no token in any layer\): record"),
        ("linear", {"logical_count": [[0] * 4] * 4}, {}, "empty"),
        (
            "eplb",
            ExpertLoad(np.array([[[1.0] * 4, [0] * 4, [1] * 4]])),
            {},
            r"no token in MoE layer 2 \(1 of 3 layers have none\)",
        ),
        # SGLang numbers dense layers too, which have none by right.
        ("eplb", {"logical_count": [[0] * 4, [1] * 4, [1] * 4, [0] * 4]}, {}, "MoE layer 3"),
        (
            "eplb",
            plan(rows=[[3, 2, 1, 0]], ids=(4,)),
            {},
            r"for layers \[4\] only, behind the model's last MoE layer 3: a draft's rows stand",
        ),
    ],
)
def test_bad_input(tmp_path, strategy, thing, more, message):
    path = None if thing is None else write(tmp_path, thing)
    with pytest.raises(PlacementError, match=message) as error:
        resolve_placement(strategy, path, SHAPE, TWO, **more)
    assert path is None or str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(
        PlacementError,
        match="nowhere.json does not exist: give the path of a plan or recorded load file",
    ):
        resolve_placement("eplb", tmp_path / "nowhere.json", SHAPE, TWO)
