"""The parts of the serving benchmark that need no engine: checkpoints, command lines, traffic, what a user sees of it."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are made with torch")
pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from moe_placement_plugin import ExpertLoad, PlacementError  # noqa: E402
from moe_placement_plugin.formats.load_file import read_load, write_load  # noqa: E402
from moe_placement_plugin.lab.gpu import one_gpu  # noqa: E402
from moe_placement_plugin.lab.gpu.serving import together  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.__main__ import main  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.answers import ANSWERED, ASKED, difference  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.checkpoints import (  # noqa: E402
    GATES,
    MADE,
    MODELS,
    fit_bias,
    wanted_shares,
    write,
    write_even_twin,
)
from moe_placement_plugin.lab.gpu.serving.contestants import (  # noqa: E402
    CACHE_TOKENS,
    CONTESTANTS,
    Setup,
    batches,
    command,
)
from moe_placement_plugin.lab.gpu.serving.kernels import LOADS, per_layer  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.ports import APART, BEHIND, CONNECTIONS, ports  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.quiet import Quiet  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.report import answers_in_words, markdown  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.run import Run  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.server_logs import PORT_TAKEN, in_words, moved  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.traffic import WORKLOADS, Seen, Workload, drive  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.warm import steps, unlike, warm  # noqa: E402
from moe_placement_plugin.lab.servers.engines import Answer  # noqa: E402
from moe_placement_plugin.lab.servers.server import Server, free_port  # noqa: E402
from moe_placement_plugin.lab.staged_layer import select_experts  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402


def skewed(layers: int, experts: int) -> ExpertLoad:
    return ExpertLoad(
        (1000 * np.random.default_rng(0).lognormal(0, 0.6, (layers, experts))).astype(np.int64)
    )


@pytest.mark.parametrize("name", ["tiny", "tiny-grouped"])
def test_the_router_follows_the_load_and_its_twin_is_even(name, tmp_path):
    model = MODELS[name]
    made = write(tmp_path / "model", model, skewed(4, 40), torch.float32, "cpu")
    write_even_twin(tmp_path / "even", tmp_path / "model", model, "cpu")
    wanted, reached = np.array(made["shares"]), np.array(made["reached"])
    assert (
        wanted.shape == (len(model.moe_layers), model.experts)
        and np.abs(wanted - reached).sum(axis=1).max() < 0.03
    )
    assert wanted.max() * model.experts > 2, "the load is not skewed"
    tensors = {}
    for folder in ("model", "even"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())[
            "weight_map"
        ]
        tensors[folder] = {}
        for key, file in index.items():
            with safe_open(tmp_path / folder / file, "pt") as handle:
                tensors[folder][key] = handle.get_tensor(key)
    same = {
        key for key in tensors["model"] if torch.equal(tensors["model"][key], tensors["even"][key])
    }
    assert tensors["model"].keys() - same == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in model.moe_layers
    }
    assert {file.name for file in (tmp_path / "even").iterdir() if not file.is_symlink()} == {GATES}
    even = shares_in_a_forward_pass(tmp_path / "even", model)
    assert even.max() * model.experts < 1.5 and even.min() * model.experts > 0.6, even
    tokens = Workload(3, 40, 1, 1).prompts(model.size.vocab, 0)
    words = [" ".join(f"w{token}" for token in prompt) for prompt in tokens]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(words).input_ids == tokens
    # Nothing writes to the dimension that carries the bias, and nothing but the routers reads it.
    assert all(
        not t[0].any()
        for k, t in tensors["model"].items()
        if k.endswith(("o_proj.weight", "down_proj.weight"))
    )
    readers = (
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "gate_proj.weight",
        "up_proj.weight",
        "lm_head.weight",
    )
    assert all(not t[:, 0].any() for k, t in tensors["model"].items() if k.endswith(readers))
    served = shares_in_a_forward_pass(tmp_path / "model", model)
    apart = np.abs(served - wanted).sum(axis=1) / 2
    assert apart.max() < 0.1, f"served shares are {apart} apart from the wanted ones"


def test_the_same_checkpoint_is_kept_and_any_other_made_anew(tmp_path):
    model, load = MODELS["tiny"], skewed(4, 40)
    made = write(tmp_path, model, load, torch.float32, "cpu")

    def written():
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}

    first = written()
    assert write(tmp_path, model, load, torch.float32, "cpu") == made and written() == first
    for other in (
        {"load": None},
        {"dtype": torch.bfloat16},
        {"seed": 1},
        {"model": MODELS["tiny-grouped"]},
    ):
        before = written()
        write(
            **(
                {
                    "path": tmp_path,
                    "model": model,
                    "load": load,
                    "dtype": torch.float32,
                    "device": "cpu",
                }
                | other
            )
        )
        assert all(time != before.get(name) for name, time in written().items()), other
    (tmp_path / MADE).unlink()  # as of one that was not finished
    before = written()
    write(tmp_path, model, load, torch.float32, "cpu")
    assert all(time != before.get(name) for name, time in written().items())


def shares_in_a_forward_pass(path, model) -> np.ndarray:
    """What the routers choose when prompts run through all layers, ``[MoE layers, experts]``."""
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: dict[int, list] = {}
    for layer in model.moe_layers:
        gate = net.model.layers[layer].mlp.gate

        def look(module, inputs, layer=layer, gate=gate):
            logits = inputs[0].reshape(-1, model.size.hidden) @ gate.weight.T
            seen[layer] = torch.bincount(
                select_experts(logits, model.routing())[0].flatten(), minlength=model.experts
            ).numpy()

        gate.register_forward_pre_hook(look)
    words = np.random.default_rng(0).integers(4, model.size.vocab, (64, 64))
    with torch.no_grad():
        net(torch.from_numpy(words))
    counts = np.array([seen[layer] for layer in model.moe_layers])
    return counts / counts.sum(axis=1, keepdims=True)


def test_shares_stay_within_what_a_token_can_choose():
    model = MODELS["tiny"]
    one_hot = ExpertLoad(np.eye(1, model.experts, dtype=np.int64).repeat(3, axis=0) * 10**6)
    shares = wanted_shares(one_hot, model)
    assert shares.max() <= 0.9 / model.top_k * 1.01 and shares.sum(axis=1) == pytest.approx(1)
    noise = torch.randn(4096, model.experts)
    bias, reached = fit_bias(noise, torch.from_numpy(shares[0]).float(), model.routing())
    chosen, _ = select_experts(noise + bias, model.routing())
    assert (
        torch.bincount(chosen.flatten(), minlength=model.experts).tolist()
        == (reached * chosen.numel()).round().long().tolist()
    )
    with pytest.raises(PlacementError, match="record a model at least as large"):
        wanted_shares(skewed(2, 8), model)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", ["tp", "dp"])
def test_command_lines(engine, layout, tmp_path):
    setup = Setup(engine, 4, layout, False, "bfloat16", True, 0.1, 200, 4112, 1 << 30)
    for one in CONTESTANTS.values():
        if one.load:
            with pytest.raises(PlacementError, match="plans from a recorded load"):
                command(one, setup, tmp_path, None, 1)
        line, env = command(one, setup, tmp_path, tmp_path / "load", 1)
        off = env.get("VLLM_PLUGINS" if engine == "vllm" else "SGLANG_PLUGINS")
        assert (
            (off is None) == (one.strategy is not None) == ("--expert-placement-strategy" in line)
        )
        ranks = {
            ("vllm", "tp"): "--tensor-parallel-size",
            ("vllm", "dp"): "--data-parallel-size",
            ("sglang", "tp"): "--tp-size",
            ("sglang", "dp"): "--dp-size",
        }
        assert line[line.index(ranks[engine, layout]) + 1] == "4"
        assert ("--enable-eplb" in line) == (
            bool(one.moving) or engine == "vllm" and bool(one.redundant)
        )


def test_one_gpu_in_place_of_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    for kind, ranks in (("shared", 4), ("lone", 1)):
        setup = Setup(
            "sglang", 4, "tp", False, "bfloat16", kind == "lone", 0.1, 200, 4112, 1 << 30, kind
        )
        assert (setup.gpus, setup.started) == (1, ranks)
        line, env = command(CONTESTANTS["zigzag"], setup, tmp_path, None, 1)
        first, *others = env["PYTHONPATH"].split(os.pathsep)
        assert (
            (Path(first) / "sitecustomize.py").exists()
            and Path(first).name == kind
            and others == ["/elsewhere"]
        )
        assert "--disable-custom-all-reduce" in line and ("--expert-placement-verify" in line) == (
            kind == "lone"
        )
        assert (
            "--expert-placement-verify"
            not in command(CONTESTANTS["stock"], setup, tmp_path, None, 1)[0]
        ), "stock knows no such flag"
    for layout, site in (("dp", [str(one_gpu.HERE / "shared")]), ("tp", [])):
        setup = Setup("vllm", 2, layout, True, "float32", False, 0.1, 20, 1024, 1 << 30)
        assert command(CONTESTANTS["zigzag"], setup, tmp_path, None, 1)[1].get(
            "PYTHONPATH", ""
        ).split(os.pathsep)[:1] == (site or [""])
    for engine in ("vllm", "sglang"):
        for restless in (True, False):
            setup = Setup(
                engine, 2, "dp", False, "float16", False, 0.1, 20, 1024, 1 << 30, "shared", restless
            )
            line = command(CONTESTANTS["our EPLB"], setup, tmp_path, tmp_path, 1)[0]
            policy = json.loads(line[line.index("--expert-rebalance") + 1])
            assert (
                (policy["min_gain"] == 0 and policy["small_batches"] is False)
                if restless
                else policy["min_gain"] > 0
            ), "answers alone are asked"
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for words, message in (
        (["--engine", "vllm", "--one-gpu", "lone"], "only SGLang with tensor-parallel attention"),
        (
            ["--engine", "sglang", "--one-gpu", "lone", "--layout", "dp"],
            "only SGLang with tensor-parallel attention",
        ),
        (
            ["--engine", "vllm", "--one-gpu", "shared", "--answers-only"],
            "give --eager --answers-only",
        ),
        (
            ["--engine", "sglang", "--cpu", "--layout", "dp"],
            "SGLang's CPU engine has no data-parallel attention",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["serving", *words, "--folder", str(tmp_path / "run")])
        assert main() == 2 and message in capsys.readouterr().err


def test_batches_share_what_the_others_are_compared_with():
    made = [[one.name for one in batch] for batch in batches(list(CONTESTANTS.values()), 6)]
    assert all(names[:2] == ["stock", "ideal"] and len(names) <= 6 for names in made)
    assert [name for names in made for name in names[2:]] == [
        n for n in CONTESTANTS if n not in ("stock", "ideal")
    ]
    alone = [CONTESTANTS["zigzag"], CONTESTANTS["eplb"]]
    assert batches(alone, 2) == [alone] and batches(alone[:1], 2) == [alone[:1]]
    with pytest.raises(
        PlacementError,
        match="--at-once 2: stock, ideal are always up and at least one more: give 3",
    ):
        batches(list(CONTESTANTS.values()), 2)


def test_batches_fit_into_the_gpus():
    """As on an H100: five servers, or four where two of them have EPLB's buffers."""
    gib = 1 << 30
    named = [
        "stock",
        "ideal",
        "linear",
        "zigzag",
        "eplb",
        "our EPLB",
        "engine EPLB",
        "our EPLB async",
        "balanced",
    ]
    takes = lambda one: (18 if one.moving else 14.5) * gib  # noqa: E731
    made = batches([CONTESTANTS[name] for name in named], 8, takes, 78 * gib)
    assert [[one.name for one in batch[2:]] for batch in made] == [
        ["linear", "zigzag", "eplb"],
        ["our EPLB", "engine EPLB"],
        ["our EPLB async", "balanced"],
    ]
    with pytest.raises(
        PlacementError,
        match="with our EPLB they take 50.5 GB of each GPU, of which 48.3 GB are free: use more --ranks",
    ):
        batches([CONTESTANTS[name] for name in named], 8, takes, 45 * gib)


def test_a_models_cache_is_what_its_heads_on_a_rank_need():
    model = MODELS["qwen3-30b-a3b"]
    assert [model.cache_bytes(81920, ranks, 2) >> 20 for ranks in (2, 4, 8)] == [1280, 640, 640]
    assert (
        model.cut(None) is model
        and list(model.cut(2).moe_layers) == [0, 1]
        and list(MODELS["v2-lite"].cut(2).moe_layers) == [1]
    )
    with pytest.raises(PlacementError, match="--layers 1: no MoE layer is left; give at least 2"):
        MODELS["v2-lite"].cut(1)


GIVEN = dict(engine="vllm", cpu=True, dtype=None, model="tiny", layers=None, workload=["tiny"], contestant=["linear", "eplb"], ranks=2,
             layout="tp", eager=False, memory=0.1, interval=1000, at_once=None, calibration=None, json=None, skip_recording=False,
             quiet=None, answers_only=False, one_gpu=None, kernels=False)  # fmt: skip


def test_a_server_takes_the_longest_prompt_that_it_is_asked(tmp_path):
    """Profiles have prompts of their own, which servers that were started for short workloads refused."""
    length = lambda **given: Run(SimpleNamespace(**GIVEN | given), tmp_path).setup.length  # noqa: E731
    assert (
        length(workload=["decode"], cpu=False) == 1024
        and length(workload=["prefill"], cpu=False) > WORKLOADS["prefill"].longest
    )
    assert length(workload=["decode"], cpu=False, kernels=True) > max(
        load.longest for load in LOADS.values()
    )
    assert length(kernels=True) == 1024, "without a GPU the tiny workload is profiled"


def test_what_is_recorded_first_is_recorded_with_tensor_parallel_attention(tmp_path):
    """SGLang refuses to record with data-parallel attention, where ranks route each other's tokens."""
    run = Run(
        SimpleNamespace(
            **GIVEN | {"engine": "sglang", "layout": "dp", "cpu": False, "contestant": None}
        ),
        tmp_path,
    )
    assert {one.name for one in run.contestants} >= {"linear", "eplb+8", "our EPLB"} and not any(
        one.recording for one in run.contestants
    )
    assert "--enable-dp-attention" in run.server(CONTESTANTS["linear"]).command
    first = run.server(CONTESTANTS["linear"], run.recording).command
    assert "--enable-dp-attention" not in first and "--expert-load-record" in first
    with pytest.raises(
        PlacementError, match="sglang with --layout dp has none of linear.recording"
    ):
        Run(
            SimpleNamespace(
                **GIVEN
                | {
                    "engine": "sglang",
                    "layout": "dp",
                    "cpu": False,
                    "contestant": ["linear+recording"],
                }
            ),
            tmp_path,
        )


def test_experts_move_while_answers_are_compared(tmp_path):
    """An answer is a pass a token: in a thousand of them there is none left to compare."""
    for answers_only, given, interval in (
        (True, None, 20),
        (False, None, 1000),
        (True, 7, 7),
        (False, 7, 7),
    ):
        run = Run(
            SimpleNamespace(**GIVEN | {"answers_only": answers_only, "interval": given}), tmp_path
        )
        assert (run.setup.interval, run.setup.restless) == (interval, answers_only)
        assert ANSWERED * ASKED > 5 * run.setup.interval or not answers_only


def test_a_log_that_looks_like_markup_is_printed_as_it_is(capsys, tmp_path):
    """gloo begins its errors with the file that they are from, and a run ended when it was to tell of a server that did not start."""
    said = "stock did not start: [/pytorch/gloo/pair.cc:547] Connection closed, [red]"
    Run(SimpleNamespace(**GIVEN), tmp_path).fail(said)
    assert said in capsys.readouterr().out


def test_a_profile_that_fails_loses_no_other(tmp_path, monkeypatch):
    def profile(url: str, load: str, *_: object) -> dict:
        if (url, load) == ("http://127.0.0.1:1", "prefill"):
            raise RuntimeError("the input is too long")
        return per_layer([[{"cat": "kernel", "name": "norm", "ts": 0.0, "dur": 1.0}]], "kernel")

    monkeypatch.setattr("moe_placement_plugin.lab.gpu.serving.kernels.profile", profile)
    run = Run(SimpleNamespace(**GIVEN), tmp_path)
    found = run.profile(
        {
            "stock": SimpleNamespace(url="http://127.0.0.1:1"),
            "linear": SimpleNamespace(url="http://127.0.0.1:2"),
        }
    )
    assert {name: list(of) for name, of in found.items()} == {
        "stock": ["decode"],
        "linear": ["decode", "prefill"],
    }
    assert run.failed == ["stock was not profiled, prefill: the input is too long"]


def test_a_recording_is_used_again_only_for_the_same_model(tmp_path, monkeypatch):
    write_load(skewed(3, 32), tmp_path / "other.safetensors")
    run = Run(SimpleNamespace(**GIVEN, recorded=tmp_path / "other.safetensors"), tmp_path / "run")
    run.result["router"] = {"wanted": wanted_shares(None, MODELS["tiny"]).tolist()}
    monkeypatch.setattr(Run, "server", lambda *_: pytest.fail("a server was started to record"))
    assert (
        set(run.record()["balancedness"]) == {"linear", "eplb"}
        and read_load(run.recording).num_layers == 3
    )
    write_load(skewed(2, 32), tmp_path / "other.safetensors")
    with pytest.raises(
        PlacementError, match="other.safetensors: 2 layers x 32 experts, the model has 3 x 32"
    ):
        run.record()


def test_sglangs_own_rebalances_are_counted_on_one_rank():
    """Whole or in chunks of layers; what our planner and exchange log is read from servers, in the engines' tests."""
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


class Slow(BaseHTTPRequestHandler):
    """Streams as an engine does: the first token after 50 ms, the others 10 ms apart, one of them after 200 ms."""

    asked: list[dict] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Slow.asked.append(asked)
        self.send_response(500 if 4 in asked["prompt"] else 200)
        self.end_headers()
        for number in range(asked["max_tokens"]):
            time.sleep(0.05 if number == 0 else 0.2 if number == 3 else 0.01)
            self.wfile.write(
                b"data: " + json.dumps({"choices": [{"text": "x"}]}).encode() + b"\n\n"
            )
            self.wfile.flush()
        self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None:
        pass


class Stub(Server):
    """A server that is there already, and logs nothing but the errors that its starts end with."""

    def __init__(self, name: str, log: Path, errors: Sequence[str] = ()):
        super().__init__([], 0, {}, log)
        self.name, self.errors, self.stopped = name, list(errors), False

    @property
    def url(self) -> str:
        return self.name

    def __enter__(self):
        error = self.errors.pop(0) if self.errors else ""
        self.log.write_text(error)
        if error:
            raise PlacementError(f"the server ended with code 1 before it was ready{self._why()}")
        return self

    def stop(self) -> None:
        self.stopped = True


def test_servers_that_start_end_with_the_run(tmp_path):
    """They would else be waited for until their time limit."""
    ended = threading.Event()

    class Starting(Stub):
        def __enter__(self):
            assert ended.wait(30), "it is stopped while it starts"
            raise PlacementError("the server ended with code -2 before it was ready:")

        def stop(self):
            ended.set()

    class Interrupted(Stub):
        def __enter__(self):
            raise KeyboardInterrupt

    servers = {
        "linear": Interrupted("linear", tmp_path / "linear"),
        "eplb": Starting("eplb", tmp_path / "eplb"),
    }
    with pytest.raises(KeyboardInterrupt):
        together.start(servers, 2, print, print)
    assert ended.is_set() and servers["linear"].stopped


def test_servers_ports_are_no_connections_and_leave_room_for_what_an_engine_derives(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.ports.random.randrange", lambda rows: rows // 2
    )
    given = ports()
    first = next(given)
    with socket.socket() as taken:
        taken.bind(
            ("127.0.0.1", first + APART + BEHIND + 4)
        )  # what SGLang would take its requests on
        taken.listen()
        others = [next(given) for _ in range(12)]
    found = sorted([first, *others])
    assert (
        max(found) + BEHIND + APART <= int(CONNECTIONS.read_text().split()[0])
        and first + APART not in found
    )
    assert (
        all((b - a) % APART == 0 and b > a for a, b in pairwise(found))
        and 0 < BEHIND % APART < APART - 6
    ), "derived ports lie between"
    # A machine that tells no such range, then one that gives connections all ports there are.
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.ports.CONNECTIONS", tmp_path / "range"
    )
    assert next(ports()) > 0
    (tmp_path / "range").write_text("1024\t65535\n")
    assert next(ports()) > 0


def test_a_run_goes_from_the_checkpoint_to_the_table_and_keeps_what_was_measured(
    tmp_path, monkeypatch, capsys
):
    """All but the engines: their place is taken by a server that streams. A round that fails loses no other server's figures."""
    servers, woken, driven = [], [], []

    def server(self, one, record=None):
        servers.append(Stub(one.name, tmp_path / f"{one.name}.log", fails.get(one.name, ())))
        return servers[-1]

    def drive(url, workload, vocab, seed):
        if seed >= 999:
            woken.append(url)
            return Seen()
        driven.append(url)
        assert woken[-1] == url, "a server that waited is woken before its time is taken"
        if len(driven) == fails_at:
            raise RuntimeError(f"{url} answered 500")
        return Seen(
            seconds=2.0,
            tokens=100 * (1 + (url == "eplb")),
            first=[0.1],
            between=[0.01],
            longest=0.2,
            lag=0.05,
            stolen=0.02,
        )

    monkeypatch.setattr(Run, "server", server)
    monkeypatch.setattr("moe_placement_plugin.lab.gpu.serving.run.drive", drive)
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.run._engine_version", lambda name: "0"
    )
    clock = SimpleNamespace(read=dict, per_token=lambda before: 5.0)
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.run.EngineClock", lambda engine, url, log: clock
    )

    def complete(url, model, prompt, number, alternatives):
        return Answer(list(range(number)), [-1.0] * number)

    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.run.DEMO_ENGINES",
        {"vllm": SimpleNamespace(complete=complete)},
    )
    load = tmp_path / "load.safetensors"
    write_load(skewed(4, 40), load)
    named = [
        word for name in ("linear", "eplb+8", "eplb", "our EPLB") for word in ("--contestant", name)
    ]
    words = [
        "serving",
        "--engine",
        "vllm",
        "--cpu",
        "--model",
        "tiny",
        "--workload",
        "tiny",
        "--repeats",
        "2",
        "--skip-recording",
    ]
    words += [
        *named,
        "--at-once",
        "3",
        "--load",
        str(load),
        "--folder",
        str(tmp_path / "run"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    fails_at, fails = 0, {}
    assert main() == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [list(batch["rounds"]["tiny"]) for batch in result["batches"]] == [
        ["linear", "eplb+8", "eplb"],
        ["linear", "our EPLB"],
    ]
    figures = result["batches"][0]["rounds"]["tiny"]
    rates = {name: [row["tokens_per_s"] for row in rows] for name, rows in figures.items()}
    assert rates == {"linear": [50, 50], "eplb+8": [50, 50], "eplb": [100, 100]}
    assert set(result["recorded"]["balancedness"]) == {"linear", "eplb+8", "eplb"}
    assert driven[:9] == [
        *("eplb", "eplb+8", "linear"),
        *("linear", "eplb+8", "eplb"),
        *("eplb", "eplb+8", "linear"),
    ], "the order alternates"
    assert all(one.stopped for one in servers) and "2.000" in capsys.readouterr().out

    driven.clear()
    fails_at = 6
    assert main() == 1, "something failed, and the rest was measured"
    result = json.loads((tmp_path / "out.json").read_text())
    rounds = result["batches"][0]["rounds"]["tiny"]
    assert {name: len(rows) for name, rows in rounds.items()} == {
        "linear": 2,
        "eplb+8": 2,
        "eplb": 0,
    }
    assert (
        result["failed"] == ["eplb failed in tiny: eplb answered 500"]
        and len(result["batches"]) == 2
    )
    page = markdown(result)
    assert (
        page.count("| linear | 50 (50 to 50) | 1.000 (1.000 to 1.000) |") == 2
        and "| eplb+8 | 50 (50 to 50) |" in page
    )
    assert "| eplb |" not in page, "a server without all rounds has no row"
    assert page.count("| 10.00 / 10.00 | 5.00 (5.00 to 5.00) |") == page.count(
        "| 50 (50 to 50) |"
    ), "what the engine's own clock says"
    said = capsys.readouterr().out
    disturbed = "client itself was held up for at most 50 ms, and other machines took at most 2.0% of the processors' time in a round"
    assert (
        "eplb failed in tiny" in said
        and disturbed in " ".join(said.split())
        and driven[6:8] == ["eplb+8", "linear"]
    )

    driven.clear()
    fails_at = 4
    with pytest.raises(RuntimeError, match="linear answered 500"):
        main()
    rounds = json.loads((tmp_path / "out.json").read_text())["batches"][0]["rounds"]["tiny"]
    assert {name: len(rows) for name, rows in rounds.items()} == {
        "linear": 0,
        "eplb+8": 0,
        "eplb": 0,
    }

    driven.clear()
    # A port that another server took is free once that is up; a server that cannot start for another reason is left out at once.
    assert PORT_TAKEN.search(
        "ValueError: scheduler_input_port at 35763 is not available in 30 seconds. scheduler_input_port is used by a process already"
    )
    taken = "store, rank, world_size = next(rendezvous_iterator)\nRuntimeError: Engine core initialization failed"
    refused = "ERROR moe_placement_plugin.core.errors.PlacementError: layer 1 has an empty slot\nRuntimeError: Failed core proc(s): {}"
    fails_at, fails = 0, {"linear": [taken], "eplb": [taken, taken], "eplb+8": [refused, ""]}
    capsys.readouterr()
    assert main() == 1
    batches = json.loads((tmp_path / "out.json").read_text())["batches"]
    assert [list(batch["rounds"]["tiny"]) for batch in batches] == [
        ["linear"],
        ["linear", "our EPLB"],
    ]
    said = capsys.readouterr().out
    assert (
        said.count("linear starts again") == 2
        and "eplb did not start" in said
        and "eplb+8 did not start" in said
    )
    assert (
        "eplb+8 did not start: the server ended with code 1 before it was ready: layer 1 has an empty slot"
        in " ".join(said.split())
    )
    assert "eplb starts again" in said and "eplb+8 starts again" not in said

    # SGLang 0.5.16's own EPLB ends its server while the answers are asked for, with a model that it cannot move.
    def some_complete(url, *asked):
        if url == "eplb+8":
            raise PlacementError(
                "eplb+8 gave no answer: Remote end closed connection without response"
            )
        return complete(url, *asked)

    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.run.DEMO_ENGINES",
        {"vllm": SimpleNamespace(complete=some_complete)},
    )
    fails = {}
    assert main() == 1
    batches = json.loads((tmp_path / "out.json").read_text())["batches"]
    assert [list(batch["rounds"]["tiny"]) for batch in batches] == [
        ["linear", "eplb"],
        ["linear", "our EPLB"],
    ]
    assert "eplb+8: eplb+8 gave no answer: Remote end closed connection" in capsys.readouterr().out
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.run.DEMO_ENGINES",
        {"vllm": SimpleNamespace(complete=complete)},
    )

    # What a server records while it is measured tells how balanced the placements really were: here all load is on the first rank's experts.
    fails, words[words.index("our EPLB")] = {}, "linear+recording"
    layers, experts = len(MODELS["tiny"].moe_layers), MODELS["tiny"].experts
    counts = np.zeros((layers, experts), np.int64)
    counts[:, : experts // 2] = 1000
    seen = ExpertLoad(counts, tuple(MODELS["tiny"].moe_layers))
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.run.drive",
        lambda *asked: (
            write_load(seen, tmp_path / "run" / "linear+recording.safetensors") or drive(*asked)
        ),
    )
    assert main() == 0
    first, second = json.loads((tmp_path / "out.json").read_text())["batches"]
    assert "seen" not in first and second["seen"]["balancedness"]["linear"] == 0.5

    driven.clear()
    words.append("--answers-only")
    assert main() == 0 and not driven
    result = json.loads((tmp_path / "out.json").read_text())
    assert [list(batch["answers"]) for batch in result["batches"]] == [
        ["linear", "eplb+8", "eplb"],
        ["linear", "linear+recording"],
    ]
    assert (
        "Answers of eplb+8: equal, logprobs 0.0e+00, half of them 0.0e+00." in markdown(result)
        and "answers of eplb+8: equal" in capsys.readouterr().out
    )


def test_runs_that_share_a_host_measure_one_at_a_time_and_start_together(tmp_path):
    """A run that has measured lets the one that waits go first, and starts its next servers when that has measured too."""
    order, file = [], tmp_path / "quiet"
    both_started = threading.Barrier(2, timeout=20)

    def run(name):
        quiet = Quiet(file)
        for _ in range(2):
            both_started.wait()  # never passed if a start waited for the other's start
            order.append("start")
            both_started.wait()
            with quiet.measuring():
                order.append(f"begin {name}")
                time.sleep(0.2)
                order.append(f"end {name}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, "ab"))
    for at in (2, 8):
        begun = [word.split()[1] for word in order[at : at + 4 : 2]]
        assert sorted(begun) == ["a", "b"], order
        assert order[at : at + 4] == [
            f"{what} {name}" for name in begun for what in ("begin", "end")
        ], order


def test_answers_that_part_are_told_with_how_near_the_tie_was():
    reference = Answer(
        [1, 2, 3], [-0.1, -0.5, -0.2], [{1: -0.1, 7: -3.0}, {2: -0.5, 9: -0.52}, {3: -0.2, 8: -4.0}]
    )
    same = Answer([1, 2, 3], [-0.1, -0.4, -0.2])
    near = Answer(
        [1, 9, 5], [-0.1, -0.51, -5.0]
    )  # what comes after the first other token continues another text
    wrong = Answer([4, 2, 3], [-0.3, -0.5, -0.2])
    assert difference([same], [reference]) == {
        "different": 0,
        "logprobs": pytest.approx(0.1),
        "median": 0.0,
        "behind": 0.0,
        "first": [],
    }
    found = difference([same, near], [reference, reference])
    assert (found["different"], found["first"][0]["answer"], found["first"][0]["place"]) == (
        1,
        1,
        1,
    )
    assert found["behind"] == pytest.approx(0.02) and found["logprobs"] == pytest.approx(0.1)
    assert (
        answers_in_words(found, 2)
        == "1 of 2 differ where 0.02 behind, logprobs 1.0e-01, half of them 0.0e+00"
    )
    assert difference([wrong], [Answer(wrong.token_ids, [-0.2, -0.4, -0.4])])[
        "median"
    ] == pytest.approx(0.1)
    found = difference([wrong, near], [reference, reference])
    assert found["different"] == 2 and found["behind"] == pytest.approx(2.9), (
        "at least as far behind as the last that is known"
    )
    with pytest.raises(ValueError):
        difference([same], [reference, reference])


def test_prompts():
    """Others in every round, of all tokens but the special ones, or of a few that are others in every round too.

    2,000 draws of 296 tokens miss 296 (1 - 1 / 296) ** 2000 = 0.34 of them on average.
    """
    every, few = Workload(50, 40, 1, 1), Workload(50, 40, 1, 1, 8)
    rounds = [[np.array(one.prompts(300, seed)) for seed in (0, 1, 1)] for one in (every, few)]
    for first, second, again in rounds:
        assert (
            first.shape == (50, 40)
            and min(first.min(), second.min()) >= 4
            and max(first.max(), second.max()) < 300
        )
        assert (second == again).all() and (first != second).any()
    tokens = [set(prompts.flatten().tolist()) for prompts in rounds[1][:2]]
    assert (
        [len(t) for t in tokens] == [8, 8]
        and len(tokens[0] & tokens[1]) < 8
        and len(np.unique(rounds[0][0])) > 290
    )


def test_answers_of_different_lengths_end_at_different_times():
    spread = Workload(9, 4, 20, 3, spread=0.5)
    lengths, others = spread.answers(0), spread.answers(1)
    assert sorted(lengths) == sorted(others) and lengths != others and len(set(lengths)) == 9, (
        "as many tokens in every round"
    )
    assert (min(lengths), max(lengths), sum(lengths)) == (10, 30, 180) and spread.longest == 34
    assert Workload(9, 4, 20, 3).answers(0) == [20] * 9
    cached = max(one.concurrency * one.longest for one in WORKLOADS.values())
    assert cached <= CACHE_TOKENS, "all that is under way at once fits into a server's cache"


def test_every_size_of_a_step_is_asked_for_before_anything_is_measured():
    """Below and at each power of two and halfway between, and several prompts at once up to the largest step."""
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
    """What Triton asks of the MoE kernel's numbers of choices and of padded rows, for any number of tokens and any block."""

    def way(tokens: int, block: int) -> tuple[bool, bool]:
        return tokens * top_k % 16 == 0, (tokens * top_k + experts * (block - 1)) % 16 == 0

    for block in (16, 64, 128):
        of_all, of_asked = (
            {way(4096 + n, block) for n in range(64)},
            {way(4096 - less, block) for less in unlike(top_k, experts)},
        )
        assert of_asked == of_all and len(unlike(top_k, experts)) == len(of_all)


@pytest.mark.slow
def test_traffic_measures_what_a_user_sees(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        seen = drive(url, Workload(4, 3, 6, 2), 10**6, 0)
        figures = seen.figures()
        assert seen.tokens == 4 * 9 and len(seen.first) == len(seen.between) == 4
        assert (
            figures["ttft_p50"] >= 50
            and figures["longest_gap"] >= 200
            and figures["tpot_p50"] >= (200 + 4 * 10) / 5
        )
        # Two at a time: two batches, one after the other.
        assert seen.seconds >= 2 * (0.05 + 0.2 + 4 * 0.01) and figures[
            "tokens_per_s"
        ] == pytest.approx(36 / seen.seconds)
        assert gc.isenabled() and 0 <= seen.stolen < 1
        drive(url, Workload(3, 3, 6, 3, spread=0.5), 10**6, 0)
        assert sorted(body["max_tokens"] for body in Slow.asked[-3:]) == [3, 6, 9]
        # What holds up the client holds up what it measures: that is told apart.
        # A busy machine does so too, but not in each of many runs.
        deadline = time.monotonic() + 60
        while seen.lag >= 0.1 and time.monotonic() < deadline:
            seen = drive(url, Workload(4, 3, 6, 2), 10**6, 0)
        assert seen.lag < 0.1
        sleepy = iter([0.3])
        slow = SimpleNamespace(
            dumps=json.dumps, loads=lambda text: time.sleep(next(sleepy, 0)) or json.loads(text)
        )
        monkeypatch.setattr("moe_placement_plugin.lab.gpu.serving.traffic.json", slow)
        late = drive(url, Workload(4, 3, 6, 2), 10**6, 0)
        assert 0.25 < late.lag and late.figures()["client_lag"] == late.lag * 1e3
        with pytest.raises(RuntimeError, match="answered 500"):
            drive(url, Workload(1, 2, 2, 1), 5, 0)  # the only token is 4
        assert gc.isenabled()
    finally:
        server.shutdown()


@pytest.mark.slow
def test_the_script_for_gpu_hosts_goes_through_its_steps(tmp_path):
    def run(*steps: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [ROOT / "benchmarks/gpus.sh", tmp_path / "out", *steps],
            capture_output=True,
            text=True,
            env=env,
            timeout=300,
        )

    refused = run("fingerprints", "servings")
    assert (
        refused.returncode == 2
        and "unknown step servings; usage" in refused.stderr
        and not (tmp_path / "out" / "fingerprints.json").exists()
    )
    done = run("fingerprints")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "=== fingerprints, vllm, 2 ranks" in done.stdout
        and (tmp_path / "out" / "fingerprints-vllm.txt").stat().st_size
    )
    assert json.loads((tmp_path / "out" / "fingerprints.json").read_text())
