"""Engine core: an update, or sleep, that workers would refuse is refused before anything begins.

vLLM pauses its scheduler before it tells workers to sleep, and resumes it when they wake: a worker
that refuses would leave a server that answers nobody. And when a worker raises, vLLM leaves the
other workers' answers in their queues, where the next call finds them. So all workers are asked
first, by a call that returns what they would say.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import PlacementError
from ..common.patching import Patch
from .reload_worker import CHECKS, reason_against
from .state import settings_of

_CORE = "vllm.v1.engine.core:EngineCore"


def _ask_workers(core: Any, method: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a call that some worker would refuse.

    Raises:
        PlacementError: with the first worker's reason; no worker has begun anything.
    """
    if not isinstance(method, str) or method not in CHECKS or settings_of(core.vllm_config) is None:
        return
    said = core.model_executor.collective_rpc(reason_against, args=(method, args, kwargs))
    for reason in said:
        if reason is not None:
            raise PlacementError(reason)


def _collective_rpc(original):
    def collective_rpc(self, method, timeout=None, args=(), kwargs=None, *more, **named):
        _ask_workers(self, method, tuple(args), dict(kwargs or {}))
        return original(self, method, timeout, args, kwargs, *more, **named)

    return collective_rpc


def _sleep(original):
    def sleep(self, level=1, *args, **kwargs):
        if level > 0:  # 0 pauses scheduling only
            _ask_workers(self, "sleep", (level,), {})
        return original(self, level, *args, **kwargs)

    return sleep


def core_patches() -> list[Patch]:
    """Return the patches of the process that tells workers what to do."""
    why = "a refusal by a worker leaves the scheduler paused, and other workers' answers in queues"
    gone = "vLLM resumes a scheduler whose workers refused, and empties the queues of a failed call"
    return [
        Patch(
            "update-asked",
            f"{_CORE}.collective_rpc",
            _collective_rpc,
            why,
            relies_on=("method", "timeout", "args", "kwargs"),
            removable_when=gone,
            optional=True,
        ),
        Patch(
            "sleep-asked",
            f"{_CORE}.sleep",
            _sleep,
            why,
            relies_on=("level",),
            removable_when=gone,
            optional=True,
        ),
    ]
