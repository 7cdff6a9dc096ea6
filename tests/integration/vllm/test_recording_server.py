"""Test the loop against a real vLLM server: record with the verb, scrape, plan.

It scrapes /metrics, and plans from what the server wrote.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.lab.demo.tiny_models import write_qwen3_moe

from ...support.children import end_group, engine_lock
from ...support.vllm_runner import ENVIRONMENT
from ..routing_reference import Reference, check

pytest.importorskip("vllm", reason="vLLM is not installed here")


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_record_scrape_and_plan(tmp_path, cli):
    model = write_qwen3_moe(tmp_path / "qwen")
    path, prompts = tmp_path / "load.safetensors", tmp_path / "prompts.txt"
    prompts.write_text(
        "hello world\nThe quick brown fox\n" + json.dumps({"prompt": "0123456789"}) + "\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    limits = "--max-model-len 256 --max-num-batched-tokens 256 --max-num-seqs 8"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *f"--host 127.0.0.1 --port {port} --dtype float32 {limits} --enforce-eager".split(),
        *("--expert-load-record", str(path), "--expert-load-interval", "1"),
    ]
    log = open(tmp_path / "server.log", "w+")
    with engine_lock():
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0"},
        )  # fmt: skip
        try:
            wait_until_ready(server, url, tmp_path / "server.log")
            done = cli(
                "record", path, "--url", url, "--prompts", prompts, "--max-tokens", 5, "--json"
            )
            metrics = fetch(f"{url}/metrics")
        finally:
            end_group(server)
            log.close()
    sent = json.loads(done.stdout)
    assert sent["sent"]["requests"] == 3 and sent["sent"]["generated_tokens"] == 15
    # Every prompt token and all generated ones but the last of each answer, 4 experts each, in 4
    # layers.
    routed = (sent["sent"]["prompt_tokens"] + 15 - 3) * 4 * 4
    assert sent["routed_tokens"] == routed == read_load(path).counts.sum()
    # Expert parallelism is off: an operator records before deciding.
    reference = Reference(model)
    tokens = [
        reference.tokenizer(prompt)["input_ids"]
        for prompt in ("hello world", "The quick brown fox", "0123456789")
    ]
    check(
        read_load(path),
        reference.expected(tokens, [reference.greedy(prompt, 5) for prompt in tokens])[0],
        None,
    )
    ours = {
        line.split(" ")[0]: float(line.split(" ")[1])
        for line in metrics.splitlines()
        if line.startswith("moe_")
    }
    assert sum(v for k, v in ours.items() if k.startswith("moe_expert_tokens_total")) == routed
    assert sum(k.startswith("moe_expert_hottest_load_ratio") for k in ours) == 12
    assert "vllm:" in metrics
    plan = tmp_path / "plan.json"
    cli("plan", path, "--ranks", 2, "-o", plan)
    assert plan.exists()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            fetch(f"{url}/health")
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
