"""Make cases of vLLM over two hosts, and run them.

`tests.support.vllm_runner` runs on the head, the other host has its part of each.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from tests.support.children import engine_lock, python_path, run_child
from tests.support.vllm_runner import ENVIRONMENT

from .network import ROOT, Hosts

_ports = itertools.count(30_000)

FOLLOWER = (
    "--enforce-eager",
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--max-num-batched-tokens",
    "256",
    "--max-num-seqs",
    "8",
    "--gpu-memory-utilization",
    "0.2",
)
"""What `vllm_runner` gives its ``LLM`` besides, as flags."""


def flags(arguments: dict) -> list[str]:
    """Return arguments of ``LLM`` as flags."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def case(
    hosts: Hosts,
    folder: Path,
    name: str,
    arguments: dict,
    there: dict | None = None,
    env_there: dict | None = None,
    **extra,
) -> dict:
    """Make a case over two hosts with ``--nnodes 2``.

    Args:
        arguments: of ``LLM``, the same on both hosts.
        there: what differs on the second one; None takes an argument away.
        env_there: the second one's environment.
    """
    common = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "nnodes": 2,
        "master_addr": hosts.address(0),
        "master_port": next(_ports),
    }
    common |= arguments
    theirs = {
        key: value
        for key, value in (common | {"node_rank": 1} | (there or {})).items()
        if value is not None
    }
    environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "1", **(env_there or {})}
    return {
        "name": name,
        "engine": common | {"node_rank": 0},
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "0"},
        "follower": {
            "on": hosts.on(1, []),
            "arguments": ["--headless", *flags(theirs), *FOLLOWER],
            "env": environment,
            "log": str(folder / f"{name}.follower.log"),
        },
        "probe": True,
        **extra,
    }


def run_on_head(
    hosts: Hosts, folder: Path, cases: list[dict], timeout: float, env: dict[str, str] | None = None
) -> tuple[dict[str, dict], dict[str, str]]:
    """Return (results, what both hosts wrote) by case name; the head is host 0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    command = [
        sys.executable,
        "-m",
        "tests.support.vllm_runner",
        str(folder / "cases.json"),
        str(folder / "results.json"),
    ]
    with engine_lock():
        finished = run_child(
            hosts.on(0, command), timeout, {"PYTHONPATH": python_path(), **(env or {})}, ROOT
        )
    (folder / "head.log").write_text(finished.output)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    missing = {
        "error": f"the head's process ended with {finished.code}",
        "traceback": finished.output[-4000:],
    }
    logs = {}
    for one in cases:
        name = one["name"]
        head = finished.output.partition(f"=== case {name}\n")[2].partition("=== case ")[0]
        log = Path(one["follower"]["log"]) if "follower" in one else None
        there = log.read_text() if log and log.exists() else ""
        logs[name] = f"{head}\n=== the other host\n{there}"
    return {one["name"]: results.get(one["name"], missing) for one in cases}, logs
