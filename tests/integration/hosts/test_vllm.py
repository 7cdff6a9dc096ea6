"""Test a real vLLM over two hosts: ``--nnodes 2`` and Ray, one placement.

It gives the tokens of one host; stale files and dead links are refused.
"""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement, PlacementRequest, Topology, get_strategy
from moe_placement_plugin.formats.plan_json import read_plan
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.demo.tiny_models import write_glm4_moe
from tests.integration.vllm.conftest import BOTH, run_cases
from tests.integration.vllm.test_engine import (
    FLOAT32_TOLERANCE,
    answers_of,
    check_maps,
    largest_difference,
)

from .network import Hosts, why_not
from .ray_cluster import ray_nodes, ray_path
from .vllm_cases import case, run_on_head

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed in this environment"
    ),
]

TIMEOUT = 10
"""Seconds after which a silent host counts as gone, in these tests."""

GRACE = 20
"""Seconds from the death of a worker to the end of its server, for an engine of this version."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a checkpoint, a load with two windows, a plan and another plan of the same shape."""
    folder = tmp_path_factory.mktemp("hosts")
    rng = np.random.default_rng(5)
    load = ExpertLoad(rng.zipf(1.5, (2, 3, 32)), (1, 2, 3))
    write(load, folder / "load.safetensors")
    for name in ("plan", "stale"):
        write(
            Placement([rng.permutation(32) for _ in range(3)], 32, (16, 16), (1, 2, 3)),
            folder / f"{name}.json",
        )
    return {"model": write_glm4_moe(folder / "glm"), "folder": folder, "load": load}


@pytest.fixture(scope="module")
def one_host(made):
    """Return answers of vLLM without this plugin, on one host and one rank."""
    cases = [{"name": "stock", "engine": {"model": made["model"]}, "env": BOTH}]
    return run_cases(made["folder"], cases, {"VLLM_PLUGINS": ""}, 300)


@pytest.fixture(scope="module")
def served(hosts, made):
    """Return (results, logs) of the cases with ``--nnodes 2``; files are on the head only."""
    folder = made["folder"]
    absent = folder / "not-on-this-host"
    model = {"model": made["model"], "expert_host_timeout": TIMEOUT}
    soft = {"expert_placement_strategy": "eplb", "expert_placement_locality": "soft"}
    cases = [
        case(hosts, folder, "zigzag", {**model, "expert_placement_strategy": "zigzag"}),
        case(
            hosts,
            folder,
            "stale",
            {**model, "expert_placement_file": folder / "plan.json"},
            {"expert_placement_file": folder / "stale.json"},
        ),
        # Both hosts are given the same flags; the second one does not have the file.
        case(
            hosts,
            folder,
            "eplb",
            {**model, **soft, "expert_placement_file": folder / "load.safetensors"},
            {"expert_placement_file": absent / "load.safetensors"},
            vanish=hosts.command("link", 1, "down"),
        ),
    ]
    try:
        return run_on_head(hosts, folder / "nnodes", cases, 600)
    finally:
        hosts.link(1, "up")


def test_zigzag_on_two_hosts_gives_the_tokens_of_one(one_host, served):
    results, logs = served
    expected, answers = answers_of(one_host, "stock"), answers_of(results, "zigzag")
    assert [a["ids"] for a in answers] == [a["ids"] for a in expected]
    assert largest_difference(answers, expected) < FLOAT32_TOLERANCE
    check_maps(
        results["zigzag"]["workers"],
        get_strategy("zigzag").place(PlacementRequest(3, 32, Topology(2), layer_ids=(1, 2, 3))),
    )


def test_the_hosts_agree_in_time_and_say_who_they_are(hosts, served):
    line = next(line for line in served[1]["zigzag"].splitlines() if "hosts agree after" in line)
    assert f"{hosts.name}0 (10.77.0.1), rank 0; {hosts.name}1 (10.77.0.2), rank 1" in line
    assert float(line.partition("hosts agree after ")[2].split()[0]) < 100, line


def test_a_plan_from_a_file_that_only_the_head_has(made, one_host, served):
    results, logs = served
    expected, answers = answers_of(one_host, "stock"), answers_of(results, "eplb")
    assert [a["ids"] for a in answers] == [a["ids"] for a in expected]
    assert largest_difference(answers, expected) < FLOAT32_TOLERANCE
    request = PlacementRequest(
        3,
        32,
        Topology.even(2, 2),
        layer_ids=(1, 2, 3),
        num_groups=4,
        load=made["load"],
        locality="soft",
    )
    plan = get_strategy("eplb").place(request)
    check_maps(results["eplb"]["workers"], plan)
    flat = get_strategy("eplb").place(
        PlacementRequest(3, 32, Topology(2), layer_ids=(1, 2, 3), load=made["load"])
    )
    assert plan.digest != flat.digest, "the nodes must have reached the planner"


def test_a_stale_file_on_one_host_stops_both(hosts, made, served):
    results, logs = served
    assert "error" in results["stale"] and "answers" not in results["stale"]
    head, _, there = logs["stale"].partition("=== the other host")
    plans = {
        name: read_plan(made["folder"] / f"{name}.json").digest[:12] for name in ("plan", "stale")
    }
    message = (
        f"{hosts.name}1 (10.77.0.2), rank 1 has placement {plans['stale']} from "
        f"{made['folder'] / 'stale.json'}, "
        f"the head has placement {plans['plan']} from {made['folder'] / 'plan.json'}"
    )
    for log in (head, there):
        assert message in log and "none of them starts" in log
        assert "Loading model from scratch" not in log and "MoE layers, placement" not in log


def test_a_host_that_vanishes_while_serving(hosts, served):
    results, logs = served
    vanished = results["eplb"]["vanished"]
    assert vanished["error"], "a request was answered without the other host"
    assert vanished["seconds"] < TIMEOUT * 1.2 + GRACE
    print(
        f"the head's request failed {vanished['seconds']:.1f} s after the link: "
        f"{vanished['error'][:100]}"
    )
    head, _, there = logs["eplb"].partition("=== the other host")
    assert f"host {hosts.name}1 (10.77.0.2), rank 1 gave no sign of life for {TIMEOUT} s" in head
    assert f"host {hosts.name}0 (10.77.0.1), rank 0 gave no sign of life for {TIMEOUT} s" in there


RAY = find_spec("ray") is not None


@pytest.mark.skipif(not RAY, reason="Ray is not installed in this environment")
def test_ray_gives_the_tokens_of_one_host(made, one_host):
    """Over two hosts where they can be made, else on this one."""
    reason = why_not()
    folder = made["folder"] / "ray"
    folder.mkdir()
    engine = {
        "model": made["model"],
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "ray",
    }
    asked = {
        "name": "ray",
        "engine": engine | {"expert_placement_file": made["folder"] / "plan.json"},
        "env": {},
        "probe": True,
    }
    if reason is None:
        hosts = Hosts(f"ray-{os.getpid()}-", 2)
        starts = [(hosts.on(number, []), hosts.address(number)) for number in range(2)]
        try:
            with ray_nodes(folder, starts) as (head, workers):
                results, _ = run_on_head(
                    hosts, folder, [asked], 300, {"RAY_ADDRESS": head, "PYTHONPATH": ray_path()}
                )
                written = workers()
        finally:
            hosts.down()
        assert f"{hosts.name}0 (10.77.0.1), rank 0; {hosts.name}1 (10.77.0.2), rank 1" in written
    else:
        print(f"Ray on one host only: {reason}")
        with ray_nodes(folder, [([], socket.gethostbyname(socket.gethostname()))]) as (head, _):
            results = run_cases(
                folder, [asked], {"RAY_ADDRESS": head, "PYTHONPATH": ray_path()}, 300
            )
    expected, answers = answers_of(one_host, "stock"), answers_of(results, "ray")
    assert [a["ids"] for a in answers] == [a["ids"] for a in expected]
    assert largest_difference(answers, expected) < FLOAT32_TOLERANCE
    check_maps(results["ray"]["workers"], read_plan(made["folder"] / "plan.json"))
