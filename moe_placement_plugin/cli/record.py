"""Offer ``moe-placement record``: prompts to a server that records, and its recording."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..recording.send_prompts import Sent

HELP = (
    "Send a prompt file to a server that was started with --expert-load-record, and wait until its "
    "recording holds them;\n"
    "or read what a server has recorded from its own users.\n\n"
    "Works with any server of the OpenAI API, so with vLLM and SGLang. Run it where the recording "
    "can be read.\n\n"
    "Example: moe-placement record load.safetensors --url http://localhost:8000 "
    "--prompts prompts.txt"
)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Prompts:
    """Hold what is sent to a server, and how.

    Attributes:
        file: prompts, a line each.
        url: of the server.
        model: its name, None for the first that the server lists.
        max_tokens: tokens to generate per prompt.
        concurrency: requests under way at a time.
        timeout: seconds to wait for an answer.
    """

    file: Path
    url: str
    model: str | None
    max_tokens: int
    concurrency: int
    timeout: float


@app.command(help=HELP)
def record(
    path: Annotated[
        Path, typer.Argument(help="The recording: what --expert-load-record of the server names.")
    ],
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Address of the server, such as http://localhost:8000. Without it the recording "
            "is only read.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='Prompt file: a prompt per line, or JSON lines with "prompt" or "messages".',
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Tokens to generate per prompt.", min=1)
    ] = 128,
    concurrency: Annotated[
        int, typer.Option("--concurrency", help="Requests under way at a time.", min=1)
    ] = 16,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model name (default: the first that the server lists)."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds to wait for an answer.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send prompts if there are any, and print what the recording holds."""
    from ..core.errors import PlacementError  # lazy: heavy
    from ..formats.load_file import read_load  # lazy: heavy
    from .inputs import print_json  # lazy: heavy

    sent = None
    if (url is None) != (prompts is None):
        given, missing = ("--url", "--prompts") if prompts is None else ("--prompts", "--url")
        raise PlacementError(
            f"{given} without {missing}: prompts are sent to a server; "
            f"give both, or neither to read {path}"
        )
    if url is not None and prompts is not None:
        sent = _send(Prompts(prompts, url, model, max_tokens, concurrency, timeout), path)
    load = read_load(path)
    if as_json:
        from ..report.data import recording_facts  # lazy: heavy

        print_json(recording_facts(str(path), load, sent))
        return
    from ..report.tables import console, load_table  # lazy: heavy
    from ..simulation.cluster import Workload  # lazy: heavy

    out = console()
    if sent is not None:
        out.print(
            f"{sent.requests} requests, {sent.prompt_tokens} prompt tokens, "
            f"{sent.generated_tokens} generated in {sent.seconds:.1f} s"
        )
    out.print(load_table(Workload(path.stem, load.moe_layers())))


def _send(prompts: Prompts, recording: Path) -> Sent:
    """Send prompts and wait until the recording holds them."""
    from ..recording.send_prompts import read_prompts, send, wait_for_recording  # lazy: heavy

    bodies = read_prompts(prompts.file)
    before = recording.stat().st_mtime if recording.exists() else 0.0
    sent = send(
        prompts.url,
        bodies,
        prompts.model,
        prompts.max_tokens,
        prompts.concurrency,
        prompts.timeout,
    )
    wait_for_recording(recording, before, sent.ended)
    return sent
