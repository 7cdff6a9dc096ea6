"""Keep memory that experts wait in until all ranks agree, and what is on its way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .expert_memory import Parameter
from .watchdog import WaitingFor

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

BATCH_BYTES = 64 << 20
"""What a rank sends in a batch of rounds: beside it, a launch and a handshake are of no account."""


@dataclass
class Memory:
    """Say what an exchange may take of a rank's memory, and how it is cut to fit.

    Attributes:
        staging_bytes: bound on the memory that experts are received in; None receives all layers at
            once. It must hold what the busiest rank takes in of one layer. Messages are packed in
            memory for two batches besides (`packing_bytes`). The same on all ranks.
        max_layers: most layers of a chunk. The same on all ranks.
        batch_bytes: rounds of transfers are put together until each holds this much, or half of
            ``staging_bytes``. The same on all ranks.
        double: where two layers do not fit into ``staging_bytes``, receive one while the other is
            committed nevertheless, in memory that is given back at the end, if the device has
            several times as much free; not where experts are sent between CPUs.
        kept: uint8 memory to stage in, kept from one exchange to the next; an exchange puts other
            memory here where there is none or too little.
    """

    staging_bytes: int | None = None
    max_layers: int | None = None
    batch_bytes: int = BATCH_BYTES
    double: bool = False
    kept: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Return the bytes that a batch must hold at least: little memory, small messages."""
        if self.staging_bytes is None:
            return self.batch_bytes
        return min(self.batch_bytes, max(1, self.staging_bytes // 2))

    def packing_bytes(self, expert_bytes: int) -> int:
        """Return the most memory that a rank's messages are packed in.

        It holds two batches, the last expert of each over its measure.

        Args:
            expert_bytes: of the largest expert, as it is staged.
        """
        return 2 * (self.batch_size + expert_bytes)


@dataclass
class Staged:
    """Hold what a chunk brings to this rank: staged experts and transfers under way.

    Attributes:
        buffer: uint8, staging memory.
        used: bytes of it that are taken.
        sources, targets: what was staged and the slots it goes to, tensor by tensor, in
            `LocalExperts.unit`.
        pending: transfers under way, by what is waited for.
        read: on a GPU, the end of what is read in other ranks' memory.
    """

    buffer: torch.Tensor
    used: int = 0
    sources: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    pending: list[tuple[WaitingFor, list[dist.Work]]] = field(default_factory=list)
    read: torch.Event | None = None

    def take(self, size: int) -> torch.Tensor:
        """Take the next ``size`` bytes of staging memory."""
        self.used += size
        return self.buffer[self.used - size : self.used]

    def take_expert(self, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
        """Take memory for one expert, a row of bytes for each parameter."""
        return [self.take(parameter.padded)[: parameter.bytes] for parameter in parameters]


@dataclass
class Traffic:
    """Count the bytes of experts, without padding, that have moved so far.

    Attributes:
        sent, received: to and from other ranks, whoever copied them.
        read: from the checkpoint.
    """

    sent: int = 0
    received: int = 0
    read: int = 0
