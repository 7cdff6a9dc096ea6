"""``moe-placement verify``: does a placed engine still say what the stock engine says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Check that a placed engine answers as the stock engine does.",
    add_completion=False,
    no_args_is_help=True,
)


@app.callback()
def verify() -> None:
    """Check that a placed engine answers as the stock engine does."""


@app.command()
def accuracy(
    model: Annotated[Path, typer.Option("--model", help="Folder of the checkpoint.")],
    tasks: Annotated[
        str, typer.Option("--tasks", help="lm-eval tasks, groups or tags, separated by commas.")
    ],
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with task files of your own.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="vllm or sglang; default: the one that is installed."),
    ] = None,
    strategies: Annotated[
        str,
        typer.Option(
            "--strategies", help="Strategies, separated by commas; name+N has N redundant experts."
        ),
    ] = "zigzag,balanced",
    redundant: Annotated[
        int,
        typer.Option(
            "--num-redundant-experts",
            help="Redundant experts per layer of strategies without +N.",
            min=0,
        ),
    ] = 0,
    file: Annotated[
        Path | None,
        typer.Option(
            "--expert-placement-file",
            "--expert-load",
            help="Plan or recorded load, for strategies that plan from one.",
        ),
    ] = None,
    tp: Annotated[
        int, typer.Option("--tp", help="Tensor-parallel and EP ranks of the placed servers.", min=1)
    ] = 2,
    stock_tp: Annotated[
        int, typer.Option("--stock-tp", help="Tensor-parallel ranks of the stock server.", min=1)
    ] = 1,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Questions of each task (default: all).", min=1)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", help="Worked examples per question (default: the task's).", min=0
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Questions of one request.", min=1)
    ] = 8,
    device: Annotated[
        str, typer.Option("--device", help="cpu, gpu, or auto: a GPU if torch finds one.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the servers (default: float32 on the CPU, else auto)."),
    ] = None,
    max_model_len: Annotated[
        int, typer.Option("--max-model-len", help="Tokens of a prompt with its answer.", min=16)
    ] = 2048,
    server_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--server-arg",
            help="One more word for the engine's command line, such as --server-arg=--enforce-eager; repeat.",
        ),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Let lm-eval fetch data sets from the hub.")
    ] = False,
    max_score_difference: Annotated[
        float | None,
        typer.Option(
            "--max-score-difference",
            help="Allowed for each score (default: 0 in float32, else twice stock's standard error).",
            min=0,
        ),
    ] = None,
    max_differing_answers: Annotated[
        int | None,
        typer.Option(
            "--max-differing-answers",
            help="Allowed for each task (default: 0 in float32, else any).",
            min=0,
        ),
    ] = None,
    logprob_tolerance: Annotated[
        float | None,
        typer.Option(
            "--logprob-tolerance",
            help="Of a choice's log probability (default: 0.001 in float32, else 0.5).",
            min=0,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", help="Seconds for a server to start, and for lm-eval to finish.", min=1
        ),
    ] = 1800.0,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Keep logs and lm-eval's results in this folder.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the comparison to this file.")
    ] = None,
) -> None:
    """Run the same lm-eval tasks under the stock engine and under each strategy, and compare scores and answers.

    One server after the other, with greedy decoding and fixed seeds. Exit code 1 when a score, or the number of differing
    answers, is beyond what was allowed.

    Example: moe-placement verify accuracy --model examples/tiny_moe/qwen3-moe --tasks tiny_moe --include-path examples/tiny_moe/tasks
    """
    import dataclasses
    import json
    import tempfile

    from ..core.errors import PlacementError  # lazy: heavy
    from ..engines.common.installed import require_engine  # lazy: heavy
    from ..lab.accuracy.compare import Allowance  # lazy: heavy
    from ..lab.accuracy.examiner import Examination  # lazy: heavy
    from ..lab.accuracy.run import configurations, run  # lazy: heavy
    from ..lab.accuracy.table import table, to_json  # lazy: heavy
    from ..lab.servers.engines import DEMO_ENGINES, ServerSettings  # lazy: heavy
    from ..report.tables import console  # lazy: heavy
    from .inputs import check_writable  # lazy: heavy
    from .progress import Progress  # lazy: heavy

    if engine is not None and engine not in DEMO_ENGINES:
        raise PlacementError(f"--engine {engine}: choose one of {', '.join(DEMO_ENGINES)}")
    name = require_engine(engine)
    if not (model / "config.json").is_file():
        raise PlacementError(f"--model {model} has no config.json: give the folder of a checkpoint")
    if json_path is not None:
        check_writable(json_path)
    if file is not None and not file.exists():
        raise PlacementError(f"{file} does not exist: give a plan or a recorded load")
    on_cpu = _on_cpu(device)
    dtype = dtype or ("float32" if on_cpu else "auto")
    wanted = configurations(
        [s.strip() for s in strategies.split(",") if s.strip()], tp, redundant, file
    )
    if len(wanted) == 1:
        raise PlacementError("--strategies is empty: name at least one, such as zigzag")
    names = tuple(t.strip() for t in tasks.split(",") if t.strip())
    if not names:
        raise PlacementError("--tasks is empty: name at least one task of lm-eval")
    examination = Examination(
        names, None if include_path is None else str(include_path), limit, num_fewshot, batch_size
    )
    settings = ServerSettings(on_cpu, dtype, max_model_len, stock_tp, tuple(server_arg or ()))
    asked: dict[str, Any] = {
        "score": max_score_difference,
        "answers": max_differing_answers,
        "logprob": logprob_tolerance,
    }
    allowance = dataclasses.replace(
        Allowance.for_dtype(dtype),
        **{key: value for key, value in asked.items() if value is not None},
    )
    out = console()
    with (
        tempfile.TemporaryDirectory(prefix="moe-placement-verify-") as temporary,
        Progress(out) as progress,
    ):
        folder = keep or Path(temporary)
        verdict = run(
            DEMO_ENGINES[name],
            model,
            wanted,
            examination,
            settings,
            allowance,
            not online,
            folder,
            timeout,
            progress,
        )
    out.print(table(verdict))
    for strategy, run_of_it in verdict.runs.items():
        out.print(
            f"{strategy}: server {run_of_it.start_seconds:.0f} s, questions {run_of_it.examine_seconds:.0f} s. {run_of_it.placement}",
            markup=False,
        )
    for strategy, found in verdict.comparisons.items():
        for task, compared in found.items():
            for question, ours, theirs in compared.examples:
                out.print(
                    f"{strategy}, {task}, question {question}: stock {ours!r}, placed {theirs!r}",
                    markup=False,
                )
    if json_path is not None:
        json_path.write_text(json.dumps(to_json(verdict), indent=1))
    if not verdict.passed:
        raise typer.Exit(1)


def _on_cpu(device: str) -> bool:
    from ..core.errors import PlacementError  # lazy: heavy

    if device not in ("auto", "cpu", "gpu"):
        raise PlacementError(f"--device {device}: choose cpu, gpu or auto")
    if device != "auto":
        return device == "cpu"
    import torch  # both engines bring it

    return not torch.cuda.is_available()
