"""Describe the ranks that experts are placed on."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import PlacementError


@dataclass(frozen=True)
class Topology:
    """Say on which node each EP rank lies and how fast it is.

    Attributes:
        num_ranks: number of EP ranks, at least 1.
        node_of_rank: node index of each rank, ``[num_ranks]``; all on node 0 when left empty.
        speed: relative speed of each rank, ``[num_ranks]``, dimensionless and positive; 1.0 for
            every rank when left empty. A rank of speed 0.5 needs twice the time for a token.
    """

    num_ranks: int
    node_of_rank: tuple[int, ...] = field(default=())
    speed: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise PlacementError(
                f"{self.num_ranks} EP ranks: a topology needs at least 1; give the size of the "
                "expert parallel group"
            )
        nodes = tuple(int(n) for n in self.node_of_rank) or (0,) * self.num_ranks
        speed = tuple(float(s) for s in self.speed) or (1.0,) * self.num_ranks
        for name, values in (("node_of_rank", nodes), ("speed", speed)):
            if len(values) != self.num_ranks:
                raise PlacementError(
                    f"{name} has {len(values)} entries for {self.num_ranks} EP ranks: give one per "
                    "rank"
                )
        if min(nodes) < 0:
            raise PlacementError(f"node {min(nodes)} in node_of_rank: nodes are numbered from 0")
        if not all(0 < s < float("inf") for s in speed):
            raise PlacementError(
                f"speed {speed}: every rank needs a positive, finite relative speed; "
                "to leave a rank out give it no slots instead"
            )
        object.__setattr__(self, "node_of_rank", nodes)
        object.__setattr__(self, "speed", speed)

    @property
    def num_nodes(self) -> int:
        """Count the distinct nodes."""
        return len(set(self.node_of_rank))

    @classmethod
    def even(cls, num_ranks: int, num_nodes: int = 1) -> Topology:
        """Spread ``num_ranks`` equal ranks over ``num_nodes`` nodes, consecutive ranks together.

        Raises:
            PlacementError: if the ranks do not divide evenly over the nodes.
        """
        if num_nodes < 1 or num_ranks % num_nodes:
            raise PlacementError(
                f"{num_ranks} ranks on {num_nodes} nodes: every node needs the same number of "
                "ranks; for other clusters give node_of_rank"
            )
        per_node = num_ranks // num_nodes
        return cls(num_ranks, tuple(r // per_node for r in range(num_ranks)))
