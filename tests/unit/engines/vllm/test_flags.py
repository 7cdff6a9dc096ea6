"""vLLM's arguments with and without our flags, in child processes that start no engine."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement
from moe_placement_plugin.formats.plan_json import plan_to_dict, read_plan, rows_to_dict
from moe_placement_plugin.formats.plan_or_load import write as write_file
from tests.support.children import Finished, end_group, python, run_child
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
]  # no engine starts, but a child imports vLLM


def alone(what, argument, env=None):
    """Asks a process of its own: (answer or None, `Finished`)."""
    command = python("-m", "tests.support.vllm_flags_child", what, json.dumps(argument))
    finished = run_child(command, 200, {"HF_HUB_OFFLINE": "1", **(env or {})}, ROOT)
    lines = [line for line in finished.output.splitlines() if line.startswith("ANSWER ")]
    return (json.loads(lines[-1][7:]) if lines else None), finished


@pytest.fixture(scope="module")
def child():
    """Asks a process that has imported vLLM: (answer or None, `Finished`)."""
    process = subprocess.Popen(
        python("-m", "tests.support.vllm_flags_child"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True,
    )  # fmt: skip

    def ask(what, argument):
        process.stdin.write(json.dumps([what, argument], default=str) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("ANSWER "):
                found = json.loads(line[7:])
                return found["answer"], Finished(0, found["output"])
        raise AssertionError(f"the process that imports vLLM ended with {process.wait(timeout=10)}")

    yield ask
    end_group(process)


def test_without_the_flag_no_attribute_differs(child):
    answer, finished = child("attributes", ["--model", "m", "--tensor-parallel-size", "2"])
    assert answer is not None, finished.output
    assert answer["count"] > 10_000 and answer["loaded"]
    assert answer["changed"] == [] and answer["ours"] == []


def test_excluded_by_vllm_plugins_no_attribute_differs_in_spite_of_the_flag():
    answer, finished = alone(
        "attributes",
        ["--model", "m", "--enable-expert-parallel", "--expert-placement-strategy", "zigzag"],
        {"VLLM_PLUGINS": ""},
    )
    assert answer is not None, finished.output
    assert answer["changed"] == [] and answer["ours"] == [] and not answer["loaded"]


def test_with_the_flag_the_arguments_differ_and_nothing_else(child):
    answer, finished = child(
        "attributes",
        ["--model", "m", "--enable-expert-parallel", "--expert-placement-strategy", "zigzag"],
    )
    assert answer is not None, finished.output
    assert (
        "vllm.engine.arg_utils:EngineArgs.create_engine_config" in answer["changed"]
        and answer["ours"]
    )
    assert all(
        name.startswith(("vllm.config.parallel:", "vllm.engine.arg_utils:"))
        for name in answer["changed"]
    )


def test_the_parser_takes_the_flags_and_refuses_an_unknown_strategy(tmp_path, checkpoints):
    plan = tmp_path / "plan.json"
    taken = [
        "--model",
        str(checkpoints["qwen"]),
        "--expert-placement-strategy=zigzag",
        "--expert_placement_file",
        str(plan),
    ]
    answer, finished = alone(
        "parser", [taken, ["--model", "m", "--expert-placement-strategy", "zigzga"]]
    )
    assert answer is not None, finished.output
    assert answer == [
        {"strategy": "zigzag", "additional_config": {"expert_placement_file": str(plan)}},
        {"exit": 2},
    ]
    assert "invalid choice: 'zigzga'" in finished.output
    for name in ("linear", "round_robin", "zigzag", "balanced", "eplb"):
        assert name in finished.output.rpartition("invalid choice")[2]


def test_the_parser_takes_a_yaml_file(tmp_path, checkpoints):
    plan, config = tmp_path / "plan.json", tmp_path / "config.yaml"
    config.write_text(f"expert-placement-strategy: zigzag\nexpert-placement-file: {plan}\n")
    answer, finished = alone(
        "parser", [["--model", str(checkpoints["qwen"]), "--config", str(config)]]
    )
    assert answer is not None, finished.output
    assert answer == [
        {"strategy": "zigzag", "additional_config": {"expert_placement_file": str(plan)}}
    ]


@pytest.fixture(scope="module")
def results(child, checkpoints, files, tmp_path_factory):
    """Request name -> what came of it; all in one child."""
    folder = tmp_path_factory.mktemp("bad")

    def write(name, thing):
        path = folder / name
        if not isinstance(thing, str):
            write_file(thing, path)
        else:
            path.write_text(thing)
        return path

    rows = [list(range(30))] * 4
    base = {
        "model": checkpoints["qwen"],
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    }
    zigzag = {**base, "expert_placement_strategy": "zigzag"}
    eplb = {**base, "expert_placement_strategy": "eplb"}
    dense = folder / "dense"
    dense.mkdir()
    config = json.loads((checkpoints["qwen"] / "config.json").read_text())
    dense_config = {k: v for k, v in config.items() if "expert" not in k and not k.startswith("moe")} | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
    }  # fmt: skip
    (dense / "config.json").write_text(json.dumps(dense_config))
    one_layer_without = np.ones((1, 4, 30))
    one_layer_without[:, 2] = 0
    draft = Placement(rows, 30, (15, 15))
    with_draft = write("with_draft", Placement(rows, 30, (15, 15), (), "eplb", {}, draft))
    draft_only = {k: v for k, v in plan_to_dict(draft).items() if k != "physical_to_logical"} | {"draft": rows_to_dict(draft)}  # fmt: skip

    def speculative(model):
        return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}

    requests = {
        "draft with rows": {**base, "expert_placement_file": with_draft, "speculative_config": speculative(checkpoints["qwen"])},
        "draft without rows": {**zigzag, "speculative_config": speculative(dense)},
        "rows for no draft": {**base, "expert_placement_file": with_draft},
        "rows for a dense draft": {**base, "expert_placement_file": with_draft, "speculative_config": speculative(dense)},
        "plan for the draft only": {**eplb, "expert_placement_file": write("draft_only", json.dumps(draft_only))},
        "no token": {**eplb, "expert_placement_file": write("none", ExpertLoad(np.zeros((1, 4, 30))))},
        "layer without a token": {**eplb, "expert_placement_file": write("part", ExpertLoad(one_layer_without))},
        "batched kernel": {**zigzag, "moe_backend": "flashinfer_cutedsl", "data_parallel_size": 2,
                           "all2all_backend": "deepep_low_latency", "tensor_parallel_size": 1},
        "zigzag": zigzag,
        "round_robin": {**base, "expert_placement_strategy": "round_robin"},
        "file only": {**base, "expert_placement_file": files["uneven"]},
        "file in additional_config": {**base, "additional_config": {"expert_placement_file": str(files["uneven"])}},
        "linear": base,
        "no ep": {**zigzag, "enable_expert_parallel": False},
        "one rank": {**zigzag, "tensor_parallel_size": 1},
        "unknown": {**base, "expert_placement_strategy": "zigzga"},
        "eplb without load": eplb,
        "missing file": {**eplb, "expert_placement_file": folder / "none.json"},
        "not json": {**eplb, "expert_placement_file": write("text", "hello")},
        "nan": {**eplb, "expert_placement_file": write("nan", '{"logical_count": [[NaN]]}')},
        "negative": {**eplb, "expert_placement_file": write("negative", '{"logical_count": [[-3]]}')},
        "load of other experts": {**eplb, "expert_placement_file": write("load7", ExpertLoad(np.ones((1, 4, 7))))},
        "plan of other layers": {**eplb, "expert_placement_file": write("plan3", Placement(rows[:3], 30, (15, 15)))},
        "plan of other experts": {**eplb, "expert_placement_file": write("plan8", Placement([list(range(8))] * 4, 8, (4, 4)))},
        "plan of other ranks": {**eplb, "expert_placement_file": write("plan4r", Placement(rows, 30, (8, 8, 7, 7)))},
        "expert missing": {**eplb, "expert_placement_file": write("missing", json.dumps({
            "format": "moe-placement-plan", "version": 1, "strategy": "x", "num_logical_experts": 30, "slots_per_rank": [15, 15],
            "physical_to_logical": [[*range(29), 0]] * 4}))},
        "expert twice": {**eplb, "expert_placement_file": write("twice", json.dumps({
            "format": "moe-placement-plan", "version": 1, "strategy": "x", "num_logical_experts": 30, "slots_per_rank": [16, 15],
            "physical_to_logical": [[*range(15), 0, *range(15, 30)]] * 4}))},
        "version": {**zigzag, "pretend_version": "0.24.9"},
        "future version": {**zigzag, "pretend_version": "0.34.0"},
        "dense model": {**zigzag, "model": dense, "skip_tokenizer_init": True, "enable_expert_parallel": False},
        "moe backend": {**zigzag, "moe_backend": "flashinfer_cutlass"},
        "all2all": {**zigzag, "data_parallel_size": 2, "all2all_backend": "deepep_high_throughput"},
        "routing tables, uneven": {**zigzag, "tensor_parallel_size": 4, "all2all_backend": "deepep_low_latency",
                                   "data_parallel_size": 2},
    }  # fmt: skip
    answers, finished = child("configs", list(requests.values()))
    assert answers is not None, finished.output
    return dict(zip(requests, answers, strict=True))


def test_accepted_requests_carry_the_whole_placement(results, files):
    digest = read_plan(files["uneven"]).digest
    assert results["zigzag"]["strategy"] == "zigzag" == results["zigzag"]["value"]
    assert results["round_robin"] == results["zigzag"]
    assert (
        results["file only"]["digest"] == results["file in additional_config"]["digest"] == digest
    )
    with_draft = results["draft with rows"]
    assert with_draft.get("digest") and with_draft["digest"] != results["linear"]["digest"]
    assert results["draft without rows"].get("strategy") == "zigzag", results["draft without rows"]
    assert results["batched kernel"].get("strategy") == "zigzag", results["batched kernel"]
    # On the CPU build, expert parallelism itself needs the plugin; the placement is the engine's own.
    linear = results["linear"]
    assert (
        linear["strategy"] == linear["value"] == "linear"
        and linear["digest"] is linear["hosts"] is None
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("rows for no draft", ["has rows for a draft (layers [0, 1, 2, 3])", "runs no draft"]),
        ("rows for a dense draft", ["has rows for a draft", "runs no draft with experts"]),
        ("plan for the draft only", ["is a plan for the draft only", "physical_to_logical"]),
        ("no token", ["none: the recording is empty (no token in any layer)"]),
        ("layer without a token", ["part: the recording has no token in MoE layer 2 (1 of 4"]),
        ("no ep", ["zigzag without --enable-expert-parallel", "add --enable-expert-parallel"]),
        ("one rank", ["one EP rank", "--tensor-parallel-size"]),
        ("unknown", ["unknown expert placement strategy 'zigzga'", "zigzag"]),
        ("eplb without load", ["has none", "--expert-placement-file"]),
        ("missing file", ["none.json does not exist"]),
        ("not json", ["is not JSON"]),
        ("nan", ["is nan", "finite and not negative"]),
        ("negative", ["is -3", "finite and not negative"]),
        ("load of other experts", ["7 experts per layer, the model has 30"]),
        ("plan of other layers", ["plan for 3 layers, the model has 4 MoE layers"]),
        ("plan of other experts", ["plan for 8 experts, the model has 30"]),
        ("plan of other ranks", ["plan for 4 EP ranks, the engine runs 2"]),
        ("expert missing", ["layer 0 has no slot for expert 29"]),
        ("expert twice", ["expert 0 2 times on rank 0"]),
        ("version", ["vLLM 0.24.9 is outside the supported range 0.25 to 0.34"]),
        ("future version", ["vLLM 0.34.0 is outside"]),
        ("dense model", ["is no Mixture-of-Experts model"]),
        ("moe backend", ["MoE back end flashinfer_cutlass", "ignores expert maps", "triton"]),
        ("all2all", ["all2all back end deepep_high_throughput", "allgather_reducescatter"]),
        (
            "routing tables, uneven",
            ["deepep_low_latency needs the same number of experts on every rank"],
        ),
    ],
)
def test_bad_input_is_refused_with_one_clear_message(results, name, words):
    result = results[name]
    assert result.get("error") == "PlacementError", result
    for word in words:
        assert word in result["message"]
    assert "\n" not in result["message"]


def test_hosts_with_and_without_the_head_s_file(child, checkpoints, tmp_path):
    """What each host makes of the same flags: --nnodes 2, the file on the head only, or not what it should be."""
    load, other, absent = (
        tmp_path / "load.safetensors",
        tmp_path / "other.json",
        tmp_path / "absent.json",
    )
    write_file(ExpertLoad(np.random.default_rng(2).zipf(1.5, (2, 3, 32)), (1, 2, 3)), load)
    write_file(Placement([np.arange(30)] * 4, 30, (10, 10, 10)), other)
    glm = {
        "model": str(checkpoints["glm"]),
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    }
    two = glm | {"nnodes": 2, "master_addr": "10.0.0.1", "distributed_executor_backend": "mp"}
    head, second = two | {"node_rank": 0}, two | {"node_rank": 1}
    eplb = {"expert_placement_strategy": "eplb", "expert_placement_file": str(load)}
    requests = {
        "head": head | eplb | {"expert_placement_locality": "soft", "expert_host_timeout": 20},
        "no file": second
        | eplb
        | {"expert_placement_file": str(absent), "expert_placement_locality": "soft"},
        "no file flag": second | {"expert_placement_strategy": "eplb"},
        "same file": second | eplb,
        "bad file": second | {"expert_placement_file": str(other)},
        "head without the file": head | {"expert_placement_file": str(absent)},
        "one host without the file": glm | {"expert_placement_file": str(absent)},
        "zigzag": second | {"expert_placement_strategy": "zigzag"},
        "one host": glm | {"expert_placement_strategy": "zigzag"},
        "timeout on one host": glm
        | {"expert_placement_strategy": "zigzag", "expert_host_timeout": 20},
        "bad timeout": head | {"expert_placement_strategy": "zigzag", "expert_host_timeout": 0.5},
        "locality on one host": glm | eplb | {"expert_placement_locality": "node"},
        "locality without a load": head
        | {"expert_placement_strategy": "zigzag", "expert_placement_locality": "node"},
    }
    answer, finished = child("configs", list(requests.values()))
    assert answer is not None, finished.output
    found = dict(zip(requests, answer))
    # The nodes reach the planner, and the timeout the workers.
    assert (
        found["head"]["nodes"] == [0, 1]
        and found["head"]["hosts"]["timeout"] == 20
        and not found["head"]["hosts"]["adopts"]
    )
    for name in ("no file", "no file flag"):
        assert (
            found[name]["hosts"]["adopts"]
            and found[name]["digest"] is None
            and found[name]["value"] == "eplb"
        ), found[name]
    assert found["same file"]["digest"] and found["same file"]["source"] == str(load)
    hosts = {"timeout": 60, "nodes": 2, "adopts": False, "error": None}
    assert found["same file"]["hosts"] == hosts
    # Errors that may be this host's only are told to the others by the workers; on one host they are raised at once.
    assert (
        "is a plan for 30 experts" in found["bad file"]["hosts"]["error"]
        and found["bad file"]["value"] == "eplb"
    )
    assert str(absent) in found["head without the file"]["hosts"]["error"]
    assert str(absent) in found["one host without the file"]["message"]
    assert found["zigzag"]["digest"] and found["zigzag"]["hosts"]["error"] is None
    assert found["one host"]["hosts"] is None
    assert (
        "several hosts" in found["timeout on one host"]["message"]
        and "2 or more" in found["bad timeout"]["message"]
    )
    assert "on one node" in found["locality on one host"]["message"]
    # Not a host's own mistake: every host says so by itself.
    assert "does not plan from a load" in found["locality without a load"]["message"]
