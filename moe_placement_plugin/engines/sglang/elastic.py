"""Find out who is left of the ranks under SGLang's elastic EP."""

from __future__ import annotations

from ...core.errors import PlacementError
from .state import plan_here


def live_ranks() -> tuple[int, ...] | None:
    """Return the EP ranks that SGLang counts as alive; None while all are.

    None also without elastic EP.

    Raises:
        PlacementError: when this rank is not among them.
    """
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    plan, state = plan_here(), ElasticEPStateManager.instance()
    if state is None or plan is None:
        return None
    ranks = plan.num_ranks
    alive = tuple(rank for rank, up in enumerate(state.active_ranks_cpu[:ranks].tolist()) if up)
    if len(alive) == ranks:
        return None
    if own_rank() not in alive:
        raise PlacementError(
            f"EP rank {own_rank()} counts as dead on itself, alive are {list(alive)}: stop this "
            "rank"
        )
    return alive


def own_rank() -> int:
    """Return this process's EP rank."""
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    return get_moe_ep_group().rank_in_group


def may_lose_ranks() -> bool:
    """Tell whether this server is to go on when ranks die.

    No check may then wait for all of them.
    """
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    return ElasticEPStateManager.instance() is not None
