"""Offer ``moe-placement bench layer``: what placements do to a MoE layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonPath, progress_lines

HELP = (
    "Measure what placements do to a MoE layer: every EP rank's share on one device, the slowest "
    "being the layer's time.\n\n"
    "Steps are drawn from the recorded load; all strategies get the same ones. Exchange is not in "
    "the times.\n\n"
    "Example: moe-placement bench layer --shape r1 "
    "--load examples/deepseek-r1/in8k_out1k.safetensors --ep 32 --strategy linear\n"
    "--strategy zigzag --strategy eplb+32 --calibrations ."
)


def bench_layer(
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
    json_path: JsonPath = None,
) -> None:
    """Run ``bench layer``: measure, print, write."""
    from ...core.errors import PlacementError  # lazy: heavy

    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise PlacementError("bench layer needs torch: run it in an engine's environment") from None
    from rich.console import Console

    from ...lab.bench.layer.comparison import LayerOptions, compare_strategies  # lazy: numba
    from ...lab.bench.layer.report import print_report  # lazy: numba
    from ...lab.bench.layer.run import fitted  # lazy: numba
    from ..inputs import check_writable  # lazy: heavy

    for path in (json_path, calibrations / "x" if calibrations else None):
        if path is not None:
            check_writable(path)
    options = LayerOptions(
        shape=shape,
        loads=loads or [],
        plan_on=plan_on or [],
        ranks=ep or [2, 4, 8, 16, 32, 64],
        strategies=strategy or ["linear", "balanced", "zigzag", "eplb"],
        prefill=prefill or [4096],
        decode=decode or [128],
        layers=layers,
        repeats=repeats,
        skew=skew,
        matmuls=matmuls,
        device=device,
        use_ring=use_ring,
        calibrations=calibrations,
        json_path=json_path,
    )
    _, report = progress_lines()
    found = compare_strategies(options, _command(), report)
    fits = {phase: fitted(calibration) for phase, calibration in found.calibrations.items()}
    print_report(found.times, fits, found.facts, Console(width=160))


def _command() -> str:
    """Return the command line as calibrations keep it.

    They travel: the names of files say enough, their folders mean nothing elsewhere.
    """
    import shlex
    import sys

    words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
    return shlex.join(["moe-placement", *words])
