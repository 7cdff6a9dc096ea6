"""Test data-parallel ranks that share experts: each has requests of its own.

Every MoE layer gathers all ranks' tokens.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.lab.gpu import one_gpu
from moe_placement_plugin.lab.gpu.serving.contestants import RESTLESS
from moe_placement_plugin.lab.gpu.serving.server_logs import moved
from moe_placement_plugin.lab.servers.engines import SERVING_ENGINES, Placed, ServerSettings
from moe_placement_plugin.lab.servers.server import Server, free_port
from moe_placement_plugin.recording.recorder import IDLE
from tests.integration.routing_reference import Reference, check
from tests.support.children import engine_lock, python_path
from tests.support.vllm_runner import MAX_TOKENS, PROMPTS
from tests.support.warm_workers import WARM_SITE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROUNDS = 6
"""How often all prompts are asked; as many are under way at once as there are prompts."""


def test_experts_move_under_data_parallel_ranks(checkpoints, files, stock, tmp_path):
    """Answers are one rank's, and what is recorded is the model's own routing.

    The placement is planned from a load, has two redundant experts, and is rebalanced while
    requests run.
    """
    port, record, prompts = free_port(), tmp_path / "load.safetensors", PROMPTS * ROUNDS
    eplb = {"window_size": 8, "step_interval": 8, "num_redundant_experts": 2}
    moving = (
        "--enable-eplb",
        "--eplb-config",
        json.dumps(eplb),
        "--expert-rebalance",
        json.dumps(RESTLESS),
        "--no-enable-prefix-caching",
    )
    vllm = SERVING_ENGINES["vllm"]
    line, env = vllm.command(
        checkpoints["qwen"],
        port,
        Placed("eplb", 2, files["qwen"], record=record),
        ServerSettings(arguments=moving),
    )
    line[line.index("--tensor-parallel-size")] = "--data-parallel-size"
    env["PYTHONPATH"] = python_path(WARM_SITE, one_gpu.HERE / "shared")
    with (
        engine_lock(),
        Server(line, port, env, tmp_path / "log", 240) as server,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        answers = list(
            pool.map(lambda prompt: vllm.complete(server.url, "tiny", prompt, MAX_TOKENS), prompts)
        )
        # Idle engines write what they have counted: within two looks, and one of the first rank at
        # the other's part.
        time.sleep(IDLE + 3)
    found = moved(server.output(), "vllm")
    assert found["accepted"] and found["exchanges"] and found["moved_bytes"], server.tail(40)
    references = stock["qwen"]["answers"] * ROUNDS
    assert [answer.token_ids for answer in answers] == [
        reference["ids"] for reference in references
    ]
    ours, theirs = (
        np.array(all_of)
        for all_of in ([a.logprobs for a in answers], [r["logprobs"] for r in references])
    )
    assert np.abs(ours - theirs).max() < 1e-4
    reference = Reference(checkpoints["qwen"])
    tokens = [reference.tokenizer(prompt)["input_ids"] for prompt in prompts]
    check(
        read_load(record),
        reference.expected(tokens, [answer.token_ids for answer in answers])[0],
        None,
    )
