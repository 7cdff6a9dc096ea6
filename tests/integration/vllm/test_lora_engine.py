"""Test an adapter of experts in a real vLLM on two ranks, slot by slot.

The CPU build has no kernel for it (vLLM takes Triton's, and its stand-in says "module
'triton.language' has no attribute 'float32'" in the first forward pass), so that no token is asked
for here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.children import engine_lock, run_child
from tests.support.paths import ROOT
from tests.support.vllm_lora_child import EXPERTS, LAYERS, value, write_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def serve(checkpoint: Path, folder: Path, **more) -> str:
    """Return the engine's last words, SLOTS or REFUSED."""
    command = [sys.executable, "-m", "tests.support.vllm_lora_child", str(checkpoint)]
    adapter = write_adapter(folder / "adapter")
    with engine_lock():
        finished = run_child([*command, str(adapter), json.dumps(more)], 300, cwd=ROOT)
    found = [
        line for line in finished.output.splitlines() if line.startswith(("SLOTS ", "REFUSED "))
    ]
    assert found, finished.output[-4000:]
    return found[-1]


def wrong(ranks: list[list[dict]]) -> list[tuple[int, int]]:
    """Return (layer, expert) whose slot has another expert's matrices.

    Every expert must have one slot.
    """
    found, seen = [], 0
    for layers in ranks:
        assert len(layers) == LAYERS
        for number, layer in enumerate(layers):
            for expert, slot in enumerate(layer["map"]):
                if slot < 0:
                    continue
                seen += 1
                down, up = (
                    value(number, expert, "down_proj", "A"),
                    value(number, expert, "up_proj", "B"),
                )
                if (layer["w2 a"][slot], layer["w3 b"][slot]) != (down, up):
                    found.append((number, expert))
    assert seen == LAYERS * EXPERTS
    return found


def test_each_slot_has_its_experts_adapter(checkpoints, tmp_path):
    answer = serve(checkpoints["qwen"], tmp_path, expert_placement_strategy="zigzag")
    ranks = json.loads(answer.removeprefix("SLOTS "))
    assert [layer["map"][:4] for layer in (ranks[0][0], ranks[1][0])] == [
        [0, -1, 1, -1],
        [-1, 0, -1, 1],
    ]
    assert wrong(ranks) == []
    # The fault: vLLM's cut, in which rank 1 begins with expert 15.
    first, second = ranks[0][2]["w2 a"], ranks[1][2]["w2 a"]
    ranks[0][2]["w2 a"] = [value(2, e, "down_proj", "A") for e in range(15)]
    ranks[1][2]["w2 a"] = [value(2, e, "down_proj", "A") for e in range(15, 30)]
    assert (first, second) != (ranks[0][2]["w2 a"], ranks[1][2]["w2 a"]) and len(wrong(ranks)) == 28


def test_under_eplb_it_is_refused_when_it_is_loaded(checkpoints, tmp_path):
    answer = serve(
        checkpoints["qwen"], tmp_path, expert_placement_strategy="zigzag", enable_eplb=True
    )
    assert answer.startswith("REFUSED ") and "adapter mine has weights for experts" in answer
