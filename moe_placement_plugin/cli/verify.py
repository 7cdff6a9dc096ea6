"""Offer ``moe-placement verify``: does a placed engine still say what the stock engine says?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab.accuracy.run import Verdict

HELP = (
    "Run the same lm-eval tasks under the stock engine and under each strategy, and compare scores "
    "and answers.\n\n"
    "One server after the other, with greedy decoding and fixed seeds. Exit code 1 when a score, "
    "or the number of differing\n"
    "answers, is beyond what was allowed.\n\n"
    "Example: moe-placement verify accuracy --model examples/tiny_moe/qwen3-moe --tasks tiny_moe "
    "--include-path examples/tiny_moe/tasks"
)

app = typer.Typer(
    help="Check that a placed engine answers as the stock engine does.",
    add_completion=False,
    no_args_is_help=True,
)


@app.callback()
def verify() -> None:
    """Check that a placed engine answers as the stock engine does."""


@app.command(help=HELP)
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
            help="One more word for the engine's command line, such as "
            "--server-arg=--enforce-eager; repeat.",
        ),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Let lm-eval fetch data sets from the hub.")
    ] = False,
    max_score_difference: Annotated[
        float | None,
        typer.Option(
            "--max-score-difference",
            help="Allowed for each score (default: 0 in float32, else twice stock's standard "
            "error).",
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
    """Examine stock and every strategy, print the comparison and write it."""
    import json
    import tempfile

    from ..lab.accuracy import options as asked  # lazy: heavy
    from ..lab.accuracy.run import run  # lazy: heavy
    from ..lab.accuracy.table import to_json  # lazy: heavy
    from ..report.tables import console  # lazy: heavy
    from .inputs import check_writable  # lazy: heavy
    from .progress import Progress  # lazy: heavy

    options = asked.AccuracyOptions(
        model=model,
        tasks=tasks,
        include_path=include_path,
        engine=engine,
        strategies=strategies,
        redundant=redundant,
        file=file,
        ranks=tp,
        stock_ranks=stock_tp,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        server_arguments=tuple(server_arg or ()),
        online=online,
        score=max_score_difference,
        answers=max_differing_answers,
        logprob=logprob_tolerance,
        timeout=timeout,
    )
    name = asked.find_engine(options)
    asked.check_model(model)
    if json_path is not None:
        check_writable(json_path)
    check = asked.make_check(options, name)
    out = console()
    with (
        tempfile.TemporaryDirectory(prefix="moe-placement-verify-") as temporary,
        Progress(out) as progress,
    ):
        verdict = run(check, keep or Path(temporary), progress)
    _print(verdict, out)
    if json_path is not None:
        json_path.write_text(json.dumps(to_json(verdict), indent=1))
    if not verdict.passed:
        raise typer.Exit(1)


def _print(verdict: Verdict, out: Console) -> None:
    """Print the table, how long each server took, and examples of answers that differ."""
    from ..lab.accuracy.table import table  # lazy: heavy

    out.print(table(verdict))
    for strategy, run in verdict.runs.items():
        out.print(
            f"{strategy}: server {run.start_seconds:.0f} s, "
            f"questions {run.examine_seconds:.0f} s. {run.placement}",
            markup=False,
        )
    for strategy, found in verdict.comparisons.items():
        for task, compared in found.items():
            for question, ours, theirs in compared.examples:
                out.print(
                    f"{strategy}, {task}, question {question}: stock {ours!r}, placed {theirs!r}",
                    markup=False,
                )
