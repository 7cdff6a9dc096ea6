"""Test ranks that die under SGLang's EPLB: real processes, model, loader and updater.

What is not SGLang's says `dead_ranks_child`.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.integration.sglang.dead_ranks_child import RANKS, STEPS
from tests.integration.sglang.engines import ENV, ROOT, threads
from tests.support.children import engine_lock, python, run_child

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EXPERTS, SLOTS = 32, 16
EXPERT_BYTES = 3 * 64 * 64 * 4
"""Bytes of an expert of the tiny checkpoint: gate, up and down in float32."""


@pytest.fixture(scope="module")
def steps(models, tmp_path_factory) -> dict[str, dict[int, dict]]:
    """Name of the step -> rank -> what it held then."""
    results = tmp_path_factory.mktemp("dead") / "results.json"
    command = python(
        "-m", "tests.integration.sglang.dead_ranks_child", str(models["qwen32"]), str(results)
    )
    with engine_lock():
        finished = run_child(
            command, 300, ENV | {"SGLANG_CPU_OMP_THREADS_BIND": threads(RANKS)}, ROOT
        )
    found = json.loads(results.read_text()) if results.exists() else []
    for step in found:
        for rank, seen in step["ranks"].items():
            assert "error" not in seen, f"{step['name']}, rank {rank}:\n{seen['error']}"
    assert [step["name"] for step in found] == ["begin", *(name for name, _ in STEPS)], (
        finished.output[-3000:]
    )
    for step in found:
        step["log"] = finished.output
    return {
        step["name"]: {int(rank): seen for rank, seen in step["ranks"].items()} for step in found
    }


def live_after(name: str) -> list[int]:
    dead: set[int] = set()
    for step, gone in STEPS:
        dead |= set(gone)
        if step == name:
            break
    return [rank for rank in range(RANKS) if rank not in dead]


@pytest.mark.parametrize("name", [name for name, _ in STEPS])
def test_every_slot_of_a_live_rank_holds_its_expert(steps, name):
    live = live_after(name)
    assert sorted(steps[name]) == live
    first = steps[name][live[0]]
    for seen in steps[name].values():
        assert seen["wrong"] == [] and seen.get("after reload", []) == []
        assert seen["held"] == first["held"] and seen["slots_of"] == first["slots_of"], (
            "the ranks disagree"
        )
    for layer, of_layer in enumerate(first["slots_of"]):
        for expert, slots in enumerate(of_layer):
            slots = [slot for slot in slots if slot >= 0]
            assert slots and {slot // SLOTS for slot in slots} <= set(live), (layer, expert, slots)
            assert {first["held"][layer][slot] for slot in slots} == {expert}


def test_only_what_no_live_rank_held_is_read(steps):
    lost_in_all = 0
    names = ["begin", *(name for name, _ in STEPS)]
    for before, name in zip(names, names[1:]):
        live = live_after(name)
        held = np.array(next(iter(steps[before].values()))["held"])
        now = np.array(next(iter(steps[name].values()))["held"])
        slots = np.isin(np.arange(held.shape[1]) // SLOTS, live)
        lost = [
            (layer, expert)
            for layer in range(len(held))
            for expert in range(EXPERTS)
            if expert not in held[layer][slots]
        ]
        fetched = sum(int((now[layer][slots] == expert).sum()) for layer, expert in lost)
        read = sum(seen.get("read", 0) for seen in steps[name].values())
        assert read == fetched * EXPERT_BYTES, (name, lost)
        lost_in_all += len(lost)
        if lost:
            assert {seen["decision"] for seen in steps[name].values()} == {"lost_experts"}
            kept = held[:, slots] == now[:, slots]
            assert int((~kept).sum()) == len(lost), "more moved than what was lost"
    assert lost_in_all >= 3, "nothing was lost: the test proves nothing"


def test_the_load_is_evened_out_again_afterwards(steps):
    (last, _) = STEPS[-1]
    for seen in steps[last].values():
        assert seen["accepted"] and seen["received"] > 0
        assert seen["staging"] <= 8 * EXPERT_BYTES * 2
