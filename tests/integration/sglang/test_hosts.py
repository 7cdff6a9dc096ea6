"""Test a real SGLang over two hosts (``--nnodes 2``): one placement, tokens of one host.

Stale files and dead links are refused.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.formats.plan_or_load import write
from tests.integration.hosts.network import made
from tests.integration.sglang.engines import ENGINE, ENV, ROOT, case, run_cases
from tests.integration.sglang.test_engine import TOLERANCE
from tests.support.children import end_group, engine_lock, python_path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

TIMEOUT = 10
"""Seconds after which a silent host counts as gone, in these tests."""

GRACE = 20
"""Seconds that SGLang may take from the end of a scheduler to the end of its server."""

_ports = itertools.count(31_000, 10)


@pytest.fixture(scope="module")
def hosts():
    """Make two hosts, see `tests.integration.hosts.network`."""
    yield from made("sgl")


@pytest.fixture(scope="module", autouse=True)
def machine():
    """Hold the machine's engine lock until the last test of the module."""
    with engine_lock():
        yield


def flags(arguments: dict) -> list[str]:
    words = []
    for name, value in arguments.items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def on_two_hosts(
    hosts, folder, name: str, model, arguments: dict, there: dict | None = None, **extra
):
    """Run a case on two hosts; return what both left behind, and when the head had ended."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"nnodes": 2, "dist_init_addr": f"{hosts.address(0)}:{next(_ports)}", **arguments}
    head = (
        case(name, model, 2, 2, host=hosts.address(0), node_rank=0, **common)
        | {"threads": "0|0"}
        | extra
    )
    theirs = ENGINE | {
        "model_path": model,
        "skip_tokenizer_init": True,
        "tp_size": 2,
        "ep_size": 2,
        "host": hosts.address(1),
        "node_rank": 1,
    }
    command = hosts.on(
        1, [sys.executable, "-m", "sglang.launch_server", *flags(theirs | common | (there or {}))]
    )
    path = python_path()
    env = {**os.environ, **ENV, "PYTHONPATH": path, "SGLANG_CPU_OMP_THREADS_BIND": "1|1"}
    with open(folder / "other.log", "w") as log:
        other = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
    try:
        outcome = run_cases(
            [head],
            folder,
            240,
            {"PYTHONPATH": path},
            lambda words: hosts.on(0, words),
            forked=False,
        )[name]
        ended = time.time()
        if extra or not outcome.result.get("rows"):
            other.wait(timeout=TIMEOUT + GRACE)  # it must end by itself
    finally:
        end_group(other)
    return outcome, (folder / "other.log").read_text(), ended


@pytest.fixture(scope="module")
def one_host(models, tmp_path_factory):
    """Return SGLang's own answers on one host and one rank."""
    return run_cases(
        [case("glm", models["glm"])],
        tmp_path_factory.mktemp("one-host"),
        env={"SGLANG_PLUGINS": "none"},
    )["glm"]


def check_equal(outcome, reference):
    assert outcome.result.get("rows"), outcome.log[-4000:]
    assert outcome.ids == reference.ids
    assert np.abs(np.subtract(outcome.values, reference.values)).max() < TOLERANCE


def test_zigzag_on_two_hosts_gives_the_tokens_of_one(hosts, models, one_host, tmp_path):
    arguments = {"expert_placement_strategy": "zigzag", "expert_host_timeout": TIMEOUT}
    outcome, other, _ = on_two_hosts(hosts, tmp_path, "zigzag", models["glm"], arguments)
    check_equal(outcome, one_host)
    line = next(line for line in outcome.log.splitlines() if "hosts agree after" in line)
    assert f"{hosts.name}0 (10.77.0.1), rank 0; {hosts.name}1 (10.77.0.2), rank 1" in line
    assert float(line.partition("hosts agree after ")[2].split()[0]) < 100, line
    for log in (outcome.log, other):
        assert "expert placement zigzag is in force in 3 layers" in log


def test_a_file_that_only_the_head_has_and_a_link_that_goes_down(hosts, models, one_host, tmp_path):
    rng = np.random.default_rng(3)
    load = tmp_path / "load.json"
    load.write_text(json.dumps({"logical_count": rng.zipf(1.5, (2, 4, 32)).tolist()}))
    arguments = {
        "expert_placement_strategy": "eplb",
        "expert_placement_file": str(load),
        "expert_placement_locality": "soft",
        "expert_host_timeout": TIMEOUT,
    }
    there = {"expert_placement_file": str(tmp_path / "not-on-this-host" / "load.json")}
    try:
        outcome, other, ended = on_two_hosts(
            hosts,
            tmp_path,
            "eplb",
            models["glm"],
            arguments,
            there,
            vanish=hosts.command("link", 1, "down"),
        )
    finally:
        hosts.link(1, "up")
    check_equal(outcome, one_host)
    assert "this host has no file, the head's placement holds" in other
    digest = outcome.log.partition("expert placement eplb is in force in 3 layers (plan ")[2][:12]
    assert digest and f"expert placement eplb is in force in 3 layers (plan {digest}" in other
    assert "error" not in outcome.result, outcome.result
    seconds = ended - outcome.result["vanished"]
    print(f"the head ended {seconds:.1f} s after the link")
    assert seconds < TIMEOUT * 1.2 + GRACE
    assert (
        f"host {hosts.name}1 (10.77.0.2), rank 1 gave no sign of life for {TIMEOUT} s"
        in outcome.log
    )
    assert f"host {hosts.name}0 (10.77.0.1), rank 0 gave no sign of life for {TIMEOUT} s" in other


def test_a_stale_file_on_one_host_stops_both(hosts, models, tmp_path):
    rng = np.random.default_rng(4)
    plans = {}
    for name in ("plan", "stale"):
        plans[name] = Placement([rng.permutation(32) for _ in range(4)], 32, (16, 16))
        write(plans[name], tmp_path / f"{name}.json")
    arguments = {
        "expert_placement_file": str(tmp_path / "plan.json"),
        "expert_host_timeout": TIMEOUT,
    }
    outcome, other, _ = on_two_hosts(
        hosts,
        tmp_path,
        "stale",
        models["qwen32"],
        arguments,
        {"expert_placement_file": str(tmp_path / "stale.json")},
    )
    assert not outcome.result.get("rows")
    message = (
        f"{hosts.name}1 (10.77.0.2), rank 1 has placement {plans['stale'].digest[:12]} from "
        f"{tmp_path / 'stale.json'}, "
        f"the head has placement {plans['plan'].digest[:12]} from {tmp_path / 'plan.json'}"
    )
    for log in (outcome.log, other):
        assert message in log and "none of them starts" in log and "is in force" not in log
