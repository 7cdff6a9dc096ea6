"""Note which forward passes in SGLang's recorder were prompts and which generation.

A rebalance is weighed for both. The recorder keeps the load of each pass in a buffer; what
each was is kept beside it, on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.load import DECODE, MIXED, PREFILL
from .hook_registry import Hook
from .state import STATE

_RECORDER = "sglang.srt.eplb.expert_distribution"


def phase_of_mode(mode: Any) -> str:
    """Return what a batch is, by its ``ForwardMode``."""
    if mode.is_decode():
        return DECODE
    return PREFILL if mode.is_extend() and not mode.is_mixed() else MIXED


def ranks_that_count_a_token() -> int:
    """Return over how many ranks the recorder's sum counts each token: those that route it.

    Without an all-to-all back end every EP rank routes every token, also where attention is
    data-parallel and the ranks gather each other's; with one, each rank routes its own share.
    """
    from sglang.srt.distributed.parallel_state import get_moe_ep_group
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return get_moe_ep_group().world_size if get_moe_a2a_backend().is_none() else 1


def _one_batch() -> bool:
    """Tell whether all ranks run the same batch, so that they agree on what a pass was.

    With attention data parallelism they do not.
    """
    try:
        from sglang.srt.layers.dp_attention import is_dp_attention_enabled

        return not is_dp_attention_enabled()
    except (ImportError, AssertionError, AttributeError, RuntimeError):
        return False


def phases_of_passes(number: int) -> list[str]:
    """Return the phases of the recorder's forward passes, in the order of its buffer.

    All are mixed where ranks could disagree.

    Args:
        number: of passes.
    """
    if not _one_batch():
        return [MIXED] * number
    return [STATE.passes.in_buffer.get(place, MIXED) for place in range(number)]


def _start(original: Callable, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    STATE.passes.phase = phase_of_mode(forward_batch.forward_mode)
    return original(self, forward_batch, *args, **kwargs)


def _append(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    buffer = self._global_physical_count_of_buffered_step
    place = buffer._curr_index if hasattr(buffer, "_curr_index") else buffer._size
    result = original(self, *args, **kwargs)
    STATE.passes.in_buffer[place] = STATE.passes.phase
    return result


def phase_hooks() -> list[Hook]:
    """Return the hooks that tell prompts from generation; without them all passes are mixed."""
    why = (
        "a rebalance must pay for prompts and for generation, and the recorder does not say which "
        "pass was what"
    )
    until = "the recorder keeps the forward mode"
    return [
        Hook(
            name="eplb-phase",
            target=f"{_RECORDER}:_ExpertDistributionRecorderReal._on_forward_pass_start",
            hook=_start,
            relies_on=("forward_batch",),
            why=why,
            removable_when=until,
            optional=True,
        ),
        Hook(
            name="eplb-phase-window",
            target=f"{_RECORDER}:_StatAccumulator.append",
            hook=_append,
            relies_on=("forward_pass_id",),
            why=why,
            removable_when=until,
            optional=True,
        ),
    ]
