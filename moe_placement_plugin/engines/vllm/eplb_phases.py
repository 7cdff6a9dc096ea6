"""Which steps of EPLB's window were prompts and which were generation, so that a rebalance is weighed for both.

vLLM keeps the last steps' loads and adds them up; what each step was is kept beside it, on the host, and costs the forward pass nothing.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ..common.patching import Patch

logger = logging.getLogger("vllm.moe_placement_plugin")

PHASES = ("prefill", "decode", "mixed")

_STEP = "_moe_placement_phase"  # of the step that runs, on the model runner's EplbState
_WINDOW = "_moe_placement_phases"  # of the steps in EPLB's window

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def phase_of(is_prefill: np.ndarray) -> str:
    """What a step is, by whether each of its requests still computes its prompt, bool ``[requests]``."""
    if not is_prefill.size:
        return "mixed"
    return "prefill" if is_prefill.all() else "mixed" if is_prefill.any() else "decode"


def note(runner: Any, is_prefill: np.ndarray) -> None:
    """A step of these requests is about to run."""
    state = getattr(runner, "eplb_state", None) or getattr(
        getattr(runner, "eplb", None), "state", None
    )
    if state is not None:
        state.__dict__[_STEP] = phase_of(is_prefill)


def recorded(eplb: Any, is_dummy: bool, log_stats: bool) -> None:
    """The step that ran goes into the window, if vLLM keeps it; call before ``EplbState.step``."""
    if is_dummy or not eplb._should_record_current_step(log_stats=log_stats):
        return
    window = eplb.__dict__.setdefault(_WINDOW, ["mixed"] * eplb.expert_load_window_size)
    window[eplb.expert_load_window_step] = eplb.__dict__.get(_STEP, "mixed")


def loads(eplb: Any, states: list[Any]) -> list[np.ndarray]:
    """Tokens of each phase over all EP ranks, int64 ``[phases, layers, logical experts]`` for each model; a collective call.

    Args:
        eplb: vLLM's ``EplbState``.
        states: its model states.
    """
    import torch
    from vllm.distributed.parallel_state import get_ep_group

    window = eplb.__dict__.get(_WINDOW, ["mixed"] * eplb.expert_load_window_size)
    totals = []
    for state in states:
        of_steps = state.expert_load_window
        layers, experts = state.logical_replica_count.shape
        table = state.physical_to_logical_map.long()
        total = torch.zeros(
            (len(PHASES), layers, experts), dtype=torch.int64, device=of_steps.device
        )
        for number, phase in enumerate(PHASES):
            steps = [step for step, name in enumerate(window) if name == phase]
            if steps:
                of_phase = of_steps[torch.tensor(steps, device=of_steps.device)].sum(
                    dim=0, dtype=torch.int64
                )
                total[number].scatter_add_(
                    1, table.clamp_min(0), of_phase.masked_fill(table < 0, 0)
                )
        totals.append(total)
    if not totals:
        return []
    flat = torch.cat([total.flatten() for total in totals])
    torch.distributed.all_reduce(flat, group=get_ep_group().device_group)
    flat = flat.cpu().numpy()
    result, at = [], 0
    for total in totals:
        result.append(flat[at : at + total.numel()].reshape(total.shape))
        at += total.numel()
    return result


def _prepare_inputs(original):
    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens, *args, **kwargs):
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch = self.input_batch
        n = batch.num_reqs
        note(self, batch.num_computed_tokens_cpu[:n] < batch.num_prompt_tokens[:n])
        return result

    return _prepare_inputs


def _prepare_inputs_v2(original):
    def prepare_inputs(self, *args, **kwargs):
        batch = original(self, *args, **kwargs)
        note(self, batch.is_prefilling_np[: batch.num_reqs])
        return batch

    return prepare_inputs


def phase_patches() -> list[Patch]:
    """The patches that tell prompts from generation."""
    why = "a rebalance must pay for prompts and for generation, and EPLB's window adds both up"
    until = "EPLB tells a policy which steps were prompts"
    return [
        Patch("eplb-phases", f"{_RUNNERS[0]}:GPUModelRunner._prepare_inputs", _prepare_inputs, relies_on=("scheduler_output", "num_scheduled_tokens"),
              why=why, removable_when=until),
        Patch("eplb-phases-v2", f"{_RUNNERS[1]}:GPUModelRunner.prepare_inputs", _prepare_inputs_v2, relies_on=("scheduler_output", "batch_desc"),
              why=why, removable_when=until, optional=True),
    ]  # fmt: skip
