"""Begin with our placement under vLLM's EPLB (``--enable-eplb``), and watch and check it.

vLLM numbers physical experts in contiguous blocks per rank and keeps a table from physical to
logical ones, which begins with the same row in every layer. A placement therefore changes no expert
map here: after the model has been registered, its weights are moved once from vLLM's first table to
ours.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.placement import Placement
from ...exchange.watchdog import WaitingFor, Watchdog
from ...rebalancing.exchanger import ExchangeLimits
from ...rebalancing.policy import RebalancePolicy
from ...rebalancing.rebalance import Rebalance, other_ranks
from ...rebalancing.rebalancer import Rebalancer, policy_from
from ...rebalancing.tables import warm_up
from ..common import options
from ..common.patching import Patch
from ..common.settings import Settings
from . import (
    eplb_async,
    eplb_exchange,
    eplb_phases,
    eplb_replicas,
    kernel_configs,
    reload,
    verification,
)
from .eplb_policy import planner_policy, ranks_that_count_a_token
from .eplb_support import check_slots
from .expert_maps import knows
from .hosts import real_topology
from .kernels import ALL2ALL_WITH_MAP
from .layers import EPLB_ROW, layer_id_of, num_logical, routed_layers
from .state import STATE, Eplb, EplbModel, Progress, settings_of

logger = logging.getLogger("vllm.moe_placement_plugin")

_STATE = "vllm.distributed.eplb.eplb_state"


def _add_model(original):
    def add_model(self, model, model_config, *args, **kwargs):
        from vllm.config import get_current_vllm_config_or_none

        known = set(self.model_states)
        original(self, model, model_config, *args, **kwargs)
        config = get_current_vllm_config_or_none()
        settings = STATE.settings if config is None else settings_of(config)
        if settings is None or not settings.rebalancing.moves:
            return
        rules = policy_from(settings.rebalancing.rules, options.REBALANCE.flag)
        eplb = STATE.eplb_of(self)
        if eplb is None:
            eplb = STATE.eplb = Eplb(self, rules.watchdog, ExchangeLimits.of(rules))
        for key, state in self.model_states.items():
            if key not in known:
                _begin(eplb, state, settings, rules)

    return add_model


def _begin(eplb: Eplb, state: Any, settings: Settings, rules: RebalancePolicy) -> None:
    layers = routed_layers(state.model)
    if len(layers) != state.physical_to_logical_map.shape[0]:
        raise PlacementError(
            f"EPLB moves {state.physical_to_logical_map.shape[0]} layers, the model has "
            f"{len(layers)} MoE layers: it is not known which are which; leave --enable-eplb or "
            "the placement flag out"
        )
    for row, layer in enumerate(layers.values()):
        object.__setattr__(layer, EPLB_ROW, (state, row))
    model = eplb_exchange.adopt(eplb, state)
    if settings.strategy == "eplb":
        model.rebalancer = _rebalancer_of(model, layers, rules)
        model.counted_by = ranks_that_count_a_token(state.model)
        eplb.owner.policy = planner_policy(eplb)
    warm_up(
        state.physical_to_logical_map.cpu().numpy(),
        state.logical_replica_count.shape[1],
        _num_ranks(layers),
        settings.strategy == "eplb",
    )
    _place(eplb, state, settings, layers)
    eplb_exchange.reserve_staging(eplb, model)


def _rebalancer_of(model: EplbModel, layers: dict[str, Any], rules: RebalancePolicy) -> Rebalancer:
    """Make what plans and decides for a model."""
    exchanger = model.exchanger
    if exchanger is None:
        sizes = [
            sum(w[0].numel() * w.element_size() for w in weights)
            for weights in model.state.model.expert_weights
        ]
        topology = real_topology()
    else:
        sizes, topology = list(exchanger.expert_bytes.values()), exchanger.topology
    gathers = _every_rank_gets_all_tokens(layers)
    return Rebalancer(rules, range(len(layers)), sizes, logger, topology, gathers)


def _every_rank_gets_all_tokens(layers: dict[str, Any]) -> bool:
    """Tell whether every rank gets all tokens of a step."""
    parallel = next(iter(layers.values())).moe_config.moe_parallel_config
    return not parallel.use_all2all_kernels or parallel.all2all_backend in ALL2ALL_WITH_MAP


def _num_ranks(layers: dict[str, Any]) -> int:
    return next(iter(layers.values())).expert_map_manager.ep_size


def _place(eplb: Eplb, state: Any, settings: Settings, layers: dict[str, Any]) -> None:
    """Begin with the placement, if there is one for this model."""
    placement = settings.plan
    if placement is None:
        return
    if not all(
        knows(placement, layer_id_of(name), num_logical(layer)) for name, layer in layers.items()
    ):
        logger.info(
            "moe_placement_plugin: %s is not in the placement (a draft model): EPLB begins with "
            "its own there",
            state.model_name,
        )
        return
    check_slots(state, placement)
    ids = [layer_id_of(name) for name in layers]
    rows = [placement.row(layer_id) for layer_id in ids if layer_id is not None]  # all are known
    _move(state, placement, rows)
    logger.info(
        "moe_placement_plugin: EPLB begins with placement %s (%s), policy %s",
        placement.digest[:12],
        placement.strategy,
        eplb.owner.policy.__name__,
    )


def _move(state: Any, placement: Placement, rows: list[int]) -> None:
    """Move from vLLM's first table to ``placement``, and prove that every expert arrived."""
    import torch
    from vllm.distributed.eplb import eplb_state
    from vllm.distributed.parallel_state import get_ep_group

    old = _copy_of_map(state)
    table = torch.from_numpy(placement.physical_to_logical[rows].astype(np.int64))
    eplb_state.rearrange_expert_weights_inplace(
        state.physical_to_logical_map,
        table,
        state.model.expert_weights,
        state.expert_buffer,
        get_ep_group().device_group,
        state.communicator,
    )
    eplb_state._commit_eplb_maps(state, new_physical_to_logical_map=table)
    _check(state, old)


def _copy_of_map(state: Any) -> Any:
    """Return int ``[layers, physical experts]`` on the host; a copy, as maps change in place."""
    return state.physical_to_logical_map.to("cpu", copy=True)


def _check(state: Any, old: Any) -> None:
    """Verify the layers whose table has changed.

    Args:
        state: vLLM's ``EplbModelState``.
        old: the table before, int ``[layers, physical experts]`` on the host.
    """
    rows = (old != state.physical_to_logical_map.cpu()).any(dim=1).nonzero().flatten().tolist()
    if rows and verification.is_verified(state.model):
        began = time.perf_counter()
        slots = verification.check_again(
            state.model, "expert weights were damaged by an exchange", rows=rows
        )
        logger.info(
            "moe_placement_plugin: verified %d slots after the exchange in %.3f s",
            slots,
            time.perf_counter() - began,
        )


def _rearrange(original):
    def rearrange(self, is_profile=False, *args, **kwargs):
        eplb = STATE.eplb_of(self)
        if eplb is None:
            return original(self, is_profile, *args, **kwargs)
        if not is_profile and not reload.may_rearrange(self, STATE.settings):
            return None
        checked = eplb.models if not is_profile and not self.is_async else []
        old = [_copy_of_map(model.state) for model in checked]
        with Watchdog(eplb.watchdog, report=logger.warning) as watchdog:
            _begin_rebalance(eplb, watchdog, is_profile)
            try:
                result = original(self, is_profile, *args, **kwargs)
            finally:
                if not self.is_async:  # else it is the thread's that moves experts from now on
                    _end_rebalance(eplb)
            for model, before in zip(checked, old):
                _check(model.state, before)
        return result

    return rearrange


def _begin_rebalance(eplb: Eplb, watchdog: Watchdog, is_profile: bool) -> None:
    """Make the rebalance of each model; a collective call unless nothing is to move."""
    from vllm.distributed.parallel_state import get_ep_group

    peers = other_ranks(get_ep_group())
    layers = range(sum(state.model.num_moe_layers for state in eplb.owner.model_states.values()))
    watchdog.waits_for(
        WaitingFor("rearrange and all-reduce of the load", tuple(layers), peers=peers)
    )
    if is_profile:
        _end_rebalance(eplb)
        return
    for model in eplb.models:
        model.rebalance = Rebalance(watchdog, peers, model.rebalancer)
    if any(model.rebalancer is not None for model in eplb.models):
        for model, load in zip(eplb.models, eplb_phases.loads_by_phase(eplb)):
            assert model.rebalance is not None, "made above"
            model.rebalance.phases = load


def _end_rebalance(eplb: Eplb) -> None:
    for model in eplb.models:
        model.rebalance = None


def _move_to_workspace(original):
    def _move_to_workspace(model_state, *args, **kwargs):
        row = model_state.pending_result.layer_idx
        old = _copy_of_map(model_state) if verification.is_verified(model_state.model) else None
        result = original(model_state, *args, **kwargs)
        if old is not None and not old[row].equal(model_state.physical_to_logical_map[row].cpu()):
            _check(model_state, old)
        return result

    return _move_to_workspace


def _step(original):
    def step(self, is_dummy=False, is_profile=False, log_stats=False, **kwargs):
        eplb = STATE.eplb_of(self)
        if eplb is not None and not is_profile:
            eplb_phases.note_recorded(eplb, is_dummy, log_stats)
        result = original(self, is_dummy, is_profile, log_stats, **kwargs)
        if eplb is not None and self.is_async:
            for model in eplb.models:
                _report_stalled(model, eplb.watchdog)
        return result

    return step


def _report_stalled(model: EplbModel, limit: float) -> None:
    """Say what an async rebalance waits for that makes no progress (vLLM issue 57883).

    Args:
        model: which is rebalanced.
        limit: seconds without progress.
    """
    rebalanced, pending = model.state.rebalanced, model.state.pending_result
    layer = None if pending is None else pending.layer_idx
    now = time.monotonic()
    if model.progress is None or not rebalanced or model.progress.at != (rebalanced, layer):
        model.progress = Progress(now)
    progress = model.progress
    if rebalanced and now - progress.since > limit * (progress.reported + 1):
        progress.reported += 1
        what = (
            "the background transfer of this rank's next layer"
            if layer is None
            else f"other EP ranks to receive layer {layer}, which this rank has"
        )
        logger.warning(
            "moe_placement_plugin: async rebalance without progress for %.0f s; waiting for: %s",
            now - progress.since,
            what,
        )
    progress.at = (rebalanced, layer)


def eplb_patches() -> list[Patch]:
    """Return the patches of a server with a placement and ``--enable-eplb``."""
    return [
        Patch(
            "eplb-begin",
            f"{_STATE}:EplbState.add_model",
            _add_model,
            relies_on=("model", "model_config"),
            why="EPLB begins with one row for all layers and takes no placement; its policies are "
            "a closed list",
            upstream="vLLM issues 34297, 24069, 37656",
            removable_when="EPLB takes a first placement and policies from plugins",
        ),
        Patch(
            "eplb-verify",
            f"{_STATE}:EplbState.rearrange",
            _rearrange,
            relies_on=("is_profile",),
            why="an exchange that left a slot with the wrong weights is served without a word",
            upstream="vLLM issue 55228",
            removable_when="never: it is this plugin's own check",
        ),
        Patch(
            "eplb-verify-async",
            f"{_STATE}:_move_to_workspace",
            _move_to_workspace,
            relies_on=("model_state",),
            why="the same for the layers that async EPLB commits one by one",
            removable_when="never: it is this plugin's own check",
        ),
        Patch(
            "eplb-watchdog",
            f"{_STATE}:EplbState.step",
            _step,
            relies_on=("is_dummy", "is_profile", "log_stats"),
            why="an async rebalance that hangs is never reported",
            upstream="vLLM issue 57883",
            removable_when="vLLM reports an exchange that does not finish",
        ),
        *eplb_replicas.weight_patches(),
        *eplb_exchange.exchange_patches(),
        *eplb_async.async_patches(),
        *eplb_phases.phase_patches(),
        *kernel_configs.tuned_patches(),
    ]
