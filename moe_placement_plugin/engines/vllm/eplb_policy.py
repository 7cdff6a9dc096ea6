"""Put our planner behind vLLM's EPLB as a policy, for its sync and its async mode."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.load import PHASES, ExpertLoad
from ...rebalancing.exchanger import is_whole
from ...rebalancing.tables import EngineRanks, rebalance_table
from .state import Eplb, EplbModel


def planner_policy(eplb: Eplb) -> type:
    """Return the policy; every rank has its own and they agree, since all see the same load.

    Args:
        eplb: whose models it plans for.
    """
    from vllm.distributed.eplb.policy import AbstractEplbPolicy

    class PlannerPolicy(AbstractEplbPolicy):
        """Move few experts from the placement in force to a balanced one, if that pays."""

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

            counts = weight.detach().to("cpu", torch.float64).numpy()
            ranks = EngineRanks(num_ranks, num_groups, num_nodes)
            old = old_global_expert_indices
            old = None if old is None else old.detach().cpu().numpy()
            if old is None or old.shape[1] != num_replicas or not is_whole(old):
                # Ranks come or go: all is planned anew, whether it pays or not.
                table = rebalance_table(counts, num_replicas, ranks, old)
            else:
                table = propose(eplb, counts, old, ranks)
            return torch.from_numpy(table.astype(np.int64))

    return PlannerPolicy


def propose(eplb: Eplb, counts: np.ndarray, old: np.ndarray, ranks: EngineRanks) -> np.ndarray:
    """Return the table to serve a model with: the one in force, or a better one that pays.

    Args:
        eplb: of this process.
        counts: float64 ``[layers, experts]``, what vLLM has added up of the model.
        old: int ``[layers, physical experts]``, the table in force.
        ranks: as vLLM describes them.
    """
    model = eplb.planned_by_us(counts.shape)
    if model is None or model.rebalance is None or not counts.any():
        return old
    return model.rebalance.propose(load_by_phase(model, counts), old, ranks)


def load_by_phase(model: EplbModel, counts: np.ndarray) -> ExpertLoad:
    """Return the load of each phase if it adds up to ``counts``, else just that.

    Args:
        model: with a rebalance under way.
        counts: float64 ``[layers, experts]``, what vLLM has added up.
    """
    assert model.rebalance is not None and model.rebalancer is not None, "we plan for it"
    phases, layer_ids = model.rebalance.phases, model.rebalancer.layer_ids
    if phases is None or not np.array_equal(phases.sum(axis=0), counts):
        return ExpertLoad(counts[None] / model.counted_by, layer_ids)
    seen = np.flatnonzero(phases.any(axis=(1, 2)))
    names = tuple(PHASES[phase] for phase in seen)
    return ExpertLoad(phases[seen] / model.counted_by, layer_ids, names)


def ranks_that_count_a_token(model: Any) -> int:
    """Return how many ranks' routers see the same token: vLLM's EPLB adds up what all have counted.

    The tensor parallel ones, unless sequence parallelism gives each of them a share of the tokens;
    and those among which tokens are gathered before they are routed: data parallel ranks with
    kernels that dispatch nothing, context parallel ones.

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
