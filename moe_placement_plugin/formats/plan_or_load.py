"""Read what may be a plan or a recorded load, told apart by its content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from .atomic import parse_json, read_bytes
from .kinds import Kind, kind_of
from .load_file import parse_load, write_load
from .plan_json import FORMAT, parse_plan, write_plan
from .sglang import parse_sglang_plan


def read(
    path: str | Path, num_ranks: int | None = None, num_experts: int | None = None
) -> Placement | ExpertLoad:
    """Read a plan (ours or SGLang's) or a recorded load.

    Args:
        path: the file.
        num_ranks: EP ranks, which SGLang's form of a plan does not say.
        num_experts: logical experts of a layer, which it does not say either; one more than the
            highest of its ids when left out.

    Raises:
        PlacementError: when it is neither.
    """
    content = read_bytes(path, "plan or recorded load")
    kind = kind_of(content)
    if kind is Kind.EMPTY:
        raise PlacementError(f"{path} is empty: give a plan or a recorded load")
    if kind is Kind.TEXT:
        raise PlacementError(f"{path} is not JSON: give a plan or a recorded load")
    if kind is not Kind.JSON:
        return parse_load(content, path)
    data = parse_json(content, path, "plan or recorded load")
    if isinstance(data, dict) and "physical_to_logical_map" in data:
        if num_ranks is None:
            raise PlacementError(
                f"{path} is a plan in SGLang's form, which does not name the ranks: add --ranks"
            )
        experts = _experts_of(data) if num_experts is None else num_experts
        return parse_sglang_plan(data, experts, num_ranks, str(path))
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return parse_plan(data, str(path))
    if not isinstance(data, dict) or "logical_count" not in data:
        raise PlacementError(
            f'{path} is neither a plan ("format": "{FORMAT}") nor a recorded load '
            '("logical_count"): give one of the two; `moe-placement plan` makes a plan'
        )
    return parse_load(content, path)


def write(thing: Placement | ExpertLoad, path: str | Path) -> None:
    """Write a placement as a plan file, or a load as a recording, atomically.

    Raises:
        PlacementError: when the path cannot be written.
    """
    if isinstance(thing, Placement):
        write_plan(thing, path)
    else:
        write_load(thing, path)


def _experts_of(data: dict[str, Any]) -> int:
    rows = data["physical_to_logical_map"]
    try:
        return 1 + max(max(row) for row in rows)
    except (TypeError, ValueError):
        return 1  # parse_sglang_plan says what is wrong with the rows
