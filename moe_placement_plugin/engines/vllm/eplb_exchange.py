"""Exchange experts under vLLM's EPLB in sync mode, where the server waits.

Changed layers only, live sources spread evenly, a two-phase commit, staging memory of half a layer
instead of vLLM's whole one.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.tables import inverse_maps
from ...exchange.commit import ExchangeAborted
from ...exchange.plan import ExchangePlan
from ...rebalancing.exchanger import Exchanger, RankFacts, connect
from ..common.patching import Patch
from .layers import routed_layers
from .state import STATE, Eplb, EplbModel

logger = logging.getLogger("vllm.moe_placement_plugin")

_numbers = itertools.count()

_OWN_TRANSPORT = "nixl"
"""A communicator that reads other ranks' memory by itself, into buffers of its own."""


def adopt(eplb: Eplb, state: Any) -> EplbModel:
    """Take a model that EPLB has registered into this process's state; a collective call.

    Args:
        eplb: of this process.
        state: vLLM's ``EplbModelState`` of the model.
    """
    model = EplbModel(state, _exchanger_of(eplb, state))
    eplb.models.append(model)
    return model


def _exchanger_of(eplb: Eplb, state: Any) -> Exchanger | None:
    """Make this rank's exchanger of a model; a collective call.

    Returns:
        None where the user chose a communicator that transfers in a way of its own.
    """
    from vllm.distributed.parallel_state import get_ep_group

    theirs = eplb.owner
    backend = theirs.parallel_config.eplb_config.communicator
    if backend == _OWN_TRANSPORT and not theirs.is_async:
        logger.info(
            "moe_placement_plugin: EPLB's communicator is %s: it exchanges experts, not this "
            "plugin",
            backend,
        )
        return None
    # Not EPLB's own group: with most communicators that one has no NCCL communicator, which takes
    # memory.
    group = get_ep_group()
    weights = state.model.expert_weights
    on_cpu = weights[0][0].device.type == "cpu"
    exchanger = Exchanger(
        dict(enumerate(weights)),
        state.logical_replica_count.shape[1],
        group.cpu_group if on_cpu else group.device_group,
        RankFacts.gather(group.cpu_group),
        f"vllm/{next(_numbers)}",
        logger,
        eplb.limits,
    )
    if eplb.limits.peer_memory and not theirs.is_async:
        exchanger.look_at_peers(group.cpu_group)
    return exchanger


def look_again(eplb: Any, state: Any, cpu_group: Any) -> None:
    """Look at parameters that an update of weights made anew, on any rank; a collective call.

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
    ours = STATE.eplb_of(eplb)
    model = None if ours is None else ours.with_state(state)
    if ours is not None and model is not None and model.exchanger is not None:
        model.exchanger = _exchanger_of(ours, state)
        reserve_staging(ours, model)


def reserve_staging(eplb: Eplb, model: EplbModel) -> None:
    """Take the staging memory that is kept, in place of vLLM's buffer, and connect the ranks."""
    exchanger = model.exchanger
    if exchanger is None:
        return
    if eplb.owner.is_async:
        exchanger.release()
        return
    model.state.expert_buffer = []  # one whole layer of this rank's experts
    exchanger.reserve()
    connect(exchanger.group, exchanger.device)


def exchange(model: EplbModel, old: np.ndarray, new: np.ndarray) -> None:
    """Move experts from one table to another, all layers, the server waiting.

    Args:
        model: with an exchanger.
        old, new: int ``[layers, physical experts]``, as vLLM hands them over.

    Raises:
        ExchangeAborted: on all ranks alike, with the maps of the layers that were done in force.
        ExchangeLost: when the outcome cannot be known.
    """
    import torch
    from vllm.distributed.eplb import eplb_state

    if np.array_equal(old, new):
        return
    assert model.exchanger is not None, "without one vLLM moves experts itself"
    plan = plan_of(model, old, new, range(len(old)))
    watchdog = None if model.rebalance is None else model.rebalance.watchdog
    try:
        model.exchanger.exchange(plan, watchdog=watchdog)
    except ExchangeAborted as aborted:
        table = old.astype(np.int64)
        table[list(plan.new.layer_ids)] = aborted.metadata.in_force().physical_to_logical
        eplb_state._commit_eplb_maps(
            model.state, new_physical_to_logical_map=torch.from_numpy(table)
        )
        raise


def plan_of(
    model: EplbModel, old: np.ndarray, new: np.ndarray, layers: Sequence[int]
) -> ExchangePlan:
    """Return what has to move in some layers: what was weighed, unless vLLM asks for other tables.

    Args:
        model: with an exchanger.
        old, new: int ``[layers, physical experts]``.
        layers: their rows in the model's tables.
    """
    assert model.exchanger is not None, "without one vLLM moves experts itself"
    weighed = None if model.rebalance is None else model.rebalance.exchange
    return model.exchanger.plan(old, new, layers, weighed=weighed)


def _rearrange_weights(original):
    signature = inspect.signature(original)

    def rearrange_expert_weights_inplace(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        eplb = STATE.eplb
        model = None if eplb is None else eplb.with_weights(call["expert_weights"])
        if model is None or model.exchanger is None or call.get("rank_mapping") is not None:
            original(*args, **kwargs)
        elif not call.get("is_profile"):  # staging memory is taken already: nothing to try out
            tables = ("old_global_expert_indices", "new_global_expert_indices")
            exchange(model, *(call[name].cpu().numpy() for name in tables))

    return rearrange_expert_weights_inplace


def _logical_maps(original):
    def compute_logical_maps(physical_to_logical_map, num_logical_experts):
        import torch

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
    """Return the patches that put our exchange under EPLB."""
    return [
        Patch(
            "eplb-exchange",
            "vllm.distributed.eplb.eplb_state:rearrange_expert_weights_inplace",
            _rearrange_weights,
            relies_on=(
                "old_global_expert_indices",
                "new_global_expert_indices",
                "expert_weights",
                "expert_buffer",
                "ep_group",
                "communicator",
                "is_profile",
                "rank_mapping",
            ),
            why="layers that do not change are worked through, all is staged in a buffer of a "
            "whole layer, and a rank that dies leaves a mix",
            upstream="vLLM issues 50647, 43219",
            removable_when="EPLB takes executors from plugins",
        ),
        Patch(
            "eplb-maps",
            "vllm.distributed.eplb.eplb_state:compute_logical_maps",
            _logical_maps,
            relies_on=("physical_to_logical_map", "num_logical_experts"),
            why="a loop in Python over all slots makes the pause longer than the transfers of a "
            "small rebalance",
            removable_when="vLLM computes them by array operations",
        ),
    ]
