"""Our exchange under vLLM's EPLB: instead of its whole transfer in sync mode, and its choice of senders in async mode.

In sync mode the server waits: changed layers only, live sources spread evenly, a two-phase commit, staging memory of half a layer instead of
vLLM's whole one. In async mode a thread fills vLLM's buffer layer by layer over vLLM's communicator, which must not be NCCL there, and all
ranks agree in vLLM's own way before a layer is put into force; only who sends to whom is ours.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np

from ...exchange.commit import ExchangeAborted
from ...exchange.watchdog import Watchdog
from ...rebalancing.exchanger import Exchanger, Meeting, connect, whole
from ..common.patching import Patch
from .layers import routed_layers

logger = logging.getLogger("vllm.moe_placement_plugin")

EXCHANGER = "_moe_placement_exchanger"
"""Attribute of an ``EplbModelState``."""

_numbers = itertools.count()
_ADOPTED = "_moe_placement_adopted"  # what `adopt` was called with

_OWN_TRANSPORT = (
    "nixl"  # reads other ranks' memory by itself, into the buffers that it has registered
)

_exchangers: dict[
    int, tuple[Any, Exchanger]
] = {}  # by identity of the model's list of weights: (EPLB's model state, exchanger)


def adopt(
    eplb: Any, state: Any, staging_bytes: int | None, timeout: float, peer_memory: bool = True
) -> Exchanger | None:
    """Make this rank's exchanger of a model that EPLB has registered; a collective call.

    Args:
        eplb: vLLM's ``EplbState``.
        state: its ``EplbModelState`` of the model.
        staging_bytes, timeout: as `Exchanger` takes them.
        peer_memory: whether ranks of a host read experts in each other's memory where they can.

    Returns:
        None where the user chose a communicator that transfers in a way of its own.
    """
    from vllm.distributed.parallel_state import get_ep_group

    backend = eplb.parallel_config.eplb_config.communicator
    if backend == _OWN_TRANSPORT and not eplb.is_async:
        logger.info(
            "moe_placement_plugin: EPLB's communicator is %s: it exchanges experts, not this plugin",
            backend,
        )
        return None
    group = get_ep_group()  # not EPLB's own: with most communicators that one has no NCCL communicator, which takes memory
    weights = state.model.expert_weights
    device_group = group.cpu_group if weights[0][0].device.type == "cpu" else group.device_group
    name = f"vllm/{next(_numbers)}"
    exchanger = Exchanger(
        dict(enumerate(weights)), state.logical_replica_count.shape[1], device_group, Meeting.of(group.cpu_group), name, logger, staging_bytes,
        timeout,
    )  # fmt: skip
    if peer_memory and not eplb.is_async:
        exchanger.look_at_peers(group.cpu_group)
    setattr(state, EXCHANGER, exchanger)
    setattr(state, _ADOPTED, (staging_bytes, timeout, peer_memory))
    _exchangers[id(weights)] = (state, exchanger)
    return exchanger


def look_again(eplb: Any, state: Any, cpu_group: Any) -> None:
    """After an update of weights: where parameters were made anew, on any rank, look at the new ones; a collective call.

    Views of the old ones would be moved, and the model compute with others.

    Args:
        eplb: vLLM's ``EplbState``.
        state: its ``EplbModelState`` of the model.
        cpu_group: of the EP ranks, for CPU tensors.
    """
    import torch
    import torch.distributed as dist

    weights = state.model.expert_weights
    fresh = [list(layer.get_expert_weights()) for layer in routed_layers(state.model).values()]

    def places(rows: Any) -> list[list[int]]:
        return [[tensor.data_ptr() for tensor in row] for row in rows]

    moved = torch.tensor([places(fresh) != places(weights)], dtype=torch.int64, device="cpu")
    dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=cpu_group)
    if not moved.item():
        return
    logger.info("moe_placement_plugin: an update made expert weights anew: EPLB moves the new ones")
    weights[:] = fresh
    if hasattr(state, EXCHANGER):
        adopt(eplb, state, *getattr(state, _ADOPTED))
        settle(eplb, state)


def settle(eplb: Any, state: Any) -> None:
    """Take the staging memory that is kept, in place of the buffer that vLLM has for it, and connect the ranks."""
    exchanger = getattr(state, EXCHANGER, None)
    if exchanger is None:
        return
    if eplb.is_async:
        exchanger.release()
        return
    state.expert_buffer = []  # one whole layer of this rank's experts
    exchanger.reserve()
    connect(exchanger.group, exchanger.device)


def of(expert_weights: Any) -> tuple[Any, Exchanger] | None:
    """(EPLB's model state, exchanger) of a model's weights, if it is ours."""
    found = _exchangers.get(id(expert_weights))
    return None if found is None or found[0].model.expert_weights is not expert_weights else found


def exchange(
    state: Any, old: np.ndarray, new: np.ndarray, watchdog: Watchdog | None = None
) -> None:
    """Move experts from one table to another, all layers, the server waiting.

    Args:
        state: an adopted ``EplbModelState``.
        old, new: int ``[layers, physical experts]``.

    Raises:
        ExchangeAborted: on all ranks alike, with the maps of the layers that were done in force.
        ExchangeLost: when the outcome cannot be known.
    """
    import torch
    from vllm.distributed.eplb import eplb_state

    exchanger: Exchanger = getattr(state, EXCHANGER)
    rows = np.flatnonzero((old != new).any(axis=1)).tolist()
    if not rows:
        return
    plan = exchanger.plan(
        exchanger.placement(old[rows], rows), exchanger.placement(new[rows], rows)
    )
    try:
        exchanger.exchange(plan, watchdog=watchdog)
    except ExchangeAborted as aborted:
        table = old.copy()
        table[rows] = aborted.metadata.in_force().physical_to_logical
        eplb_state._commit_eplb_maps(
            state, new_physical_to_logical_map=torch.from_numpy(table.astype(np.int64))
        )
        raise


_watchdog: Watchdog | None = None


def watched(watchdog: Watchdog | None) -> None:
    """Tell ``watchdog`` what exchanges of this process wait for from now on."""
    global _watchdog
    _watchdog = watchdog


def _rearrange_weights(original):
    def rearrange_expert_weights_inplace(
        old_global_expert_indices, new_global_expert_indices, expert_weights, expert_buffer, ep_group, communicator, is_profile=False,
        rank_mapping=None,
    ):  # fmt: skip
        found = of(expert_weights)
        if found is None or rank_mapping is not None:
            return original(
                old_global_expert_indices, new_global_expert_indices, expert_weights, expert_buffer, ep_group, communicator, is_profile,
                rank_mapping,
            )  # fmt: skip
        if not is_profile:  # staging memory is taken already: there is nothing to try out
            exchange(
                found[0],
                old_global_expert_indices.cpu().numpy(),
                new_global_expert_indices.cpu().numpy(),
                _watchdog,
            )

    return rearrange_expert_weights_inplace


def _transfer_layer(original):
    def transfer_layer(*args, **kwargs):
        ours = (
            not args
            and not kwargs.get("is_profile")
            and kwargs.get("rank_mapping") is None
            and not kwargs.get("enable_migration_batching")
        )
        exchanger = (
            next(
                (
                    e
                    for s, e in _exchangers.values()
                    if s.communicator is kwargs.get("communicator")
                ),
                None,
            )
            if ours
            else None
        )
        if exchanger is None:
            return original(*args, **kwargs)
        old, new = (kwargs[key].cpu().numpy() for key in ("old_layer_indices", "new_layer_indices"))
        if not (whole(old) and whole(new)):
            return original(*args, **kwargs)
        stream = kwargs.get("stream", kwargs.get("cuda_stream"))
        return fill_buffer(
            exchanger, old, new, kwargs["expert_weights"], kwargs["expert_weights_buffer"], kwargs["communicator"], stream,
            kwargs.get("layer_idx", 0),
        )  # fmt: skip

    return transfer_layer


def fill_buffer(
    exchanger: Exchanger,
    old: np.ndarray,
    new: np.ndarray,
    weights: Any,
    buffer: Any,
    communicator: Any,
    stream: Any,
    layer: int,
) -> Any:
    """Bring what one layer's new slots need into vLLM's buffer: vLLM's ``transfer_layer`` with our plan's senders.

    Args:
        old, new: int ``[physical experts]``.
        weights, buffer: tensors ``[slots, ...]`` of the layer and of the buffer.
        communicator: vLLM's.
        stream: that the copies within the rank run on, None for the current one.

    Returns:
        vLLM's ``TransferMetadata``, by which the buffer is moved to its place once all ranks have theirs.
    """
    import contextlib

    import torch
    from vllm.distributed.eplb.rebalance_execute import TransferMetadata

    slots, rank = exchanger.num_slots, exchanger.rank
    here = slice(rank * slots, (rank + 1) * slots)
    mine_old, mine = old[here], new[here]
    plan = exchanger.plan(
        exchanger.placement(old[None], (layer,)), exchanger.placement(new[None], (layer,))
    )
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
    for (
        _row,
        expert,
        source,
        slot,
        to,
        into,
    ) in plan.transfers.tolist():  # in one order on all ranks
        if source == rank:
            communicator.add_send([tensor[slot] for tensor in weights], to, expert_id=expert)
        elif to == rank:
            communicator.add_recv([tensor[into] for tensor in buffer], source, expert_id=expert)
            primary[into] = True
            experts[count], rows[count] = expert, into
            count += 1
    communicator.execute()
    return TransferMetadata(
        is_unchanged=unchanged, is_received_locally=held | unchanged, recv_primary_mask=primary, recv_count=count, recv_expert_ids=experts,
        recv_dst_rows=rows,
    )  # fmt: skip


def _logical_maps(original):
    def compute_logical_maps(physical_to_logical_map, num_logical_experts):
        import torch

        from ...rebalancing.tables import inverse_maps  # lazy: numba

        held = physical_to_logical_map.numpy()
        whole_table = held[None] if held.ndim == 1 else held
        usable = whole_table >= 0
        if not usable.any():
            return original(physical_to_logical_map, num_logical_experts)
        to_physical, count = inverse_maps(
            whole_table, num_logical_experts, None if usable.all() else usable
        )
        maps = tuple(
            torch.from_numpy(t).to(physical_to_logical_map.dtype) for t in (to_physical, count)
        )
        return tuple(t.squeeze(0) for t in maps) if held.ndim == 1 else maps

    return compute_logical_maps


def exchange_patches() -> list[Patch]:
    """The patches that put our exchange under EPLB."""
    return [
        Patch(
            "eplb-exchange",
            "vllm.distributed.eplb.eplb_state:rearrange_expert_weights_inplace",
            _rearrange_weights,
            relies_on=("old_global_expert_indices", "new_global_expert_indices", "expert_weights", "expert_buffer", "ep_group", "communicator",
                       "is_profile", "rank_mapping"),
            why="layers that do not change are worked through, all is staged in a buffer of a whole layer, and a rank that dies leaves a mix",
            upstream="vLLM issues 50647, 43219",
            removable_when="EPLB takes executors from plugins",
        ),
        Patch(
            "eplb-maps",
            "vllm.distributed.eplb.eplb_state:compute_logical_maps",
            _logical_maps,
            relies_on=("physical_to_logical_map", "num_logical_experts"),
            why="a loop in Python over all slots makes the pause longer than the transfers of a small rebalance",
            removable_when="vLLM computes them by array operations",
        ),
        Patch(
            "eplb-senders",
            "vllm.distributed.eplb.async_worker:transfer_layer",
            _transfer_layer,
            relies_on=("old_layer_indices", "new_layer_indices", "expert_weights", "expert_weights_buffer", "communicator", "layer_idx"),
            why="senders are dealt over all ranks that hold an expert, on whatever node they are",
            removable_when="EPLB chooses senders on the receiver's node",
        ),
    ]  # fmt: skip
