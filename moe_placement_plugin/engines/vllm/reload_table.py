"""Find the slots that an arriving weight belongs to, once vLLM's EPLB has moved experts.

Its loader believes them elsewhere then.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .layers import EPLB_ROW, logical_of_physical, num_logical

FIRST_COPIES = "_moe_placement_first_copies"
"""Attribute of a ``RoutedExperts`` whose model brings each expert once.

It brings none of its replicas.
"""


def moved_table(layer: Any) -> np.ndarray | None:
    """Return EPLB's table of a layer where it is not vLLM's first one any more.

    Returns:
        int64 ``[physical experts]``; None where it is the first one, or without EPLB.
    """
    if getattr(layer, EPLB_ROW, None) is None:
        return None
    table = logical_of_physical(layer)
    return None if np.array_equal(table, np.arange(table.size) % num_logical(layer)) else table


def local_copies(layer: Any, expert_id: int, weight_name: str) -> tuple[int, ...]:
    """Return the physical experts to load a weight as, given the one that vLLM's loader names.

    The loader counts physical experts by vLLM's first table: expert ``i`` modulo the number of
    logical ones. What it brings for a first copy goes to every slot that the table in force gives
    that expert; what it brings for a redundant copy has then arrived already.

    Args:
        layer: a ``RoutedExperts``.
        expert_id: a physical expert by the first table, or a fused shared one.
        weight_name: of the parameter; activation scales that a kernel takes over all experts have
            rows for all ranks.
    """
    table = moved_table(layer)
    if table is None and vars(layer).get(FIRST_COPIES) is not None:
        table = logical_of_physical(layer)
    if table is None or expert_id >= table.size:
        return (expert_id,)
    if expert_id >= num_logical(layer):
        return ()
    copies = np.flatnonzero(table == expert_id).tolist()
    if getattr(layer.quant_method, "use_global_sf", False) and "input_scale" in weight_name:
        return tuple(copies)
    return tuple(c for c in copies if layer.expert_map_manager.map_global_to_local(c) >= 0)
