"""Pack a placement into JSON-compatible values, to travel in an engine's config and its store."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..core.placement import Placement

LIMIT = 4 * 2**20
"""Most bytes of a packed placement: half of what a value in torch's TCPStore may have.

DeepSeek-R1's 58 layers of 288 slots take about 25 kB, so that models a hundred times as large are
carried.
"""


def pack(placement: Placement) -> dict[str, Any]:
    """Pack the whole placement; `unpack` turns it back.

    Raises:
        PlacementError: when it is larger than `LIMIT`.
    """
    wide = placement.num_logical_experts > 2**15
    table = placement.physical_to_logical.astype("<i4" if wide else "<i2").tobytes()
    packed: dict[str, Any] = {
        "num_logical_experts": placement.num_logical_experts,
        "slots_per_rank": list(placement.slots_per_rank),
        "layer_ids": list(placement.layer_ids),
        "bytes_per_slot": 4 if wide else 2,
        "physical_to_logical": base64.b64encode(zlib.compress(table)).decode(),
        "strategy": placement.strategy,
        "digest": placement.digest,
    }
    if "node_of_rank" in placement.metadata:
        packed["node_of_rank"] = list(placement.metadata["node_of_rank"])
    if placement.draft is not None:
        packed["draft"] = pack(placement.draft)
    size = len(packed["physical_to_logical"])
    if size > LIMIT:
        raise PlacementError(
            f"the placement of {placement.num_layers} layers with {placement.num_slots} slots "
            f"takes {size} bytes packed, and {LIMIT} travel to other hosts: use a placement that "
            "repeats over the layers (zigzag, balanced)"
        )
    return packed


def unpack(packed: dict[str, Any]) -> Placement:
    """Return the placement that was packed, in this process or on another host.

    Raises:
        PlacementError: when it is not what was sent.
    """
    try:
        raw = np.frombuffer(
            zlib.decompress(base64.b64decode(packed["physical_to_logical"])),
            dtype=f"<i{packed['bytes_per_slot']}",
        )
        nodes = packed.get("node_of_rank")
        placement = Placement(
            physical_to_logical=raw.reshape(len(packed["layer_ids"]), -1).astype(np.int32),
            num_logical_experts=packed["num_logical_experts"],
            slots_per_rank=tuple(packed["slots_per_rank"]),
            layer_ids=tuple(packed["layer_ids"]),
            strategy=packed["strategy"],
            metadata={} if nodes is None else {"node_of_rank": list(nodes)},
            draft=unpack(packed["draft"]) if "draft" in packed else None,
        )
        digest = placement.digest
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        if isinstance(error, PlacementError):
            raise
        digest = f"unreadable: {type(error).__name__}: {error}"
    if digest != packed.get("digest"):
        raise PlacementError(
            f"the placement arrived with digest {digest[:40]}, it was sent with "
            f"{str(packed.get('digest'))[:40]}: the engine's processes run different versions of "
            "this plugin; install one version everywhere"
        )
    return placement
