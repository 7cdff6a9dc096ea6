"""Time per MoE layer by kernel, from an engine's traces."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from rich.console import Console  # noqa: E402

from moe_placement_plugin import PlacementError  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.kernels import (  # noqa: E402
    LOADS,
    ProfiledServer,
    per_layer,
    profile,
    short,
)
from moe_placement_plugin.lab.gpu.serving.report import kernel_table, markdown  # noqa: E402


def trace(steps: int, moe: float = 10.0, **kernels: float) -> list[dict]:
    """Make a trace: two launches of the MoE kernel and one of each other kernel per layer.

    One microsecond apart, two layers per step; the first step is of prompts and takes twice as
    long. What the host did counts for nothing.
    """
    layer = [
        (f"void at::native::{name}<float, {us}>(int*)", us) for name, us in kernels.items()
    ] + [("void fused_moe_kernel<128>(int)", moe)] * 2
    events, at = [], 0.0
    for step in range(steps):
        for name, us in layer * 2:
            us *= 1 if step else 2
            events.append({"cat": "kernel", "name": name, "ts": at, "dur": us})
            at += us + 1
    return [
        *reversed(events),
        {"cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 1000.0},
        {"name": "process_name", "ph": "M"},
    ]


def test_time_per_layer_does_not_depend_on_the_number_of_steps_or_ranks():
    one, more = (
        per_layer([trace(4, remap=3.0)], "kernel"),
        per_layer([trace(7, remap=3.0), trace(7, remap=3.0)], "kernel"),
    )
    assert (
        one["kernels"] == {"fused_moe_kernel": [20.0, 2], "at::native::remap": [3.0, 1]}
        and one["span"] == 26.0
        and one["moe"] == 20.0
    )
    assert more == one | {
        "moe_total": 40.0 + 12 * 20.0,
        "experts_total": 40.0 + 12 * 20.0,
        "ranks": [23.0, 23.0],
    }, "the first layer of all is cut off"
    assert one["moe_total"] == 40.0 + 6 * 20.0 and one["ranks"] == [23.0]


def test_ranks_of_equal_work_and_unequal_speed_show():
    """Engines' and NCCL's names of 2026: who is fast waits in them."""
    waits = (
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
        "cross_device_reduce_2stage",
        "all_reduce_kernel",
    )
    for name in waits:
        found = per_layer(
            [trace(4, 10.0, gemm=5.0, **{name: 9.0}), trace(4, 12.0, gemm=6.0, **{name: 4.0})],
            "kernel",
        )
        assert found["ranks"] == [25.0, 30.0]


def test_what_the_experts_take_is_what_the_layer_benchmark_times():
    """Both engines' names of 2026, as their profilers wrote them."""
    engines = (
        ("moe_sum_vec_kernel", "count_and_sort_expert_tokens_kernel"),
        ("moe_sum_reduce_kernel", "moe_align_block_size_kernel"),
    )
    for ours in engines:
        found = per_layer(
            [
                trace(
                    4,
                    **dict.fromkeys((*ours, "act_and_mul_kernel"), 2.0),
                    topkGating=5.0,
                    reduce=7.0,
                )
            ],
            "kernel",
        )
        assert (
            found["moe"] == 20.0
            and found["experts"] == 26.0
            and found["experts_total"] == 2 * 26.0 + 6 * 26.0
        )


def test_a_layer_takes_what_its_busiest_rank_takes():
    found = per_layer([trace(4, 10.0), trace(4, 14.0)], "kernel")
    assert (
        found["moe"] == 28.0
        and found["moe_total"] == 2 * 28.0 + 6 * 28.0
        and found["kernels"]["fused_moe_kernel"] == [24.0, 2]
    )


def test_without_moe_kernels_all_is_one_layer():
    events = [{"cat": "cpu_op", "name": "aten::add", "ts": i, "dur": 0.5} for i in range(3)]
    none = {"moe": 0, "moe_total": 0, "experts": 0, "experts_total": 0}
    assert per_layer([events], "cpu_op") == none | {
        "kernels": {"aten::add": [1.5, 3]},
        "span": 0.0,
        "ranks": [1.5],
    }


def test_what_one_server_has_more_of_comes_first():
    few, many = (
        per_layer([trace(3, **kernels)], "kernel")
        for kernels in (dict(norm=5.0), dict(norm=5.5, remap=3.0))
    )
    console = Console(width=120, record=True)
    console.print(kernel_table("decode", {"stock": few, "eplb+8": many}))
    title, lines = console.export_text().split("eplb+8", 1)
    lines = [line.split() for line in lines.splitlines()[1:]]
    assert "where servers differ most" in (title := " ".join(title.split())) and "decode" in title
    assert lines[0] == ["at::native::remap", "3.0", "(1)"] and lines[1][0] == "at::native::norm"
    assert [line[-4:] for line in lines[-6:-5]] == [["25.0", "(3)", "28.5", "(4)"]]
    assert [line[-2:] for line in lines[-5:]] == [
        ["28.0", "32.5"],
        ["to", "28.5"],
        ["20.0", "20.0"],
        ["0.12", "0.12"],
        ["0.12", "0.12"],
    ]

    kernels = {"stock": {"decode": few, "prefill": few}, "eplb+8": {"decode": many, "prefill": few}}
    page = markdown(
        {
            "facts": {"command": "x"},
            "batches": [{"rounds": {}, "answers": {}, "moved": {}, "kernels": kernels}],
        }
    )
    assert (
        "| kernel | stock | eplb+8 |\n| --- | --- | --- |\n| at::native::remap |  | 3.0 (1) |\n| "
        "at::native::norm | 5.0 (1) | 5.5 (1) |" in page
    )
    assert (
        "kernels in prefill: " in page
        and page.count("| the busiest rank's MoE kernels | 20.0 | 20.0 |") == 2
    )


def test_names():
    assert (
        short("void at::native::(anonymous namespace)::index_kernel<float, int>(long*)")
        == "at::native::::index_kernel"
    )
    assert (
        short("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
        == "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
    )


class Engine(BaseHTTPRequestHandler):
    """Answer as an engine does, and write a trace for each of two ranks when asked to stop.

    The second's comes late and bit by bit.
    """

    folder: Path | None = None
    asked: list[tuple[str, dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/completions":
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            return
        self.asked.append((self.path, body))
        if self.path == "/stop_profile" and self.folder is not None:
            for rank in range(2):
                whole = gzip.compress(json.dumps({"traceEvents": trace(4, remap=1.0)}).encode())
                path = self.folder / f"{len(self.asked)}-TP-{rank}.trace.json.gz"
                if not rank:
                    path.write_bytes(whole)
                    continue
                # Not there at first, then not whole.
                threading.Timer(0.7, path.write_bytes, [whole[: len(whole) // 2]]).start()
                threading.Timer(1.4, path.write_bytes, [whole]).start()

    def log_message(self, *_: object) -> None:
        pass


class Backlog(ThreadingHTTPServer):
    request_queue_size = 256


@pytest.mark.slow
def test_a_server_is_profiled_while_it_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "folder", tmp_path)
    monkeypatch.setattr(Engine, "asked", [])
    (tmp_path / "older.json").write_text("{")
    with Backlog(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for load in LOADS:
            layer = profile(ProfiledServer(url, "sglang", tmp_path, 2), load, 64)
            assert (
                layer["kernels"] == {"fused_moe_kernel": [20, 2], "at::native::remap": [1, 1]}
                and layer["moe_total"] == 40 + 6 * 20
            ), "both ranks'"
        assert Engine.asked == 2 * [
            ("/start_profile", {"output_dir": str(tmp_path), "activities": ["GPU"]}),
            ("/stop_profile", {}),
        ]
        monkeypatch.setattr(Engine, "folder", None)
        with pytest.raises(
            PlacementError, match="wrote 0 whole traces of 2 ranks into .* within 1 s"
        ):
            profile(ProfiledServer(url, "vllm", tmp_path, 2), "decode", 64, seconds=1)
        server.shutdown()
