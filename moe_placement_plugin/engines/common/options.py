"""List every flag of this plugin once.

Both engines' parsers, ``--help`` and ``docs/flags.md`` come from these rows.

    python -m moe_placement_plugin.engines.common.options      prints the tables of the page

Importing this module loads nothing else: every process of an engine does it to see whether a flag
of ours was given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """Describe one flag.

    Attributes:
        name: keyword of ``LLM(...)`` and ``sglang.Engine(...)``; the flag has dashes for
            underscores.
        value: what it takes, as ``--help`` and the page show it; empty for a switch.
        default: what holds without it, in words.
        help: one or two sentences for ``--help`` and the page.
        choices: the values that are accepted; None for any.
        parse: makes a value of the flag's text; None keeps the text.
        engines: those whose parser gets it from us.
    """

    name: str
    value: str
    default: str
    help: str
    choices: Callable[[], Sequence[str]] | None = None
    parse: Callable[[str], Any] | None = None
    engines: tuple[str, ...] = ("vllm", "sglang")

    @property
    def flag(self) -> str:
        """Return the flag as it is typed."""
        return flag_of(self.name)

    def add_to(self, group: Any) -> None:
        """Add the flag to an argparse group."""
        if not self.value:
            group.add_argument(self.flag, action="store_true", default=None, help=self.help)
            return
        shown: dict[str, Any] = {"metavar": self.value}
        if self.choices is not None:
            shown = {"choices": list(self.choices())}
        if self.parse is not None:
            shown["type"] = self.parse
        group.add_argument(self.flag, default=None, help=self.help, **shown)


def flag_of(name: str) -> str:
    """Return the flag of a keyword: ``--expert-load-record`` of ``expert_load_record``."""
    return f"--{name.replace('_', '-')}"


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _strategies() -> list[str]:
    from ...strategies.registry import ALIASES, strategy_names  # lazy: heavy

    return [*strategy_names(), *ALIASES]


def _localities() -> Sequence[str]:
    from ...planner.options import LOCALITIES  # lazy: heavy

    return LOCALITIES


def _levels() -> Sequence[str]:
    from ...verification.level import LEVELS  # lazy: heavy

    return LEVELS


STRATEGY = Option(
    "expert_placement_strategy",
    "NAME",
    "linear",
    "Which expert parallel rank holds which expert: linear (contiguous blocks), balanced (the "
    "same, for counts that do not divide over the ranks), zigzag (expert e on rank e mod ranks) "
    "or eplb (from a recorded load).",
    choices=_strategies,
    engines=("sglang",),  # vLLM has this flag, and is taught our values
)
FILE = Option(
    "expert_placement_file",
    "PATH",
    "none",
    "A placement plan, which decides alone, or a recorded expert load that strategy eplb plans "
    "from; told apart by content.",
)
LOCALITY = Option(
    "expert_placement_locality",
    "RULE",
    "none",
    "How a plan from a recorded load treats nodes: none; node (the experts of a group on one "
    "node); soft (load leaves its node at a price; without groups, experts that are chosen "
    "together share a node, for which the load must have co-activation).",
    choices=_localities,
)
VERIFY = Option(
    "expert_placement_verify",
    "LEVEL",
    "replicas with a placement, else off",
    "Verify expert weights after loading and after every exchange by fingerprints: off, replicas "
    "(all replicas of an expert hold the same bits) or checkpoint (every slot also holds what a "
    "clean load of its expert gives; the model is loaded twice). A mismatch stops the server.",
    choices=_levels,
)
REBALANCE = Option(
    "expert_rebalance",
    "JSON",
    "the defaults below",
    "When strategy eplb rebalances under --enable-eplb: an object with some of min_gain, "
    "max_phase_loss, hysteresis, max_bytes, max_pause, staging_bytes, calibration, bandwidth, "
    "peer_memory (docs/exchange.md).",
    parse=json_object,
)
HOST_TIMEOUT = Option(
    "expert_host_timeout",
    "SECONDS",
    "60",
    "Several hosts: a host that gives no sign of life for this long counts as gone, and the others "
    "stop (default 60).",
    parse=float,
)
RECORD = Option(
    "expert_load_record",
    "PATH",
    "nothing is recorded",
    "Record how many tokens each logical expert of each layer receives, into this file.",
)
INTERVAL = Option(
    "expert_load_interval",
    "SECONDS",
    "60",
    "Seconds between two writes of the recording, which is also the length of a window (default "
    "60).",
)
COACTIVATION = Option(
    "expert_load_coactivation",
    "",
    "off",
    "Also record which experts are chosen together.",
)

OPTIONS = (
    STRATEGY,
    FILE,
    LOCALITY,
    VERIFY,
    REBALANCE,
    HOST_TIMEOUT,
    RECORD,
    INTERVAL,
    COACTIVATION,
)
"""All flags, in the order in which ``--help`` lists them."""


def options_of(engine: str) -> tuple[Option, ...]:
    """Return the flags that an engine's parser gets from us."""
    return tuple(option for option in OPTIONS if engine in option.engines)


def add_options(group: Any, engine: str) -> None:
    """Add an engine's flags to an argparse group."""
    for option in options_of(engine):
        option.add_to(group)


def table() -> str:
    """Return the first table of ``docs/flags.md``, Markdown."""
    rows = [
        (f"`{o.flag}{' ' * bool(o.value)}{o.value}`", o.default, o.help.partition(" (default")[0])
        for o in OPTIONS
    ]
    return markdown(("flag", "without it", "what it does"), rows)


def policy_table() -> str:
    """Return the second table of ``docs/flags.md``: the rules of ``--expert-rebalance``."""
    from dataclasses import MISSING, fields

    from ...rebalancing.policy import RebalancePolicy  # lazy: heavy

    said = attributes_of(RebalancePolicy)
    rows = []
    for f in fields(RebalancePolicy):
        default = f.default
        if f.default_factory is not MISSING:
            default = f.default_factory()
        rows.append((f"`{f.name}`", f"`{json.dumps(default)}`", said[f.name]))
    return markdown(("rule", "default", "what it does"), rows)


def attributes_of(described: type) -> Mapping[str, str]:
    """Return what a class's docstring says of each of its attributes.

    Args:
        described: a class with an ``Attributes:`` section; a line may describe several.
    """
    section = (described.__doc__ or "").partition("Attributes:")[2].strip("\n")
    indent = len(section) - len(section.lstrip())
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        text = line.strip()
        if not text:
            break
        if len(line) - len(line.lstrip()) == indent:
            named, _, text = text.partition(": ")
            names = named.split(", ")
            found.update(dict.fromkeys(names, text))
        else:
            found.update({name: f"{found[name]} {text}" for name in names})
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(f"{table()}\n\n{policy_table()}")
