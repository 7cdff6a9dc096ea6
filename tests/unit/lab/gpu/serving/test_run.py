"""Test a whole run without engines, from the checkpoint to the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="checkpoints are made with torch")
pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from moe_placement_plugin import ExpertLoad, PlacementError  # noqa: E402
from moe_placement_plugin.formats.load_file import write_load  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.__main__ import main  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.models import MODELS  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.report import markdown  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.run import Run  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.server_logs import PORT_TAKEN  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.traffic import Seen  # noqa: E402
from moe_placement_plugin.lab.servers.engines import Completion  # noqa: E402

from .stand_ins import Stub, skewed  # noqa: E402

SERVING = "moe_placement_plugin.lab.gpu.serving"


class Bench:
    """Run the benchmark's command with servers that stream in the place of engines.

    Attributes:
        fails_at: number of the measured round that fails, 0 for none.
        fails: server -> errors that its starts end with.
        words: the command line.
        servers: made so far.
        driven: servers that were measured, in order.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.fails_at = 0
        self.fails: dict[str, list[str]] = {}
        self.servers: list[Stub] = []
        self.driven: list[str] = []
        self.woken: list[str] = []
        write_load(skewed(4, 40), folder / "load.safetensors")
        self.words = f"serving --engine vllm --cpu --model tiny --workload tiny --repeats 2 \
--skip-recording --at-once 3 --load {folder / 'load.safetensors'} --folder {folder / 'run'} \
--json {folder / 'out.json'}".split()
        for name in ("linear", "eplb+8", "eplb", "our EPLB"):
            self.words += ["--contestant", name]

    def server(self, one, record=None) -> Stub:
        log = self.folder / f"{one.name}.log"
        self.servers.append(Stub(one.name, log, self.fails.get(one.name, ())))
        return self.servers[-1]

    def drive(self, url, workload, vocab, seed) -> Seen:
        if seed >= 999:
            self.woken.append(url)
            return Seen()
        self.driven.append(url)
        assert self.woken[-1] == url, "a server that waited is woken before its time is taken"
        if len(self.driven) == self.fails_at:
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

    @property
    def result(self) -> dict:
        """Return what the run has written."""
        return json.loads((self.folder / "out.json").read_text())


def complete(url, model, prompt, number, alternatives) -> Completion:
    return Completion(list(range(number)), [-1.0] * number)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    made = Bench(tmp_path)
    clock = SimpleNamespace(read=dict, per_token=lambda before: 5.0)
    engines = {"vllm": SimpleNamespace(complete=complete)}
    monkeypatch.setattr(Run, "server", lambda self, one, record=None: made.server(one, record))
    monkeypatch.setattr(f"{SERVING}.measuring.drive", made.drive)
    monkeypatch.setattr(f"{SERVING}.run._engine_version", lambda name: "0")
    monkeypatch.setattr(f"{SERVING}.measuring.EngineClock", lambda engine, url, log: clock)
    monkeypatch.setattr(f"{SERVING}.measuring.SERVING_ENGINES", engines)
    monkeypatch.setattr("sys.argv", made.words)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return made


def test_a_run_goes_from_the_checkpoint_to_the_table(bench, capsys):
    """All but the engines: their place is taken by a server that streams."""
    assert main() == 0
    result, driven = bench.result, bench.driven
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
    assert all(one.stopped for one in bench.servers) and "2.000" in capsys.readouterr().out


def test_a_round_that_fails_loses_no_other_servers_figures(bench, capsys):
    bench.fails_at = 6
    assert main() == 1, "something failed, and the rest was measured"
    result = bench.result
    rounds = result["batches"][0]["rounds"]["tiny"]
    assert {name: len(rows) for name, rows in rounds.items()} == {
        "linear": 2,
        "eplb+8": 2,
        "eplb": 0,
    }
    assert result["failed"] == ["eplb failed in tiny: eplb answered 500"]
    assert len(result["batches"]) == 2
    page = markdown(result)
    assert page.count("| linear | 50 (50 to 50) | 1.000 (1.000 to 1.000) |") == 2
    assert "| eplb+8 | 50 (50 to 50) |" in page
    assert "| eplb |" not in page, "a server without all rounds has no row"
    assert page.count("| 10.00 / 10.00 | 5.00 (5.00 to 5.00) |") == page.count(
        "| 50 (50 to 50) |"
    ), "what the engine's own clock says"
    said = capsys.readouterr().out
    disturbed = (
        "client itself was held up for at most 50 ms, and other machines took at most 2.0% of the "
        "processors' time in a round"
    )
    assert "eplb failed in tiny" in said and disturbed in " ".join(said.split())
    assert bench.driven[6:8] == ["eplb+8", "linear"]


def test_a_run_ends_when_the_server_fails_that_the_others_are_compared_with(bench):
    bench.fails_at = 4
    with pytest.raises(RuntimeError, match="linear answered 500"):
        main()
    rounds = bench.result["batches"][0]["rounds"]["tiny"]
    assert {name: len(rows) for name, rows in rounds.items()} == {
        "linear": 0,
        "eplb+8": 0,
        "eplb": 0,
    }


def test_a_port_that_another_server_took_is_free_once_that_is_up(bench, capsys):
    """A server that cannot start for another reason is left out at once."""
    assert PORT_TAKEN.search(
        "ValueError: scheduler_input_port at 35763 is not available in 30 seconds. "
        "scheduler_input_port is used by a process already"
    )
    taken = (
        "store, rank, world_size = next(rendezvous_iterator)\n"
        "RuntimeError: Engine core initialization failed"
    )
    refused = (
        "ERROR moe_placement_plugin.core.errors.PlacementError: layer 1 has an empty slot\n"
        "RuntimeError: Failed core proc(s): {}"
    )
    bench.fails = {"linear": [taken], "eplb": [taken, taken], "eplb+8": [refused, ""]}
    assert main() == 1
    assert [list(batch["rounds"]["tiny"]) for batch in bench.result["batches"]] == [
        ["linear"],
        ["linear", "our EPLB"],
    ]
    said = capsys.readouterr().out
    assert said.count("linear starts again") == 2
    assert "eplb did not start" in said and "eplb+8 did not start" in said
    assert (
        "eplb+8 did not start: the server ended with code 1 before it was ready: "
        "layer 1 has an empty slot" in " ".join(said.split())
    )
    assert "eplb starts again" in said and "eplb+8 starts again" not in said


def test_a_server_that_ends_while_answers_are_asked_for_is_left_out(bench, monkeypatch, capsys):
    """As SGLang 0.5.16's own EPLB ends its server, with a model that it cannot move."""

    def some_complete(url, *asked):
        if url == "eplb+8":
            raise PlacementError(
                "eplb+8 gave no answer: Remote end closed connection without response"
            )
        return complete(url, *asked)

    monkeypatch.setattr(
        f"{SERVING}.measuring.SERVING_ENGINES", {"vllm": SimpleNamespace(complete=some_complete)}
    )
    assert main() == 1
    assert [list(batch["rounds"]["tiny"]) for batch in bench.result["batches"]] == [
        ["linear", "eplb"],
        ["linear", "our EPLB"],
    ]
    assert "eplb+8: eplb+8 gave no answer: Remote end closed connection" in capsys.readouterr().out


def test_what_is_routed_while_it_is_measured_tells_how_balanced_placements_were(bench, monkeypatch):
    """Here all load is on the first rank's experts."""
    bench.words[bench.words.index("our EPLB")] = "linear+recording"
    model = MODELS["tiny"]
    counts = np.zeros((len(model.moe_layers), model.experts), np.int64)
    counts[:, : model.experts // 2] = 1000
    seen = ExpertLoad(counts, tuple(model.moe_layers))

    def drive(*asked):
        write_load(seen, bench.folder / "run" / "linear+recording.safetensors")
        return bench.drive(*asked)

    monkeypatch.setattr(f"{SERVING}.measuring.drive", drive)
    assert main() == 0
    first, second = bench.result["batches"]
    assert "seen" not in first and second["seen"]["balancedness"]["linear"] == 0.5


def test_answers_alone_are_compared_without_a_workload(bench, capsys):
    bench.words[bench.words.index("our EPLB")] = "linear+recording"
    bench.words.append("--answers-only")
    assert main() == 0 and not bench.driven
    result = bench.result
    assert [list(batch["answers"]) for batch in result["batches"]] == [
        ["linear", "eplb+8", "eplb"],
        ["linear", "linear+recording"],
    ]
    assert "Answers of eplb+8: equal, logprobs 0.0e+00, half of them 0.0e+00." in markdown(result)
    assert "answers of eplb+8: equal" in capsys.readouterr().out
