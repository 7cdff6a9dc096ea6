"""Under vLLM's EPLB (``--enable-eplb``): our placement to begin with, our planner to rebalance, our exchange, and a check of what moved.

vLLM numbers physical experts in contiguous blocks per rank and keeps a table from physical to logical ones, which begins
with the same row in every layer. A placement therefore changes no expert map here: after the model has been registered,
its weights are moved once from vLLM's first table to ours.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.load import ExpertLoad
from ...core.placement import Placement
from ...exchange.watchdog import WaitingFor, Watchdog
from ...rebalancing.rebalancer import REBALANCE_FLAG, Rebalancer, policy_from
from ..common.patching import Patch
from ..common.settings import Settings
from . import eplb_exchange, eplb_phases, eplb_replicas, kernel_configs, reload, verification
from .eplb_support import check_slots
from .expert_maps import knows
from .hosts import real_topology
from .kernels import ALL2ALL_WITH_MAP
from .layers import EPLB_ROW, layer_id_of, num_logical, routed_layers
from .state import STATE, settings_of

logger = logging.getLogger("vllm.moe_placement_plugin")

_STATE = "vllm.distributed.eplb.eplb_state"
_PROGRESS = "_moe_placement_progress"
_WATCHDOG = (
    "_moe_placement_watchdog"  # seconds; only an EplbState of a server with our settings has it
)
_REBALANCERS = "_moe_placement_rebalancers"


def _add_model(original):
    def add_model(self, model, model_config, *args, **kwargs):
        from vllm.config import get_current_vllm_config_or_none

        known = set(self.model_states)
        original(self, model, model_config, *args, **kwargs)
        config = get_current_vllm_config_or_none()
        settings = STATE.settings if config is None else settings_of(config)
        if settings is None or not settings.rebalancing.moves:
            return
        self.__dict__[_WATCHDOG] = policy_from(settings.rebalancing.rules, REBALANCE_FLAG).watchdog
        self.__dict__.setdefault(_REBALANCERS, {})
        for key, state in self.model_states.items():
            if key not in known:
                _begin(self, state, settings)

    return add_model


def _begin(eplb: Any, state: Any, settings: Settings) -> None:
    layers = routed_layers(state.model)
    if len(layers) != state.physical_to_logical_map.shape[0]:
        raise PlacementError(
            f"EPLB moves {state.physical_to_logical_map.shape[0]} layers, the model has {len(layers)} MoE layers: it is not known "
            "which are which; leave --enable-eplb or the placement flag out"
        )
    for row, layer in enumerate(layers.values()):
        object.__setattr__(layer, EPLB_ROW, (state, row))
    rules = policy_from(settings.rebalancing.rules, REBALANCE_FLAG)
    exchanger = eplb_exchange.adopt(
        eplb, state, rules.staging_bytes, max(60.0, 2 * rules.watchdog), rules.peer_memory
    )
    if settings.strategy == "eplb":
        if exchanger is None:
            sizes = [
                sum(w[0].numel() * w.element_size() for w in weights)
                for weights in state.model.expert_weights
            ]
        else:
            sizes = list(exchanger.expert_bytes.values())
        # vLLM has one policy for the model and its draft, and hands it nothing but their loads: told apart by shape.
        shape = (len(layers), state.logical_replica_count.shape[1])
        rebalancers = eplb.__dict__[_REBALANCERS]
        topology = real_topology() if exchanger is None else exchanger.topology
        rebalancers[shape] = Rebalancer(
            rules, range(len(layers)), sizes, logger, topology, _gathers(layers)
        )
        rebalancers[shape].counted_by = counted_by(state.model)
        eplb.policy = planner_policy(rebalancers)
    from ...rebalancing.tables import warm_up  # lazy: numba

    warm_up(
        state.physical_to_logical_map.cpu().numpy(),
        state.logical_replica_count.shape[1],
        _num_ranks(layers),
        settings.strategy == "eplb",
    )
    _place(eplb, state, settings, layers)
    eplb_exchange.settle(eplb, state)


def _gathers(layers: dict[str, Any]) -> bool:
    """Whether every rank gets all tokens of a step."""
    parallel = next(iter(layers.values())).moe_config.moe_parallel_config
    return not parallel.use_all2all_kernels or parallel.all2all_backend in ALL2ALL_WITH_MAP


def _num_ranks(layers: dict[str, Any]) -> int:
    return next(iter(layers.values())).expert_map_manager.ep_size


def _place(eplb: Any, state: Any, settings: Settings, layers: dict[str, Any]) -> None:
    placement = settings.plan
    if placement is None:
        return
    if not all(
        knows(placement, layer_id_of(name), num_logical(layer)) for name, layer in layers.items()
    ):
        logger.info(
            "moe_placement_plugin: %s is not in the placement (a draft model): EPLB begins with its own there",
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
        eplb.policy.__name__,
    )


def _move(state: Any, placement: Placement, rows: list[int]) -> None:
    """From vLLM's first table to ``placement``, and prove that every expert arrived."""
    import torch
    from vllm.distributed.eplb import eplb_state
    from vllm.distributed.parallel_state import get_ep_group

    old = _copy_of_map(state)
    table = torch.from_numpy(placement.physical_to_logical[rows].astype(np.int64))
    eplb_state.rearrange_expert_weights_inplace(
        state.physical_to_logical_map, table, state.model.expert_weights, state.expert_buffer, get_ep_group().device_group,
        state.communicator,
    )  # fmt: skip
    eplb_state._commit_eplb_maps(state, new_physical_to_logical_map=table)
    _check(state, old)


def _copy_of_map(state: Any) -> Any:
    """int ``[layers, physical experts]`` on the host; a copy there too, since maps are changed in place."""
    return state.physical_to_logical_map.to("cpu", copy=True)


def _check(state: Any, old: Any) -> None:
    """Verify the layers whose table is not ``old`` any more, int ``[layers, physical experts]`` on the host."""
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


def planner_policy(rebalancers: dict[tuple[int, int], Rebalancer]) -> type:
    """Our planner as a policy of vLLM's EPLB, for its sync and its async mode.

    Args:
        rebalancers: (layers, logical experts) of a model -> what plans and decides for it; every rank has its own and they agree,
            since all see the same load.
    """
    from vllm.distributed.eplb.policy import AbstractEplbPolicy

    class PlannerPolicy(AbstractEplbPolicy):
        """Few moves from the placement in force to a balanced one, if they pay."""

        @classmethod
        def rebalance_experts(
            cls,
            weight,
            num_replicas,
            num_groups,
            num_nodes,
            num_ranks,
            old_global_expert_indices=None,
        ):
            import torch

            from .eplb_policy import (  # lazy: numba
                rebalance_experts,  # compiles kernels, and numba must not be loaded before a worker has begun
            )

            whole = (
                old_global_expert_indices is not None
                and old_global_expert_indices.shape[1] == num_replicas
            )
            if not whole or not bool((old_global_expert_indices >= 0).all()):  # ranks come or go
                return rebalance_experts(
                    weight,
                    num_replicas,
                    num_groups,
                    num_nodes,
                    num_ranks,
                    old_global_expert_indices,
                )
            old = old_global_expert_indices.cpu().numpy()
            rebalancer = rebalancers.get(tuple(weight.shape))
            if rebalancer is None:
                return old_global_expert_indices.clone()
            counts = weight.detach().to("cpu", torch.float64).numpy()
            if not counts.any():
                return old_global_expert_indices.clone()
            load = _by_phase(rebalancer, counts)
            table, _ = rebalancer.propose(load, old, num_ranks, num_groups, num_nodes)
            return torch.from_numpy(table.astype(np.int64))

    return PlannerPolicy


def _by_phase(rebalancer: Rebalancer, counts: np.ndarray) -> ExpertLoad:
    """The load of each phase if that is what vLLM has added up to ``counts`` [layers, experts], else just that."""
    of_phases, rebalancer.phases = rebalancer.phases, None
    ranks = rebalancer.counted_by
    if of_phases is None or not np.array_equal(of_phases.sum(axis=0), counts):
        return ExpertLoad(counts[None] / ranks, rebalancer.layer_ids)
    seen = np.flatnonzero(of_phases.any(axis=(1, 2)))
    return ExpertLoad(
        of_phases[seen] / ranks,
        rebalancer.layer_ids,
        tuple(eplb_phases.PHASES[phase] for phase in seen),
    )


def counted_by(model: Any) -> int:
    """Ranks whose routers see the same token: vLLM's EPLB adds up what all of them have counted.

    The tensor parallel ones, unless sequence parallelism gives each of them a share of the tokens; and those among which tokens are
    gathered before they are routed: data parallel ranks with kernels that dispatch nothing, context parallel ones.

    Args:
        model: with vLLM's ``MoERunner`` in its MoE layers.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    runner = next((m for m in model.modules() if isinstance(m, MoERunner)), None)
    if runner is None:
        return 1
    parallel = runner.moe_config.moe_parallel_config
    data, context = parallel.dp_size, getattr(parallel, "pcp_size", 1)
    if runner.moe_config.is_sequence_parallel:
        return parallel.ep_size if runner.do_naive_dispatch_combine else 1
    ranks = max(1, parallel.ep_size // (data * context))
    if runner.do_naive_dispatch_combine:
        ranks *= data
    return ranks if parallel.use_all2all_kernels else ranks * context


def _note_phases(eplb: Any) -> None:
    rebalancers = eplb.__dict__.get(_REBALANCERS)
    if not rebalancers:
        return
    states = list(eplb.model_states.values())
    for state, load in zip(states, eplb_phases.loads(eplb, states)):
        rebalancer = rebalancers.get(tuple(state.logical_replica_count.shape))
        if rebalancer is not None:
            rebalancer.phases = load


def _rearrange(original):
    def rearrange(self, is_profile=False, *args, **kwargs):
        limit = getattr(self, _WATCHDOG, None)
        if limit is None:
            return original(self, is_profile, *args, **kwargs)
        if not is_profile and not reload.may_rearrange(self, STATE.settings):
            return None
        watched = not is_profile and not self.is_async
        states = list(self.model_states.values()) if watched else []
        old = [_copy_of_map(state) for state in states]
        with Watchdog(limit, report=logger.warning) as watchdog:
            layers = tuple(
                range(sum(state.model.num_moe_layers for state in self.model_states.values()))
            )
            watchdog.waits_for(
                WaitingFor("rearrange and all-reduce of the load", layers, peers=_others())
            )
            if not is_profile:
                _note_phases(self)
            eplb_exchange.watched(watchdog)
            try:
                result = original(self, is_profile, *args, **kwargs)
            finally:
                eplb_exchange.watched(None)
            for state, before in zip(states, old):
                _check(state, before)
        return result

    return rearrange


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
        limit = getattr(self, _WATCHDOG, None)
        if limit is not None and not is_profile:
            eplb_phases.recorded(self, is_dummy, log_stats)
        result = original(self, is_dummy, is_profile, log_stats, **kwargs)
        if limit is not None and self.is_async:
            for state in self.model_states.values():
                _report_stalled(state, limit)
        return result

    return step


def _report_stalled(state: Any, limit: float) -> None:
    """Say what an async rebalance waits for when it has made no progress for too long (vLLM issue 57883)."""
    pending = state.pending_result
    layer = None if pending is None else pending.layer_idx
    now = time.monotonic()
    since, seen, reported = getattr(state, _PROGRESS, (now, None, 0))
    if not state.rebalanced or seen != (state.rebalanced, layer):
        since, reported = now, 0
    if state.rebalanced and now - since > limit * (reported + 1):
        reported += 1
        what = (
            "the background transfer of this rank's next layer"
            if layer is None
            else f"other EP ranks to receive layer {layer}, which this rank has"
        )
        logger.warning(
            "moe_placement_plugin: async rebalance without progress for %.0f s; waiting for: %s",
            now - since,
            what,
        )
    setattr(state, _PROGRESS, (since, (state.rebalanced, layer), reported))


def _others() -> tuple[int, ...]:
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group()
    return tuple(rank for rank in range(group.world_size) if rank != group.rank_in_group)


def eplb_patches() -> list[Patch]:
    """The patches of a server with a placement and ``--enable-eplb``."""
    return [
        Patch(
            "eplb-begin",
            f"{_STATE}:EplbState.add_model",
            _add_model,
            relies_on=("model", "model_config"),
            why="EPLB begins with one row for all layers and takes no placement; its policies are a closed list",
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
        *eplb_phases.phase_patches(),
        *kernel_configs.tuned_patches(),
    ]
