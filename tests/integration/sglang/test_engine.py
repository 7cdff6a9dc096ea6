"""Test real SGLang engines on the CPU: every strategy answers as one rank does.

A worker without the plugin dies.

All in float32, where a placement changes nothing but the order in which the ranks' partial sums of
an MoE layer are added: about 4 layers x a few float32 roundings (6e-8 relative) of hidden states of
order 10, amplified by random weights drawn wide (see `tiny_models`), up to 3.3e-5 in a log
probability as measured. The tolerance is six times that; experts in the wrong place change log
probabilities by much more than 0.02, which `test_wrong_experts_would_be_noticed` makes sure of.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin.engines.sglang import compat
from moe_placement_plugin.formats.load_file import read_load
from tests.integration.sglang.engine_child import row_of
from tests.integration.sglang.engines import (
    ENV,
    MAX_NEW_TOKENS,
    PROMPTS,
    Outcome,
    case,
    run_cases,
    threads,
)
from tests.support.children import end_group, engine_lock

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]

TOLERANCE = 2e-4

UNLOADED = "without the plugin"

VLLM_LOAD = Path(__file__).parent / "data" / "vllm-qwen3-moe-load.safetensors"
"""A load recorded by vLLM 0.32.0 while it served the same tiny model.

It was written with --expert-load-record, by `moe-placement demo --engine vllm --keep`.
"""

REFERENCE = {
    "zigzag": "qwen32",
    "eplb-redundant": "qwen32",
    "zigzag-30": "qwen30",
    "load-of-vllm": "qwen30",
    "plan-of-vllm": "qwen30",
    "glm-zigzag": "glm",
    "glm-redundant-tp4-ep2": "glm",
}
"""Case with a placement -> the model whose one-rank answer it must give."""


@pytest.fixture(scope="module", autouse=True)
def machine():
    """Hold the machine's engine lock until the last test of the module.

    It is waited for once, not for every start.
    """
    with engine_lock():
        yield


@pytest.fixture(scope="module")
def outcomes(models, files, stock, served, tmp_path_factory) -> dict[str, Outcome]:
    """Run every case, started once."""
    q32, q30, glm = models["qwen32"], models["qwen30"], models["glm"]
    placed = [
        case(
            "eplb-redundant",
            q32,
            2,
            2,
            expert_placement_strategy="eplb",
            expert_placement_file=str(files["load"]),
            ep_num_redundant_experts=4,
        ),
        case("zigzag-30", q30, 2, 2, expert_placement_strategy="zigzag"),
        case(
            "load-of-vllm",
            q30,
            2,
            2,
            expert_placement_strategy="eplb",
            expert_placement_file=str(VLLM_LOAD),
        ),
        case("plan-of-vllm", q30, 4, 4, expert_placement_file=str(files["uneven-four-ranks"])),
        case("glm-zigzag", glm, 2, 2, expert_placement_strategy="zigzag"),
        case(
            "glm-redundant-tp4-ep2",
            glm,
            4,
            2,
            expert_placement_strategy="zigzag",
            ep_num_redundant_experts=4,
        ),
    ]
    wrong = case("wrong-experts", swapped_experts(q32, tmp_path_factory.mktemp("wrong") / "model"))
    unloaded = case(
        UNLOADED, q32, 2, 2, {"SGLANG_PLUGINS": "another"}, expert_placement_strategy="zigzag"
    )
    # The last one takes the process that asked for it along.
    found = run_cases([wrong, *placed, unloaded], tmp_path_factory.mktemp("engines"))
    return {**stock, "qwen32": stock["qwen32"].first(MAX_NEW_TOKENS), "zigzag": served[0], **found}


def swapped_experts(model: Path, folder: Path) -> Path:
    """Write a checkpoint whose experts 0 and 1 of layer 1 have changed places.

    It is the least that a wrong placement can do.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    for part in ("gate_proj", "up_proj", "down_proj"):
        names = [f"model.layers.1.mlp.experts.{expert}.{part}.weight" for expert in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def furthest(one: Outcome, other: Outcome) -> float:
    """Return the greatest difference of any log probability."""
    return float(np.abs(np.array(one.values) - np.array(other.values)).max())


def test_every_case_ran(outcomes):
    failed = {
        name: o.result.get("error", o.log[-1500:])
        for name, o in outcomes.items()
        if name != UNLOADED and "rows" not in o.result
    }
    assert not failed


@pytest.mark.parametrize("name", REFERENCE)
def test_answers_equal_one_ranks(outcomes, name):
    placed, stock = outcomes[name], outcomes[REFERENCE[name]]
    assert placed.ids == stock.ids
    difference = furthest(placed, stock)
    print(f"{name}: log probabilities differ by at most {difference:.1e}")
    assert difference < TOLERANCE


def test_wrong_experts_would_be_noticed(outcomes):
    """Two experts of one layer in each other's place differ by far more than the tolerance."""
    assert furthest(outcomes["wrong-experts"], outcomes["qwen32"]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", REFERENCE)
def test_the_patches_work_in_every_scheduler_process(outcomes, name):
    outcome = outcomes[name]
    tp, ep = outcome.result["info"]["tp_size"], outcome.result["info"]["ep_size"]
    everyone = {f"TP{rank} EP{rank * ep // tp}" for rank in range(tp)}
    layers = 3 if name.startswith("glm") else 4
    assert outcome.processes_with(f"is in force in {layers} layers") == everyone
    replicas = "redundant" in name or name == "plan-of-vllm"
    direct = 0 if replicas else layers
    assert outcome.processes_with(f"routed by one look-up in {direct};") == everyone
    assert outcome.processes_with(f"slots in {layers} layers of this rank (replicas)") == everyone
    used = [
        "placement",
        "slots",
        "loader",
        "slot-loader",
        "model",
        "cpu-expert-parallelism",
        "verify-load",
        "verify-clean",
    ]
    used += [] if compat.dispatch_is_rank_invariant() else ["all-replicas"]
    for patch in used:
        assert outcome.processes_with(f"patch {patch} in use") == everyone, patch


def test_stock_processes_have_no_patch(outcomes):
    for name in ("qwen32", "qwen30", "glm"):
        assert " in use" not in outcomes[name].log and "expert placement" not in outcomes[name].log


def test_redundant_experts_are_the_engines_own(outcomes):
    assert outcomes["eplb-redundant"].result["info"]["ep_num_redundant_experts"] == 4
    assert outcomes["eplb-redundant"].result["info"]["ep_dispatch_algorithm"] == "dynamic"
    assert outcomes["plan-of-vllm"].result["info"]["ep_num_redundant_experts"] == 2
    assert "2 redundant slots per layer are added" in outcomes["plan-of-vllm"].log
    assert outcomes["zigzag"].result["info"]["ep_dispatch_algorithm"] == "static"
    assert "patch eplb-" not in outcomes["eplb-redundant"].log


def test_a_worker_without_the_plugin_dies(outcomes):
    """The launcher has the plugin, its workers have not.

    They must not serve with the default placement.
    """
    outcome = outcomes[UNLOADED]
    assert "rows" not in outcome.result
    assert "moe_placement_plugin is not loaded in this process" in outcome.log
    assert "NotADirectoryError" in outcome.log


@pytest.fixture(scope="module")
def served(models, tmp_path_factory) -> tuple[Outcome, dict]:
    """Run `sglang serve` with the flag, and return what it answered.

    It is asked for the prompts, a completion, a verification, a scrape of its metrics and the end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("sglang")),
        "serve",
        "--model-path",
        str(models["qwen32"]),
        "--host",
        "127.0.0.1",
    ]
    command += (
        f"--port {port} --tp-size 2 --ep-size 2 --expert-placement-strategy zigzag --device cpu "
        "--dtype float32 --attention-backend torch_native --sampling-backend pytorch "
        "--grammar-backend none --skip-server-warmup --disable-overlap-schedule "
        "--max-total-tokens 4096 --max-running-requests 8 --mem-fraction-static 0.3"
    ).split()
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True}
    folder = tmp_path_factory.mktemp("served")
    log, record = folder / "server.log", folder / "load"
    command += [
        "--enable-metrics",
        "--expert-load-record",
        str(record),
        "--expert-load-interval",
        "0.5",
    ]
    more = {"record": record}
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **ENV, "SGLANG_CPU_OMP_THREADS_BIND": threads(2)},
        )  # fmt: skip
        try:
            _wait_until_ready(server, port, log)
            wanted = {
                "input_ids": PROMPTS,
                "sampling_params": sampling,
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            answers = _ask(port, "/generate", wanted)
            more["completion"] = _ask(
                port,
                "/v1/completions",
                {"model": "m", "prompt": "hello", "max_tokens": 4, "temperature": 0},
            )
            more["verified"] = _ask(port, "/weights_checker", {"action": "expert_placement"})
            info = _ask(port, "/server_info")
            time.sleep(1.5)  # three intervals of the recording
            more["metrics"] = _scrape(port)
        finally:
            end_group(server)
    more["code"] = server.returncode
    return Outcome(
        {"rows": [row_of(answer) for answer in answers], "info": info}, log.read_text()
    ), more


def test_the_http_server_takes_the_flag_and_answers(served):
    """That its answers are one rank's is the case `zigzag` above."""
    outcome, more = served
    assert more["verified"]["success"]
    assert more["completion"]["usage"]["completion_tokens"] == 4
    assert "expert placement zigzag is in force" in outcome.log
    assert more["code"] in (0, -signal.SIGTERM, -signal.SIGKILL)


def test_metrics_are_what_was_recorded(served):
    outcome, more = served
    metrics, usage = more["metrics"], more["completion"]["usage"]
    # That every token is counted once is tested in tests/unit/recording; the server's own health
    # checks are requests too.
    asked = (sum(len(prompt) for prompt in PROMPTS) + usage["prompt_tokens"]) * 4 * 4
    assert metrics['moe_expert_tokens_total{phase="prefill"}'] >= asked
    recorded = read_load(more["record"]).counts.sum()
    assert (
        metrics['moe_expert_tokens_total{phase="prefill"}']
        + metrics['moe_expert_tokens_total{phase="decode"}']
        == recorded
    )
    assert (
        sum(name.startswith("moe_expert_balancedness{") for name in metrics) == 4
        and 0.5 <= metrics["moe_expert_balancedness_overall"] <= 1
    )
    assert metrics['moe_placement_events_total{event="verified_slots"}'] >= 4 * 16


def _ask(port: int, path: str, body: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def _scrape(port: int) -> dict[str, float]:
    """Return our metrics of the server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    assert any(line.startswith("sglang:") for line in lines), "the engine's own metrics are gone"
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line.startswith("moe_"))
    }


def _wait_until_ready(server: subprocess.Popen, port: int, log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"not ready after {seconds} s: {log.read_text()[-3000:]}")
