"""The flags about nodes and hosts, the same in both engines."""

from __future__ import annotations

from typing import Any

from ...hosts.watch import DEFAULT_TIMEOUT
from ...strategies.base import LOCALITIES

LOCALITY_FLAG = "--expert-placement-locality"
TIMEOUT_FLAG = "--expert-host-timeout"


def add_arguments(group: Any) -> None:
    """Add both flags to an argparse group."""
    group.add_argument(
        LOCALITY_FLAG,
        default=None,
        choices=LOCALITIES,
        help="How a plan from a recorded load treats nodes: none (the default); node (the experts of a group on one node); soft (load leaves its "
        "node at a price; without groups, experts that are chosen together share a node, for which the load must have co-activation).",
    )
    group.add_argument(
        TIMEOUT_FLAG,
        default=None,
        type=float,
        metavar="SECONDS",
        help=f"Several hosts: a host that gives no sign of life for this long counts as gone, and the others stop (default {DEFAULT_TIMEOUT:g}).",
    )
