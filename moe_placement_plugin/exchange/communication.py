"""Say how the ranks of an exchange reach each other, and which they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..core.errors import PlacementError
from .plan import ExchangePlan

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class Communication:
    """Say how the ranks of an exchange reach each other.

    Attributes:
        epoch: number of the exchange, equal on all ranks and never used twice with the store.
        group: of all EP ranks, or of the live ones only; the default group when left out. An
            aborted exchange leaves it unusable: give the exchange a group of its own.
        store: for the agreement; the default group's when left out. See `commit` on where it should
            live.
        timeout: seconds that a transfer or a vote may take before the exchange is aborted.
    """

    epoch: int
    group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    timeout: float = 60.0

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Return the group."""
        import torch.distributed as dist

        return dist.group.WORLD if self.group is None else self.group

    @property
    def agreement_store(self) -> dist.Store:
        """Return the store."""
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store() if self.store is None else self.store


class Members(NamedTuple):
    """Hold the process group of an exchange.

    Attributes:
        group: of all EP ranks, or of the live ones.
        global_ranks: live EP rank -> global rank.
    """

    group: dist.ProcessGroup
    global_ranks: Mapping[int, int]


def members_of(plan: ExchangePlan, group: dist.ProcessGroup) -> tuple[int, Members]:
    """Return this EP rank, and all that take part.

    Raises:
        PlacementError: when the group is of other ranks, or this one counts as dead.
    """
    import torch.distributed as dist

    live = plan.live_ranks
    if group.size() == plan.new.num_ranks:
        members = {rank: rank for rank in live}
    elif group.size() == len(live):
        members = dict(zip(live, range(len(live))))
    else:
        raise PlacementError(
            f"a process group of {group.size()} for a plan of {plan.new.num_ranks} EP ranks, "
            f"{len(live)} of them live: give the group of all EP ranks or of the live ones"
        )
    own = [rank for rank, member in members.items() if member == group.rank()]
    if not own:
        raise PlacementError(
            f"this process is EP rank {group.rank()}, which the plan counts as dead: only live "
            f"ranks {list(live)} take part"
        )
    global_ranks = {rank: dist.get_global_rank(group, number) for rank, number in members.items()}
    return own[0], Members(group, global_ranks)
