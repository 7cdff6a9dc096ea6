"""Offer the ``moe-placement`` command: one file per verb, imported when the verb is called.

``--help`` must not pay for numba, torch or an engine, so verbs are registered by name with their
one-line help and only the called one is imported.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from ..core.errors import PlacementError

HELP = (
    "Place the experts of Mixture-of-Experts models: record a load, plan, look, simulate, verify."
)
VERBS = {
    "bench": "Measure planners and layers on this machine.",
    "demo": "Serve a tiny model with experts placed by a real engine on this machine's CPU.",
    "diff": "Compare two plans: moves, bytes, time.",
    "doctor": "Show the engines found, and whether each patch fits them.",
    "export": "Write a plan or a load in SGLang's own JSON.",
    "plan": "Plan where experts lie from recorded loads.",
    "record": "Send prompts to a server that records, and wait for the recording.",
    "show": "Show loads and plans in the terminal, as an HTML page or as PNG files.",
    "simulate": "Compare strategies on recorded loads before anything is deployed.",
    "verify": "Check that a placed engine answers as the stock engine does.",
}
"""Verb -> one-line help. ``moe_placement_plugin.cli.<verb>`` holds ``app``, a `typer.Typer`."""


class LazyVerbs(TyperGroup):
    """Group verbs that are imported when they run.

    typer's own group and not click's: recent typer carries its own copy of click, whose exceptions
    click's groups do not know.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in VERBS:
            return None
        command = get_command(import_module(f"{__name__}.{name.replace('-', '_')}").app)
        command.name = name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, VERBS[name]) for name in self.list_commands(ctx)])


root = typer.Typer(
    cls=LazyVerbs,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@root.callback(help=HELP)
def verbs() -> None:
    """Stand for the command without a verb, which prints its help."""


def main() -> None:
    """Run the command; a `PlacementError` is one line on stderr and exit code 2."""
    # Importing makes hundreds of thousands of objects that stay; the default looks through them
    # again and again, a fifth of a second in all.
    gc.set_threshold(200_000, 20, 20)
    try:
        root(prog_name="moe-placement")
    except PlacementError as error:
        typer.echo(f"moe-placement: {error}", err=True)
        sys.exit(2)
