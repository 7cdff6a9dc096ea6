"""Read and write plan files: a placement as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import PlacementError
from ..core.placement import Placement
from ..core.tables import as_int32_table
from .atomic import read_json, write_atomically

FORMAT = "moe-placement-plan"
FORMAT_VERSION = 1


class DraftRows(BaseModel):
    """Check the rows of a plan file for the draft, which has layers and experts of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_logical_experts: int = Field(ge=1)
    slots_per_rank: list[int]
    layer_ids: list[int]
    physical_to_logical: list[list[int]]


class PlanFile(BaseModel):
    """Check the content of a plan file, whose fields mean what those of `Placement` do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["moe-placement-plan"]
    version: int
    strategy: str
    num_logical_experts: int = Field(ge=1)
    slots_per_rank: list[int]
    layer_ids: list[int] = Field(default_factory=list)
    physical_to_logical: list[list[int]]
    metadata: dict[str, Any] = Field(default_factory=dict)
    draft: DraftRows | None = None


def read_plan(path: str | Path) -> Placement:
    """Read a plan file.

    Raises:
        PlacementError: when the file is missing, not JSON, or not a valid plan.
    """
    return parse_plan(read_json(path, "plan"), str(path))


def write_plan(placement: Placement, path: str | Path) -> None:
    """Write a placement as a plan file, atomically.

    Raises:
        PlacementError: when the path cannot be written.
    """
    rows = ",\n    ".join(
        json.dumps(row, separators=(",", ":")) for row in placement.physical_to_logical.tolist()
    )
    head = {k: v for k, v in plan_to_dict(placement).items() if k != "physical_to_logical"}
    text = (
        json.dumps(head, indent=2)[:-2]
        + ',\n  "physical_to_logical": [\n    '
        + rows
        + "\n  ]\n}\n"
    )
    write_atomically(path, text.encode())


def plan_to_dict(placement: Placement) -> dict[str, Any]:
    """Give a plan file's content as JSON-compatible values; `parse_plan` reads it."""
    data = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "strategy": placement.strategy,
        **rows_to_dict(placement),
        "metadata": dict(placement.metadata),
    }
    return data if placement.draft is None else data | {"draft": rows_to_dict(placement.draft)}


def rows_to_dict(placement: Placement) -> dict[str, Any]:
    """Give the rows of a plan file, of the model or of its draft, as JSON-compatible values."""
    return {
        "num_logical_experts": placement.num_logical_experts,
        "slots_per_rank": list(placement.slots_per_rank),
        "layer_ids": list(placement.layer_ids),
        "physical_to_logical": placement.physical_to_logical.tolist(),
    }


def parse_plan(data: Any, source: str = "plan") -> Placement:
    """Make a validated `Placement` from the parsed JSON of a plan file.

    Args:
        data: the parsed JSON.
        source: names the file in errors.

    Raises:
        PlacementError: naming ``source``, the field and the rule.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise PlacementError(
            f'{source} is no plan file: it lacks "format": "{FORMAT}"; make one with '
            "`moe-placement plan`"
        )
    if data.get("version") != FORMAT_VERSION:
        raise PlacementError(
            f"{source} has plan version {data.get('version')!r}, this release reads version "
            f"{FORMAT_VERSION}: make the plan again with this release"
        )
    if data.get("draft") is not None and not data.get("physical_to_logical"):
        raise PlacementError(
            f"{source} is a plan for the draft only: give the model's own rows "
            "(physical_to_logical) too; a strategy without a plan (zigzag, balanced) places the "
            "draft as well"
        )
    try:
        plan = PlanFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise PlacementError(
            f"{source}: {where}: {first['msg']}; make the plan again or mend that field"
        ) from None
    try:
        return Placement(
            physical_to_logical=as_int32_table(plan.physical_to_logical),
            num_logical_experts=plan.num_logical_experts,
            slots_per_rank=tuple(plan.slots_per_rank),
            layer_ids=tuple(plan.layer_ids),
            strategy=plan.strategy,
            metadata=plan.metadata,
            draft=None if plan.draft is None else _draft(plan.draft),
        )
    except PlacementError as error:
        raise PlacementError(f"{source}: {error}") from None


def _draft(rows: DraftRows) -> Placement:
    try:
        return Placement(
            physical_to_logical=np.asarray(rows.physical_to_logical),
            num_logical_experts=rows.num_logical_experts,
            slots_per_rank=tuple(rows.slots_per_rank),
            layer_ids=tuple(rows.layer_ids),
            strategy="draft",
        )
    except PlacementError as error:
        raise PlacementError(f"draft: {error}") from None
