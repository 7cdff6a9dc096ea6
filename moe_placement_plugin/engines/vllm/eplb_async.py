"""Choose who sends in the async mode of vLLM's EPLB.

A thread fills vLLM's buffer layer by layer over vLLM's communicator, which must not be NCCL there,
and all ranks agree in vLLM's own way before a layer is put into force; only who sends to whom is
ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...rebalancing.exchanger import is_whole
from ..common.patching import Patch
from .eplb_exchange import plan_of
from .state import STATE, EplbModel


def _transfer_layer(original):
    def transfer_layer(*args, **kwargs):
        transfer = None if args else _our_transfer(kwargs)
        return original(*args, **kwargs) if transfer is None else fill_buffer(transfer)

    return transfer_layer


class LayerTransfer(NamedTuple):
    """Hold one layer of an async rebalance.

    Attributes:
        model: of the layer.
        layer: its row in the model's tables.
        old, new: int ``[physical experts]``.
        weights, buffer: tensors ``[slots, ...]`` of the layer and of vLLM's buffer.
        stream: that the copies within the rank run on, None for the current one.
    """

    model: EplbModel
    layer: int
    old: np.ndarray
    new: np.ndarray
    weights: Any
    buffer: Any
    stream: Any


def _our_transfer(call: dict[str, Any]) -> LayerTransfer | None:
    """Return what vLLM's ``transfer_layer`` is to do; None where vLLM does it itself."""
    eplb = STATE.eplb
    theirs = ("is_profile", "enable_migration_batching")
    if eplb is None or any(map(call.get, theirs)) or call.get("rank_mapping") is not None:
        return None
    model = eplb.with_communicator(call.get("communicator"))
    if model is None or model.exchanger is None:
        return None
    old, new = (call[key].cpu().numpy() for key in ("old_layer_indices", "new_layer_indices"))
    if not (is_whole(old) and is_whole(new)):
        return None
    return LayerTransfer(
        model,
        call.get("layer_idx", 0),
        old,
        new,
        call["expert_weights"],
        call["expert_weights_buffer"],
        call.get("stream", call.get("cuda_stream")),
    )


def fill_buffer(transfer: LayerTransfer) -> Any:
    """Bring what a layer's new slots need into vLLM's buffer, from our plan's senders.

    Returns:
        vLLM's ``TransferMetadata``, by which the buffer is moved to its place once all ranks have
        theirs.
    """
    import contextlib

    import torch
    from vllm.distributed.eplb.rebalance_execute import TransferMetadata

    model, layer, old, new, weights, buffer, stream = transfer
    exchanger, communicator = model.exchanger, model.state.communicator
    assert exchanger is not None, "without one vLLM transfers by itself"
    slots, rank = exchanger.num_slots, exchanger.rank
    here = slice(rank * slots, (rank + 1) * slots)
    mine_old, mine = old[here], new[here]
    plan = plan_of(model, old[None], new[None], [layer])
    unchanged = mine_old == mine
    held = np.isin(mine, mine_old)
    primary = np.zeros(slots, dtype=bool)
    experts, rows = np.full(slots, -1, dtype=np.int64), np.full(slots, -1, dtype=np.int32)
    on = (
        contextlib.nullcontext()
        if stream is None
        else torch.get_device_module(weights[0].device).stream(stream)
    )
    with on:
        for slot in np.flatnonzero(held & ~unchanged).tolist():
            source = int(np.flatnonzero(mine_old == mine[slot])[0])
            for tensor, into in zip(weights, buffer):
                into[slot].copy_(tensor[source], non_blocking=True)
    communicator.set_transfer_context(old, layer)
    count = 0
    for move in plan.transfers:  # in one order on all ranks
        if move.from_rank == rank:
            sent = [tensor[move.from_slot] for tensor in weights]
            communicator.add_send(sent, move.to_rank, expert_id=move.expert)
        elif move.to_rank == rank:
            received = [tensor[move.to_slot] for tensor in buffer]
            communicator.add_recv(received, move.from_rank, expert_id=move.expert)
            primary[move.to_slot] = True
            experts[count], rows[count] = move.expert, move.to_slot
            count += 1
    communicator.execute()
    return TransferMetadata(
        is_unchanged=unchanged,
        is_received_locally=held | unchanged,
        recv_primary_mask=primary,
        recv_count=count,
        recv_expert_ids=experts,
        recv_dst_rows=rows,
    )


def async_patches() -> list[Patch]:
    """Return the patch that has our plan's ranks send."""
    return [
        Patch(
            "eplb-senders",
            "vllm.distributed.eplb.async_worker:transfer_layer",
            _transfer_layer,
            relies_on=(
                "old_layer_indices",
                "new_layer_indices",
                "expert_weights",
                "expert_weights_buffer",
                "communicator",
                "layer_idx",
            ),
            why="senders are dealt over all ranks that hold an expert, on whatever node they are",
            removable_when="EPLB chooses senders on the receiver's node",
        ),
    ]
