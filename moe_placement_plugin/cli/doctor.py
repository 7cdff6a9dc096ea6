"""Offer ``moe-placement doctor``: will it work with the engine that is installed here?"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

ENGINES = ("vllm", "sglang")

HELP = (
    "Show each engine found, its version, every patch with its target and whether the engine "
    "still fits it, and the\n"
    "back ends that a placement would be refused for.\n\n"
    "Exits with 1 when an engine is there but a patch does not fit it or its version is not "
    "supported. Nothing is patched.\n\n"
    "Example: moe-placement doctor --engine vllm"
)


@app.command(help=HELP)
def doctor(
    engine: Annotated[
        str | None, typer.Option("--engine", help="Look at this engine only: vllm or sglang.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the engines found, and whether each patch fits them."""
    from ..core.errors import PlacementError  # lazy: heavy
    from .inputs import print_json  # lazy: heavy

    if engine is not None and engine not in ENGINES:
        raise PlacementError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    found = [_examine(name) for name in ENGINES if engine in (None, name)]
    if as_json:
        print_json({"engines": found})
    else:
        _print(found)
    if any(e["installed"] and not e["fits"] for e in found):
        raise typer.Exit(1)


def _examine(name: str) -> dict[str, Any]:
    """Gather facts on one engine in this process, without applying a patch."""
    if importlib.util.find_spec(name) is None:
        return {"engine": name, "installed": False, "fits": False}
    result: dict[str, Any] = {
        "engine": name,
        "installed": True,
        "version": None,
        "problem": None,
        "patches": [],
        "refused": [],
    }
    # Engines log to stdout while they are imported, which would break --json.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result["version"] = importlib.import_module(name).__version__
            {"vllm": _vllm, "sglang": _sglang}[name](result)
        except Exception as error:  # noqa: BLE001 - a broken engine is what doctor is asked about
            result["problem"] = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
    result["fits"] = result["problem"] is None and all(
        p["contract"] == "ok" for p in result["patches"]
    )
    return result


def _vllm(result: dict[str, Any]) -> None:
    from ..engines.vllm import kernels, support  # lazy: heavy
    from ..engines.vllm.flags import FLAGS  # lazy: heavy
    from ..engines.vllm.patches import (  # lazy: heavy
        eplb_set,
        host_set,
        load_set,
        lora_set,
        patch_set,
        recording_set,
    )

    result["supported"] = f"{support.SUPPORTED[0]} to {support.SUPPORTED[1]} (exclusive)"
    support.check_version()
    for concern, patches in (
        ("flags", FLAGS),
        ("placement", patch_set()),
        ("verification", load_set()),
        ("rebalancing", eplb_set()),
        ("adapters", lora_set()),
        ("recording", recording_set()),
        ("several hosts", host_set()),
    ):
        result["patches"] += [{"concern": concern, **row} for row in patches.report()]
    result["refused"] = [
        {"what": f"--moe-backend {name}", "why": "computes with contiguous, even blocks of experts"}
        for name in kernels.MOE_BACKENDS_REFUSED
    ]
    even = ", ".join((*kernels.ALL2ALL_WITH_MAP, *kernels.ALL2ALL_WITH_TABLES))
    result["refused"].append(
        {
            "what": f"--all2all-backend other than {even}",
            "why": "sends tokens to contiguous, even blocks of experts",
        }
    )


def _sglang(result: dict[str, Any]) -> None:
    import sglang

    from ..engines.sglang import compat, flags, support  # lazy: heavy

    result["supported"] = f"{compat.OLDEST} to {compat.NEWEST}"
    compat.check_version(sglang.__version__)
    from ..engines.sglang import patches  # lazy: numba

    groups = (
        ("flags", flags.LAUNCHER),
        ("placement", flags.ON_REQUEST),
        ("placement", patches.placement_set()),
        ("eplb", patches.eplb_set()),
        ("verification", patches.verification_set()),
        ("recording", patches.recording_set()),
        ("recording", patches.draft_recording_set()),
        ("several hosts", patches.host_set()),
        ("new weights", patches.reload_set()),
    )
    for concern, hooks in groups:
        result["patches"] += [{"concern": concern, **row} for row in hooks.report()]
    result["refused"] = [
        {"what": f"{rule.kind}: {rule.what}", "why": rule.why} for rule in support.RULES
    ]


def _print(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..report.tables import console  # lazy: heavy

    out = console()
    for engine in found:
        if not engine["installed"]:
            out.print(f"{engine['engine']}: not installed here")
            continue
        out.print(
            f"{engine['engine']} {engine['version']} (supported: {engine.get('supported', '?')})",
            style="bold",
        )
        if engine["problem"]:
            out.print(f"  {engine['problem']}", style="red")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("patch", "for", "target", "contract"):
            table.add_column(column, overflow="fold")
        for row in engine["patches"]:
            table.add_row(
                row["name"],
                row["concern"],
                row["target"],
                row["contract"],
                style="" if row["contract"] == "ok" else "red",
            )
        if engine["patches"]:
            out.print(table)
            out.print()
            out.print("Why each patch is needed:", style="italic")
            for row in engine["patches"]:
                upstream = f" ({row['upstream']})" if row["upstream"] else ""
                out.print(f"  {row['name']}: {row['why']}{upstream}")
        if engine["refused"]:
            out.print()
            out.print("Refused with a placement:", style="italic")
            for row in engine["refused"]:
                out.print(f"  {row['what']}: {row['why']}")
        out.print()
