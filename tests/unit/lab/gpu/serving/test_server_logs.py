"""Test what is read from a server's log of experts that moved."""

from __future__ import annotations

from moe_placement_plugin.lab.gpu.serving.server_logs import in_words, moved


def test_sglangs_own_rebalances_are_counted_on_one_rank():
    """They come whole or in chunks of layers.

    What our planner and exchange log is read from servers, in the engines' tests.
    """
    whole = "".join(
        f"[2026-11-24 22:19:58 TP{rank} EP{rank}] [EPLBManager] rebalance end time={t}s\n"
        for t in (0.12, 0.3)
        for rank in (0, 1)
    )
    found = moved(whole, "sglang")
    assert (found["engine_rebalances"], found["engine_ms"]) == (2, 300) and in_words(
        found
    ) == "2 rebalances told by the engine, longest 300 ms"
    assert moved(whole, "sglang", ready=len(whole) // 2)["engine_rebalances"] == 1, (
        "what a server does before it answers is no pause"
    )
    chunks = "[2026-11-24 22:19:58 DP0 TP0 EP0] [EPLBManager] rebalance end\n"
    assert (
        in_words(moved(chunks, "sglang")) == "1 rebalances told by the engine"
        and in_words(moved("", "vllm")) == ""
    )
