"""Have something happen at a chosen moment of an exchange.

The moment is told by how much of the exchange's work is done, and not by a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from moe_placement_plugin.exchange.commit import Agreement
from moe_placement_plugin.exchange.cross_memory import Process

Result = TypeVar("Result")


class Pieces:
    """Counts this process's pieces of work in exchanges.

    A store call, a batch, the copy of tensors. One in each process.
    """

    def __init__(self) -> None:
        self._seen = self._all = self._event = 0
        self._act: Callable[[], object] = lambda: None
        Agreement._ask = self._counted(Agreement._ask)
        dist.batch_isend_irecv = self._counted(dist.batch_isend_irecv)
        torch.Tensor.copy_ = self._counted(torch.Tensor.copy_)
        torch._foreach_copy_ = self._counted(torch._foreach_copy_)
        Process.read = self._counted(Process.read)

    def count(self, run: Callable[[], Result]) -> Result:
        """Run an undisturbed exchange, which tells how much work the next one like it has.

        What it returns.
        """
        self._seen = 0
        result = run()
        self._all = self._seen
        return result

    def at(self, moment: float, act: Callable[[], object]) -> None:
        """Call ``act`` when a share of the counted work, 0 to below 1, is done from now on."""
        self._seen, self._event, self._act = 0, 1 + int(moment * self._all), act

    def _counted(self, call):
        def wrapper(*args, **kwargs):
            self._seen += 1
            if self._seen == self._event:
                self._act()
            return call(*args, **kwargs)

        return wrapper
