"""Read and write SGLang's own forms.

A placement is ``physical_to_logical_map [layers, slots]``, a load ``logical_count``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import PlacementError, first_line
from ..core.load import ExpertLoad
from ..core.placement import Placement, even_slots
from ..core.tables import as_int32_table, shorten
from .atomic import parse_json


def to_sglang(placement: Placement, num_layers: int | None = None) -> dict[str, Any]:
    """Give a placement as ``--init-expert-location`` takes it.

    SGLang numbers all layers of the model: rows of layers that are not MoE layers hold the trivial
    map.

    Args:
        placement: with as many slots on every rank.
        num_layers: of the model; up to the last MoE layer when left out.

    Raises:
        PlacementError: if ranks have different numbers of slots (SGLang knows only equal ones), or
            there are rows for a draft, for which its form has no place.
    """
    if placement.draft is not None:
        raise PlacementError(
            "SGLang's form of a plan has no rows for a draft, this plan has: leave its draft's "
            "rows out"
        )
    if not placement.is_even:
        raise PlacementError(
            f"slots_per_rank {shorten(placement.slots_per_rank)}: SGLang needs the same number of "
            "slots on every rank; plan with redundant experts that fill the ranks up"
        )
    last = max(placement.layer_ids)
    total = last + 1 if num_layers is None else num_layers
    if total <= last:
        raise PlacementError(
            f"num_layers {total}, but the plan has layer {last}: give the model's own"
        )
    rows = np.tile(np.arange(placement.num_slots) % placement.num_logical_experts, (total, 1))
    rows[list(placement.layer_ids)] = placement.physical_to_logical
    return {"physical_to_logical_map": rows.tolist()}


def parse_sglang_plan(
    data: Mapping[str, Any], num_logical_experts: int, num_ranks: int, source: str
) -> Placement:
    """Make a `Placement` of SGLang's ``{"physical_to_logical_map": [layers][slots]}``.

    Args:
        data: the parsed JSON.
        num_logical_experts: logical experts of a layer, which SGLang's form does not name.
        num_ranks: EP ranks, which it does not name either.
        source: names the file in errors.

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
            f"{source}: {len(rows[0])} slots do not divide over {num_ranks} EP ranks: SGLang's "
            "form needs equal ranks; plan for this number of ranks"
        )
    try:
        return Placement(
            physical_to_logical=as_int32_table(rows),
            num_logical_experts=num_logical_experts,
            slots_per_rank=even_slots(len(rows[0]), num_ranks),
            strategy="sglang",
        )
    except PlacementError as error:
        raise PlacementError(f"{source}: {error}") from None


def parse_sglang_load(content: bytes, path: str | Path) -> ExpertLoad:
    """Make a load of SGLang's ``{"logical_count": [layers][experts]}``.

    Raises:
        PlacementError: naming ``path``.
    """
    data = parse_json(content, path, "recorded load or a plan")
    if "logical_count" not in data:
        raise PlacementError(
            f"{path} is neither a plan nor a recorded load: SGLang's recordings have "
            '"logical_count", plans have "format": "moe-placement-plan"'
        )
    return ExpertLoad(data["logical_count"], metadata={"source": "sglang"})


def read_torch_load(path: str | Path) -> ExpertLoad:
    """Read a load that SGLang's ``stat`` recorder dumped with torch, without running its code.

    Raises:
        PlacementError: naming ``path``; also when torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise PlacementError(
            f"{path} is a .pt file, which needs torch to be read: install torch or export it as "
            "JSON"
        ) from None
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise PlacementError(
            f"{path} is no readable .pt recording ({first_line(error)}): dump it again"
        ) from None
    if not isinstance(data, dict) or "logical_count" not in data:
        raise PlacementError(
            f"{path} holds no logical_count: give a file dumped by SGLang's `stat` recorder"
        )
    counts = data["logical_count"]
    counts = counts.numpy() if isinstance(counts, torch.Tensor) else counts
    return ExpertLoad(counts, metadata={"source": "sglang"})
