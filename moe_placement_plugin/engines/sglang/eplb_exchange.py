"""`ExpertLocationUpdater.update` by our exchange: from live ranks, and what none of them holds from the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...exchange.watchdog import WaitingFor, Watchdog
from ...rebalancing.exchanger import Exchanger, Meeting, connect
from ...rebalancing.rebalancer import REBALANCE_FLAG, Rebalancer, policy_from
from ..common.settings import Settings
from . import elastic, expert_reader
from .layers import expert_layers
from .state import STATE, placing

logger = logging.getLogger(__name__)

_EXCHANGER = "_moe_placement_exchanger"  # attribute of the ExpertLocationUpdater

_VIEWED = "_moe_placement_viewed"
"""Attribute of the ExpertLocationUpdater: the generation of weights that its exchanger has views of."""


@dataclass
class Rebalance:
    """One rebalance of this rank, from the dump of the load to the last chunk of layers.

    Attributes:
        watchdog: around everything but the forward passes between two chunks.
        planner: ours, None where SGLang's own algorithm rebalances.
        moved: layers whose slots changed since they were last checked.
    """

    watchdog: Watchdog
    planner: Rebalancer | None
    moved: list[int] = field(default_factory=list)


under_way: Rebalance | None = None


@dataclass
class _Met:
    """What was learned while the model was loaded: of the other ranks, and which model is served."""

    meeting: Meeting
    model: Any
    reader: expert_reader.EngineReader | None = None


def meet(settings: Settings, model: Any) -> None:
    """Learn of the other ranks what an exchange needs, while all of them are there; a collective call."""
    global _met
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    group = get_moe_ep_group()
    _met = _Met(Meeting.of(group.cpu_group, settings.rebalancing.elastic), model)
    connect(group.device_group, next(model.parameters()).device)


_met: _Met | None = None


def update(
    original: Callable,
    self: Any,
    routed_experts_weights_of_layer: Any,
    new_expert_location_metadata: Any,
    update_layer_ids: Collection[int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`ExpertLocationUpdater.update` by our exchange: the layers that change, from live ranks, what none of them holds from the checkpoint.

    Returns:
        SGLang's experts that are missing by layer: none.

    Raises:
        ExchangeAborted: on all live ranks alike, each layer's maps being those of its weights.
        ExchangeLost: when the outcome cannot be known.
        PlacementError: when an expert is not to be had.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    in_force, goal = get_global_expert_location_metadata(), new_expert_location_metadata
    changed = [layer for layer in update_layer_ids if _differs(in_force, goal, layer)]
    if not changed:
        return {}
    exchanger = _exchanger(self, routed_experts_weights_of_layer, in_force)
    old, new = (
        exchanger.placement(m.physical_to_logical_map_cpu.numpy()[changed], changed)
        for m in (in_force, goal)
    )
    exchange = exchanger.plan(old, new, elastic.live_ranks())
    watchdog = None
    if under_way is not None:
        under_way.moved += [exchange.new.layer_ids[row] for row in exchange.changed_rows]
        watchdog = under_way.watchdog
        watchdog.waits_for(WaitingFor("transfers", tuple(changed), peers=others()))
    reader = _reader(routed_experts_weights_of_layer) if len(exchange.reads) else None
    left = set(changed)

    def commit(rows: tuple[int, ...]) -> None:
        layers = [exchange.new.layer_ids[row] for row in rows]
        in_force.update(goal, update_layer_ids=layers)
        left.difference_update(layers)

    if len(exchange.changed_rows):
        exchanger.exchange(exchange, commit, reader, watchdog)
    if left:  # layers in which only replicas on dead ranks are not to be used any more
        in_force.update(goal, update_layer_ids=sorted(left))
    return {}


def _differs(old: Any, new: Any, layer: int) -> bool:
    """Whether slots or replicas to use differ; a table of fewer replicas may be narrower."""
    if not old.physical_to_logical_map_cpu[layer].equal(new.physical_to_logical_map_cpu[layer]):
        return True
    a, b = (m.logical_to_all_physical_map_cpu[layer].numpy() for m in (old, new))
    width = max(a.shape[-1], b.shape[-1])
    a, b = (np.pad(t, ((0, 0), (0, width - t.shape[-1])), constant_values=-1) for t in (a, b))
    return not np.array_equal(np.sort(a, axis=-1), np.sort(b, axis=-1))


def _exchanger(updater: Any, weights: Any, in_force: Any) -> Exchanger:
    made = STATE.generation
    found = getattr(updater, _EXCHANGER, None)
    if found is None or getattr(updater, _VIEWED, made) != made:
        from sglang.srt.distributed.parallel_state import get_moe_ep_group

        settings = placing()
        if _met is None or settings is None:
            raise PlacementError(
                "experts are to move before the model has been loaded: this start of SGLang is not understood"
            )
        policy = policy_from(settings.rebalancing.rules, REBALANCE_FLAG)
        tensors = current_tensors(weights, _met.model)
        first = next(iter(tensors.values()))[0]
        group = get_moe_ep_group()
        found = Exchanger(
            tensors,
            in_force.num_logical_experts,
            group.cpu_group if first.device.type == "cpu" else group.device_group,
            _met.meeting,
            f"sglang/{made}",  # its epochs begin anew: no key of the one before may be taken for its own
            logger,
            policy.staging_bytes,
            max(60.0, 2 * policy.watchdog),
        )
        if policy.peer_memory and _met.meeting.stores is None:  # where ranks may die some may have
            found.look_at_peers(group.cpu_group)
        setattr(updater, _EXCHANGER, found)
        setattr(updater, _VIEWED, made)
        _met.reader = None
    return found


def current_tensors(weights: Any, model: Any) -> dict[int, list[Any]]:
    """The tensors to move, by layer, as they are now: SGLang's list keeps those of the start, which an update may have replaced.

    Args:
        weights: SGLang's list, layer -> tensors.
        model: the model that is served.

    Raises:
        PlacementError: when a tensor was replaced by one of another shape.
    """
    experts = {layer.layer_id: layer for layer in expert_layers(model).values()}
    found = {}
    for number in weights.keys():
        listed = list(weights[number])
        parameters = dict(experts[number].named_parameters()) if number in experts else {}
        live = {(p.data_ptr(), tuple(p.shape)) for p in parameters.values()}
        if not parameters or all((t.data_ptr(), tuple(t.shape)) in live for t in listed):
            found[number] = listed
            continue
        now = slot_tensors(experts[number])
        if [(t.shape, t.dtype) for t in now] != [(t.shape, t.dtype) for t in listed]:
            raise PlacementError(
                f"layer {number}: an update has replaced weights by others of another shape, which cannot be moved: serve "
                "without --enable-eplb, or restart the server with the new weights"
            )
        found[number] = now
    return found


def slot_tensors(layer: Any) -> list[Any]:
    """The parameters of a ``FusedMoE`` that have a row for each slot, as SGLang's models list them."""
    from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert

    slots = layer.num_local_experts
    return [
        p.data
        for name, p in layer.named_parameters()
        if name != "correction_bias" and filter_moe_weight_param_global_expert(name, p, slots)
    ]


def _reader(weights: Any) -> expert_reader.EngineReader:
    assert _met is not None, "an exchanger was made of it"
    if _met.reader is None:
        _met.reader = expert_reader.EngineReader(_met.model, current_tensors(weights, _met.model))
    return _met.reader


def others() -> tuple[int, ...]:
    """The other EP ranks of this group."""
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    group = get_moe_ep_group()
    return tuple(rank for rank in range(group.world_size) if rank != group.rank_in_group)
