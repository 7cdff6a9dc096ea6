"""``moe-placement bench``: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure planners and layers on this machine.", add_completion=False, no_args_is_help=True
)


@app.callback()
def bench() -> None:
    """Measure planners and layers on this machine."""


@app.command()
def planner(
    traces: Annotated[
        list[Path] | None,
        typer.Option("--trace", help="Recorded load, or a folder of them; repeat."),
    ] = None,
    tokens: Annotated[
        list[Path] | None,
        typer.Option("--tokens", help="Token-level trace (.npz with topk_ids); repeat."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite", help="traces, synthetic, moves, workloads, locality or coactivation; repeat."
        ),
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option("--vllm-python", help="Interpreter that has vLLM, if this one has not."),
    ] = None,
    sglang_python: Annotated[
        str | None,
        typer.Option("--sglang-python", help="Interpreter that has SGLang, if this one has not."),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", help="Layers of each synthetic load.", min=1)
    ] = 4,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Timed calls per case; the median counts.", min=1)
    ] = 7,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Compare planners: this package's, vLLM's, SGLang's (both imported as installed) and DeepSeek's algorithm.

    Each planner runs in a process of its own, under the interpreter that has it, one case after the other in the same run.

    Example: moe-placement bench planner --trace examples/deepseek-r1 --sglang-python ~/sglang/bin/python --json planner.json
    """
    import json
    from contextlib import ExitStack

    from rich.console import Console

    from ..core.errors import PlacementError  # lazy: heavy
    from ..lab.bench.planner import run as engine  # lazy: numba
    from ..lab.bench.planner.contestants import start_contestants  # lazy: heavy
    from ..lab.bench.planner.report import print_report  # lazy: heavy

    wanted = suite or [
        s
        for s in engine.SUITES
        if (s == "synthetic" or (tokens if s == "coactivation" else traces or s == "moves"))
    ]
    for name in wanted:
        if name not in engine.SUITES:
            raise PlacementError(f"--suite {name}: choose from {', '.join(engine.SUITES)}")
        if name in ("traces", "workloads", "locality") and not traces:
            raise PlacementError(f"--suite {name} needs recorded loads: give --trace")
        if name == "coactivation" and not tokens:
            raise PlacementError("--suite coactivation needs token-level traces: give --tokens")
    loads = engine.read_traces(traces or [])
    if "workloads" in wanted and len(loads) < 5:
        raise PlacementError(
            f"--suite workloads plans on four loads and judges on others: {len(loads)} given; give five or more"
        )
    progress = Console(stderr=True)

    def report(text: str) -> None:
        progress.print(f"  {text}", highlight=False)

    with ExitStack() as stack:
        contestants, missing = start_contestants(
            [*engine.FRESH, "replan"], {"vllm": vllm_python, "sglang": sglang_python}
        )
        for contestant in contestants:
            stack.enter_context(contestant)
        by_name = {c.name: c for c in contestants}
        fresh = [c for c in contestants if c.name != "replan"]
        result: dict[str, Any] = {
            "machine": engine.machine(),
            "versions": {c.name: c.versions for c in contestants},
            "missing": missing,
        }
        runs = {
            "traces": lambda: engine.traces_suite(fresh, loads, repeats, report),
            "synthetic": lambda: engine.synthetic_suite(fresh, layers, min(repeats, 3), report),
            "moves": lambda: engine.moves_suite(by_name, loads, min(repeats, 3), report),
            "workloads": lambda: engine.workloads_suite(by_name, loads, report),
            "locality": lambda: engine.locality_suite(loads, report),
            "coactivation": lambda: engine.coactivation_suite(tokens or [], report),
        }
        for name in engine.SUITES:
            if name in wanted:
                progress.print(name)
                result[name] = runs[name]()
    print_report(result, Console(width=260))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))


@app.command()
def layer(
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            help="r1, v2-lite, qwen3-30b-a3b, qwen3-235b-a22b, gpt-oss-120b, gpt-oss-20b or tiny.",
        ),
    ],
    loads: Annotated[
        list[Path] | None,
        typer.Option("--load", help="Recorded load to draw steps from; repeat. Synthetic without."),
    ] = None,
    plan_on: Annotated[
        list[Path] | None,
        typer.Option("--plan-on", help="Recorded load to plan on instead; repeat."),
    ] = None,
    ep: Annotated[
        list[int] | None, typer.Option("--ep", help="EP ranks; repeat. Default: 2 to 64.", min=1)
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="Strategy, eplb+32 with 32 redundant experts; repeat."),
    ] = None,
    prefill: Annotated[
        list[int] | None,
        typer.Option("--prefill", help="Prefill tokens per rank; repeat; 0 for none.", min=0),
    ] = None,
    decode: Annotated[
        list[int] | None,
        typer.Option("--decode", help="Decode tokens per rank; repeat; 0 for none.", min=0),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", help="Layers of the load to measure, evenly spaced.", min=1)
    ] = 4,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Timed runs of each share; the median counts.", min=1)
    ] = 9,
    skew: Annotated[
        float, typer.Option("--skew", help="Exponent of the synthetic load's Zipf law.", min=0.0)
    ] = 0.7,
    matmuls: Annotated[
        str, typer.Option("--matmuls", help="auto, vllm, sglang or torch.")
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", help="cuda or cpu; default: a GPU if there is one.")
    ] = "",
    use_ring: Annotated[
        bool, typer.Option("--ring", help="Rows as after an all-gather: all tokens, on every rank.")
    ] = False,
    calibrations: Annotated[
        Path | None,
        typer.Option("--calibrations", help="Write a calibration file per phase into this folder."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Measure what placements do to a MoE layer: every EP rank's share on one device, the slowest being the layer's time.

    Steps are drawn from the recorded load; all strategies get the same ones. Exchange is not in the times.

    Example: moe-placement bench layer --shape r1 --load examples/deepseek-r1/in8k_out1k.safetensors --ep 32 --strategy linear
    --strategy zigzag --strategy eplb+32 --calibrations .
    """
    from ..core.errors import PlacementError  # lazy: heavy

    try:
        import torch
    except ModuleNotFoundError:
        raise PlacementError("bench layer needs torch: run it in an engine's environment") from None
    import json
    import shlex
    import sys

    import numpy as np
    from rich.console import Console

    from ..formats.atomic import write_atomically  # lazy: heavy
    from ..lab.bench.layer import run as engine  # lazy: numba
    from ..lab.bench.layer.report import as_json, print_report  # lazy: numba
    from ..lab.bench.layer.shapes import find_shape, read_recordings, synthetic_load  # lazy: heavy
    from ..lab.bench.timing import device_facts  # lazy: numba
    from ..lab.staged_layer import find_matmuls  # lazy: heavy
    from .inputs import check_writable  # lazy: heavy

    for path in (json_path, calibrations / "x" if calibrations else None):
        if path is not None:
            check_writable(path)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise PlacementError(
            f"--device {device}: torch {torch.__version__} finds no GPU here; leave --device out or give cpu"
        )
    known = find_shape(shape)
    load = read_recordings(loads, known, shape) if loads else synthetic_load(known, skew)
    planned = (
        read_recordings(plan_on, known, shape).select_layers(load.layer_ids) if plan_on else load
    )
    rows = sorted(
        {int(r) for r in np.linspace(0, load.num_layers - 1, min(layers, load.num_layers))}
    )
    progress = Console(stderr=True)

    def report(text: str) -> None:
        progress.print(f"  {text}", highlight=False)

    bench = engine.LayerBench(shape, known, where, find_matmuls(matmuls, where), repeats, use_ring)
    batches = [("prefill", n) for n in (prefill or [4096]) if n] + [
        ("decode", n) for n in (decode or [128]) if n
    ]
    facts = {
        **device_facts(where),
        "kernel": bench.matmuls.name,
        "rows": "all-gather" if use_ring else "all-to-all",
        "load": ", ".join(path.name for path in loads) if loads else load.metadata["source"],
        "planned on": ", ".join(path.name for path in plan_on) if plan_on else "the same",
    }
    # Calibrations travel: the names of files say enough, their folders mean nothing elsewhere.
    command = shlex.join(
        ["moe-placement", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    )
    outcomes = []
    files: dict[str, Any] = {}
    for ranks in ep or [2, 4, 8, 16, 32, 64]:
        plans = engine.plan_all(
            strategy or ["linear", "balanced", "zigzag", "eplb"], planned, ranks, known.groups
        )
        for phase, tokens in batches:
            outcomes += bench.measure(plans, load, rows, phase, tokens, report)
        # After every number of ranks: a run that is cut short has measured something.
        files = {phase: bench.calibration(phase, facts, command) for phase in dict(batches)}
        if calibrations is not None:
            for phase, found in files.items():
                found.write(calibrations / f"{shape}-{phase}.json")
        if json_path is not None:
            write_atomically(
                json_path,
                json.dumps({"facts": facts, "outcomes": as_json(outcomes)}, indent=1).encode(),
            )
    print_report(
        outcomes,
        {phase: engine.fitted(found) for phase, found in files.items()},
        facts,
        Console(width=160),
    )


@app.command()
def exchange(
    traces: Annotated[
        list[Path] | None,
        typer.Option(
            "--trace", help="Recorded load of DeepSeek-R1's shape, or a folder of them; repeat."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="dead or drift; repeat.")
    ] = None,
    dead: Annotated[
        int, typer.Option("--dead", help="Most ranks of the eight that die.", min=1, max=4)
    ] = 4,
    replicas: Annotated[
        list[int] | None,
        typer.Option("--replicas", help="Copies of each expert (2 and 3); repeat.", min=2, max=8),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", help="MoE layers of the made-up model.", min=1)
    ] = 4,
    hidden: Annotated[int, typer.Option("--hidden", help="Its hidden size.", min=16)] = 512,
    width: Annotated[
        int, typer.Option("--width", help="Intermediate size of its experts.", min=16)
    ] = 512,
    sent: Annotated[
        bool,
        typer.Option(
            "--sent",
            help="Send experts, as between hosts, rather than read them in the memory of their ranks.",
        ),
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Where its checkpoint is written; the temporary folder if left out."
        ),
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option("--vllm-python", help="Interpreter that has vLLM, if this one has not."),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Runs per case; the median counts.", min=1)
    ] = 3,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Move experts between eight processes: after the death of some, against a full reload; and bytes moved over drifting windows.

    Example: moe-placement bench exchange --trace examples/deepseek-r1 --json exchange.json
    """
    import json
    from dataclasses import asdict
    from importlib.util import find_spec

    from rich.console import Console

    from ..core.errors import PlacementError  # lazy: heavy
    from ..lab.bench.exchange import run as engine  # lazy: numba
    from ..lab.bench.exchange.report import print_report  # lazy: heavy
    from ..lab.bench.planner.contestants import start_contestants  # lazy: heavy
    from ..lab.bench.planner.run import machine, read_traces  # lazy: numba

    wanted = suite or ["dead", *(["drift"] if traces else [])]
    for name in wanted:
        if name not in engine.SUITES:
            raise PlacementError(f"--suite {name}: choose from {', '.join(engine.SUITES)}")
    if "drift" in wanted and not traces:
        raise PlacementError("--suite drift needs recorded loads: give --trace")
    if "dead" in wanted and find_spec("torch") is None:
        raise PlacementError(
            "--suite dead moves tensors over torch.distributed, and torch is not installed here: run it where the engine is"
        )
    loads = read_traces(traces or [])
    progress = Console(stderr=True)

    def report(text: str) -> None:
        progress.print(f"  {text}", highlight=False)

    result: dict[str, Any] = {"machine": machine(), "versions": {}, "missing": {}}
    if "dead" in wanted:
        import torch

        from ..lab.bench.exchange.ranks import Sizes  # lazy: heavy

        sizes = Sizes(layers, 64, hidden, width)
        result["versions"]["exchange"] = {"torch": torch.__version__, "backend": "gloo"}
        result["sizes"] = asdict(sizes) | {"expert_bytes": sizes.expert_bytes}
        result["dead"] = engine.dead_suite(
            sizes, dead, replicas or (2, 3), report, repeats, folder, not sent
        )
    if "drift" in wanted:
        contestants, missing = start_contestants(["vLLM default"], {"vllm": vllm_python})
        result["missing"] = missing
        result["versions"] |= {c.name: c.versions for c in contestants}
        try:
            result["drift"] = engine.drift_suite(
                loads, contestants[0] if contestants else None, report
            )
        finally:
            for contestant in contestants:
                contestant.close()
    print_report(result, Console(width=250))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))


@app.command()
def verify(
    gigabytes: Annotated[
        float, typer.Option("--gb", help="Size of the expert weights in 10^9 bytes.", min=0.001)
    ] = 2.0,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda.")] = "cpu",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Time the fingerprints of expert weights against one read of the same bytes (CPU) or a copy (GPU).

    Example: moe-placement bench verify --gb 2
    """
    import json

    from ..formats.atomic import write_atomically  # lazy: heavy
    from ..lab.bench.fingerprint.run import describe, measure  # lazy: numba

    result = measure(gigabytes, device)
    print(describe(result))
    if json_path:
        write_atomically(json_path, json.dumps(result, indent=1).encode())
