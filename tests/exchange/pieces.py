"""Something that happens at a chosen moment of an exchange, told by how much of its work is done and not by a clock."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_placement_plugin.exchange.agreement import Agreement
from moe_placement_plugin.exchange.attached import Process


class Pieces:
    """Counts this process's pieces of work in exchanges: a store call, a batch, the copy of tensors. One in each process."""

    def __init__(self) -> None:
        self.seen = self._event = 0
        self._act: Callable[[], object] = lambda: None
        Agreement._ask = self._counted(Agreement._ask)
        dist.batch_isend_irecv = self._counted(dist.batch_isend_irecv)
        torch.Tensor.copy_ = self._counted(torch.Tensor.copy_)
        torch._foreach_copy_ = self._counted(torch._foreach_copy_)
        Process.read = self._counted(Process.read)

    def before(self, event: int, act: Callable[[], object]) -> None:
        """Call ``act`` before the ``event``-th piece from now on (the first is 1)."""
        self.seen, self._event, self._act = 0, event, act

    def _counted(self, call):
        def wrapper(*args, **kwargs):
            self.seen += 1
            if self.seen == self._event:
                self._act()
            return call(*args, **kwargs)

        return wrapper
