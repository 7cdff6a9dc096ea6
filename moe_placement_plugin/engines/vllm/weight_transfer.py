"""The back ends over which a trainer sends new weights (``--weight-transfer-config``): which obey a placement.

Those that hand each tensor of the checkpoint to the model's loader do. One that remembers where its
tensors went, or writes parts of them, brings old experts to new places, and no check would see it.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import PlacementError

BY_THE_LOADER = {
    "nccl": "NCCLWeightTransferEngine",
    "ipc": "IPCWeightTransferEngine",
    "nccl_m2n": "M2NWeightTransferEngine",  # its direct copies leave experts out
}
"""Back ends that load experts through the model's loader, and their classes."""

PAST_THE_LOADER = {
    "sparse_nccl": "brings parts of experts, so that no slot can be seen to be filled",
    "sharded_rdt": "copies to where experts lay when the trainer connected",
    "modelexpress": "copies what another server's ranks have, slot by slot",
}
"""Back ends of vLLM's own that do not load through the map, and what they do instead."""


def check_engine(engine: Any) -> None:
    """Refuse an engine of someone else's, of which nobody knows how it writes; nothing was overwritten.

    Args:
        engine: vLLM's ``WeightTransferEngine`` of a worker.

    Raises:
        PlacementError: naming its class.
    """
    classes = {c.__name__ for c in type(engine).__mro__}
    if engine is not None and classes.isdisjoint(BY_THE_LOADER.values()):
        raise PlacementError(
            f"new weights through {type(engine).__name__}, which is none of "
            f"{', '.join(BY_THE_LOADER.values())} and may write past the placement of experts: no "
            f"weight was changed; use one of {', '.join(BY_THE_LOADER)}, or leave the placement out"
        )
