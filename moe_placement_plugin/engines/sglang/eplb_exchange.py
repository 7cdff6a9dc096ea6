"""Carry out `ExpertLocationUpdater.update`: from live ranks, lost experts from disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...rebalancing.exchanger import ExchangeLimits, Exchanger, RankFacts, connect
from ...rebalancing.rebalancer import policy_from
from ..common import options
from ..common.settings import Settings
from . import elastic, expert_reader
from .hook_registry import Hook
from .layers import expert_layers
from .state import STATE, Eplb, placing

logger = logging.getLogger(__name__)


def gather_rank_facts(settings: Settings, model: Any) -> None:
    """Learn of the other ranks what an exchange needs; a collective call.

    All ranks are there while the model has just been loaded.

    Args:
        settings: the engine's.
        model: that was loaded.
    """
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    group = get_moe_ep_group()
    policy = policy_from(settings.rebalancing.rules, options.REBALANCE.flag)
    facts = RankFacts.gather(group.cpu_group, settings.rebalancing.elastic)
    STATE.eplb = Eplb(facts, model, policy)
    connect(group.device_group, next(model.parameters()).device)


def loaded() -> Eplb:
    """Return what is known since the model was loaded.

    Raises:
        PlacementError: when it was not.
    """
    if STATE.eplb is None or placing() is None:
        raise PlacementError(
            "experts are to move before the model has been loaded: this start of SGLang is not "
            "understood"
        )
    return STATE.eplb


def update(
    original: Callable,
    self: Any,
    routed_experts_weights_of_layer: Any,
    new_expert_location_metadata: Any,
    update_layer_ids: Collection[int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Carry `ExpertLocationUpdater.update` out by our exchange.

    The layers that change, from live ranks; what none of them holds, from the checkpoint.

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
    eplb = loaded()
    exchanger = exchanger_of(eplb, routed_experts_weights_of_layer, in_force)
    layers = list(update_layer_ids)
    old, new = (m.physical_to_logical_map_cpu.numpy()[layers] for m in (in_force, goal))
    rebalance = eplb.rebalance
    weighed = None if rebalance is None else rebalance.exchange
    exchange = exchanger.plan(old, new, layers, elastic.live_ranks(), weighed)
    watchdog = None
    if rebalance is not None:
        rebalance.moved += [exchange.new.layer_ids[row] for row in exchange.changed_rows]
        rebalance.waits_for("transfers", changed)
        watchdog = rebalance.watchdog
    reader = _reader(eplb, routed_experts_weights_of_layer) if len(exchange.reads) else None
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
    """Tell whether slots or replicas to use differ; a table of fewer replicas may be narrower."""
    if not old.physical_to_logical_map_cpu[layer].equal(new.physical_to_logical_map_cpu[layer]):
        return True
    a, b = (m.logical_to_all_physical_map_cpu[layer].numpy() for m in (old, new))
    width = max(a.shape[-1], b.shape[-1])
    a, b = (np.pad(t, ((0, 0), (0, width - t.shape[-1])), constant_values=-1) for t in (a, b))
    return not np.array_equal(np.sort(a, axis=-1), np.sort(b, axis=-1))


def exchanger_of(eplb: Eplb, weights: Any, in_force: Any) -> Exchanger:
    """Return this rank's exchanger, made anew where an update may have replaced weights.

    Args:
        eplb: of this process.
        weights: SGLang's list, layer -> tensors.
        in_force: SGLang's metadata.
    """
    generation = STATE.generation
    if eplb.exchanger is not None and eplb.viewed == generation:
        return eplb.exchanger
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    limits = ExchangeLimits.of(eplb.policy)
    tensors = current_tensors(weights, eplb.model)
    first = next(iter(tensors.values()))[0]
    group = get_moe_ep_group()
    found = Exchanger(
        tensors,
        in_force.num_logical_experts,
        group.cpu_group if first.device.type == "cpu" else group.device_group,
        eplb.facts,
        # Its epochs begin anew: no key of the one before may be taken for its own.
        f"sglang/{generation}",
        logger,
        limits,
    )
    if limits.peer_memory and eplb.facts.stores is None:  # where ranks may die some may have
        found.look_at_peers(group.cpu_group)
    eplb.exchanger, eplb.viewed, eplb.reader = found, generation, None
    return found


def current_tensors(weights: Any, model: Any) -> dict[int, list[Any]]:
    """Return the tensors to move, by layer, as they are now.

    SGLang's list keeps those of the start, which an update may have replaced.

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
                f"layer {number}: an update has replaced weights by others of another shape, which "
                "cannot be moved: serve without --enable-eplb, or restart the server with the new "
                "weights"
            )
        found[number] = now
    return found


def slot_tensors(layer: Any) -> list[Any]:
    """Return the parameters of a ``FusedMoE`` with a row for each slot, as SGLang's models do."""
    from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert

    slots = layer.num_local_experts
    return [
        p.data
        for name, p in layer.named_parameters()
        if name != "correction_bias" and filter_moe_weight_param_global_expert(name, p, slots)
    ]


def _reader(eplb: Eplb, weights: Any) -> expert_reader.EngineReader:
    if eplb.reader is None:
        tensors = current_tensors(weights, eplb.model)
        eplb.reader = expert_reader.EngineReader(eplb.model, tensors)
    return eplb.reader


def exchange_hooks() -> list[Hook]:
    """Return the hook that puts our exchange under SGLang's updater."""
    return [
        Hook(
            name="eplb-update",
            target="sglang.srt.eplb.expert_location_updater:ExpertLocationUpdater.update",
            hook=update,
            relies_on=(
                "routed_experts_weights_of_layer",
                "new_expert_location_metadata",
                "update_layer_ids",
            ),
            why="layers that stay are worked through, all is staged in a buffer of a whole layer, "
            "a rank that dies leaves a mix, and an expert whose chosen sender is dead goes to disk "
            "though a live rank holds it, with a full reload for all models but DeepSeek",
            upstream="SGLang #12068, #8345",
            removable_when="the updater takes executors from plugins",
        )
    ]
