"""Test that every kernel is compiled before anything is measured."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer

import pytest

pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from moe_placement_plugin.lab.gpu.serving.warm import steps, unlike, warm  # noqa: E402
from moe_placement_plugin.lab.servers.server import free_port  # noqa: E402

from .stand_ins import Slow  # noqa: E402


def test_every_size_of_a_step_is_asked_for_before_anything_is_measured():
    """Steps lie below and at each power of two and halfway between.

    Several prompts at once make steps up to the largest.
    """
    asked = steps(4096, 16384, {0, 1})
    sizes = [sum(step) for step in asked]
    assert {
        1,
        2,
        31,
        32,
        63,
        64,
        95,
        96,
        127,
        128,
        511,
        512,
        4095,
        4096,
        8191,
        8192,
        12287,
        12288,
        16383,
        16384,
    } <= set(sizes)
    assert max(map(max, asked)) == 4096 and max(sizes) == 16384 and min(map(min, asked)) == 1
    assert (
        max(map(sum, steps(24, 96, {0}))) == 96
        and max(map(max, steps(24, 96, {0}))) == 24
        and max(map(sum, steps(1500, 1500, {0}))) == 1024
    )
    assert steps(4, 4, {0, 1, 4}) == [[2], [1], [3], [2], [4], [3]]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = {
            "up": f"http://127.0.0.1:{server.server_port}",
            "down": f"http://127.0.0.1:{free_port()}",
        }
        Slow.asked.clear()
        failed = warm(urls, 100, 4, 8, {0, 1})
    finally:
        server.shutdown()
    assert list(failed) == ["down"] and "ClientConnectorError" in failed["down"], (
        "one that is gone holds up nobody"
    )
    assert sorted(len(body["prompt"]) for body in Slow.asked) == sorted(
        n for step in steps(4, 8, {0, 1}) for n in step
    )
    assert {body["max_tokens"] for body in Slow.asked} == {1} and all(
        4 <= t < 100 for body in Slow.asked for t in body["prompt"]
    )


@pytest.mark.parametrize("top_k, experts", [(8, 128), (8, 136), (6, 64), (6, 72), (4, 32), (1, 60)])
def test_steps_of_every_way_that_a_kernel_is_compiled_in(top_k, experts):
    """Triton asks about the MoE kernel's numbers of choices and of padded rows.

    It asks for any number of tokens and any block.
    """

    def way(tokens: int, block: int) -> tuple[bool, bool]:
        return tokens * top_k % 16 == 0, (tokens * top_k + experts * (block - 1)) % 16 == 0

    for block in (16, 64, 128):
        of_all, of_asked = (
            {way(4096 + n, block) for n in range(64)},
            {way(4096 - less, block) for less in unlike(top_k, experts)},
        )
        assert of_asked == of_all and len(unlike(top_k, experts)) == len(of_all)
