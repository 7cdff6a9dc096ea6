"""Queue work on the device of a rank's weights beside the engine's, and wait in slices."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .watchdog import WaitingFor, Watchdog

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class DeviceQueue:
    """Queues the work of one exchange on one device.

    Args:
        device: where weights and staging memory lie.
        timeout: seconds that anything is waited for.
        watchdog: is told what is waited for; ends the wait when it has given up.
    """

    def __init__(self, device: torch.device, timeout: float, watchdog: Watchdog):
        self.device, self._timeout, self._watchdog = device, timeout, watchdog

    @property
    def is_cpu(self) -> bool:
        """Whether work is done when its call returns."""
        return self.device.type == "cpu"

    def waits_for(self, waiting: WaitingFor) -> None:
        """Note what is waited for from now on."""
        self._watchdog.waits_for(waiting)

    def allocate(self, size: int) -> torch.Tensor:
        """Take memory, uint8 ``[size]``."""
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def free_memory(self) -> int:
        """Return the bytes of the device's memory that nobody has taken.

        None on a CPU, where the system overcommits.
        """
        return 0 if self.is_cpu else self._module.mem_get_info(self.device)[0]

    def lane(self) -> torch.Stream | None:
        """Make a stream beside the engine's; None on a CPU."""
        return None if self.is_cpu else self._module.Stream()

    def beside(self, lane: torch.Stream | None) -> AbstractContextManager[Any]:
        """Queue what follows beside the engine's work from now on, behind what it has queued."""
        if lane is None:
            return nullcontext()
        lane.wait_stream(self._module.current_stream())
        return self._module.stream(lane)

    def wait(self, works: list[dist.Work]) -> None:
        """Wait for transfers; on a GPU what is queued from now on waits, and the host does not.

        Raises:
            RuntimeError: when one fails, or takes too long on a CPU.
        """
        if not self.is_cpu:
            for work in works:
                work.wait()
            return
        while works:  # gloo's can be waited for once only
            works.pop(0).wait(timedelta(seconds=self._timeout))

    def wait_for_event(self, event: torch.Event) -> None:
        """Have what is queued from now on wait for an event."""
        self._module.current_stream().wait_event(event)

    def settle(self) -> None:
        """Wait until the device has done what is queued, never blocked beyond an interruption.

        Raises:
            TimeoutError: when it takes too long or the watchdog gave up.
        """
        if self.is_cpu:
            return
        done = self._module.Event()
        done.record()
        deadline = time.monotonic() + self._timeout
        while not done.query():
            if self._watchdog.expired:
                raise TimeoutError("interrupted by the watchdog")
            if time.monotonic() > deadline:
                raise TimeoutError(f"transfers not finished after {self._timeout:g} s")
            time.sleep(20e-6)

    @property
    def _module(self) -> ModuleType:
        import torch

        return torch.get_device_module(self.device)
