"""The schema of a plan file, and SGLang's own form of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import PlacementError
from ..core.placement import FORMAT, FORMAT_VERSION, Placement, as_int32_table, even_slots


class DraftRows(BaseModel):
    """Rows for the MoE layers of the draft of speculative decoding, which has layers and experts of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_logical_experts: int = Field(ge=1)
    slots_per_rank: list[int]
    layer_ids: list[int]
    physical_to_logical: list[list[int]]


class PlanFile(BaseModel):
    """Content of a plan file; see `Placement` for the meaning of the fields."""

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


def is_plan(data: Any) -> bool:
    """Whether parsed JSON claims to be a plan (ours or SGLang's) rather than a recorded load."""
    return isinstance(data, Mapping) and (
        data.get("format") == FORMAT or "physical_to_logical_map" in data
    )


def parse_plan(data: Any, source: str) -> Placement:
    """A validated `Placement` from the parsed JSON of a plan file.

    Raises:
        PlacementError: naming ``source``, the field and the rule.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise PlacementError(
            f'{source} is no plan file: it lacks "format": "{FORMAT}"; make one with `moe-placement plan`'
        )
    if data.get("version") != FORMAT_VERSION:
        raise PlacementError(
            f"{source} has plan version {data.get('version')!r}, this release reads version {FORMAT_VERSION}: "
            "make the plan again with this release"
        )
    if data.get("draft") is not None and not data.get("physical_to_logical"):
        raise PlacementError(
            f"{source} is a plan for the draft only: give the model's own rows (physical_to_logical) too; a strategy without "
            "a plan (zigzag, balanced) places the draft as well"
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
            as_int32_table(plan.physical_to_logical),
            plan.num_logical_experts,
            tuple(plan.slots_per_rank),
            tuple(plan.layer_ids),
            plan.strategy,
            plan.metadata,
            None if plan.draft is None else _draft(plan.draft),
        )
    except PlacementError as error:
        raise PlacementError(f"{source}: {error}") from None


def _draft(rows: DraftRows) -> Placement:
    try:
        return Placement(
            np.asarray(rows.physical_to_logical),
            rows.num_logical_experts,
            tuple(rows.slots_per_rank),
            tuple(rows.layer_ids),
            "draft",
        )
    except PlacementError as error:
        raise PlacementError(f"draft: {error}") from None


def parse_sglang_plan(
    data: Mapping[str, Any], num_logical_experts: int, num_ranks: int, source: str
) -> Placement:
    """A `Placement` from SGLang's ``{"physical_to_logical_map": [layers][slots]}``.

    SGLang's form names neither the experts nor the ranks, so the model must.

    Raises:
        PlacementError: naming ``source``.
    """
    rows = data["physical_to_logical_map"]
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, list) and row for row in rows)
    ):
        raise PlacementError(
            f"{source}: physical_to_logical_map must be a list of layers, each a list of expert ids"
        )
    if len(rows[0]) % num_ranks:
        raise PlacementError(
            f"{source}: {len(rows[0])} slots do not divide over {num_ranks} EP ranks: SGLang's form needs equal ranks; "
            "plan for this number of ranks"
        )
    try:
        return Placement(
            as_int32_table(rows),
            num_logical_experts,
            even_slots(len(rows[0]), num_ranks),
            strategy="sglang",
        )
    except PlacementError as error:
        raise PlacementError(f"{source}: {error}") from None
