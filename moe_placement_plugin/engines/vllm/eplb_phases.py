"""Note which steps of EPLB's window were prompts, to weigh a rebalance for both phases.

vLLM keeps the last steps' loads and adds them up; what each step was is kept beside it, on the
host, and costs the forward pass nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.load import DECODE, MIXED, PHASES, PREFILL
from ..common.patching import Patch
from .state import STATE, Eplb

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def phase_of_requests(is_prefill: np.ndarray) -> str:
    """Return what a step is.

    Args:
        is_prefill: bool ``[requests]``, whether a request still computes its prompt.
    """
    if not is_prefill.size:
        return MIXED
    return PREFILL if is_prefill.all() else MIXED if is_prefill.any() else DECODE


def note_step(runner: Any, is_prefill: np.ndarray) -> None:
    """Note that a step of these requests is about to run."""
    state = getattr(runner, "eplb_state", None) or getattr(
        getattr(runner, "eplb", None), "state", None
    )
    eplb = None if state is None else STATE.eplb_of(state)
    if eplb is not None:
        eplb.step_phase = phase_of_requests(is_prefill)


def note_recorded(eplb: Eplb, is_dummy: bool, log_stats: bool) -> None:
    """Put the step that ran into the window, if vLLM keeps it; call before ``EplbState.step``."""
    theirs = eplb.owner
    if is_dummy or not theirs._should_record_current_step(log_stats=log_stats):
        return
    if not eplb.window:
        eplb.window = [MIXED] * theirs.expert_load_window_size
    eplb.window[theirs.expert_load_window_step] = eplb.step_phase


def loads_by_phase(eplb: Eplb) -> list[np.ndarray]:
    """Return the tokens of each phase over all EP ranks, for each model; a collective call.

    Returns:
        int64 ``[phases, layers, logical experts]`` each, in the order of `load.PHASES`.
    """
    import torch
    from vllm.distributed.parallel_state import get_ep_group

    totals = []
    for model in eplb.models:
        of_steps = model.state.expert_load_window
        layers, experts = model.shape
        table = model.state.physical_to_logical_map.long()
        total = torch.zeros(
            (len(PHASES), layers, experts), dtype=torch.int64, device=of_steps.device
        )
        window = eplb.window or [MIXED] * len(of_steps)
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
    parts = flat.cpu().split([total.numel() for total in totals])
    return [part.numpy().reshape(total.shape) for part, total in zip(parts, totals)]


def _prepare_inputs(original):
    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens, *args, **kwargs):
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch = self.input_batch
        n = batch.num_reqs
        note_step(self, batch.num_computed_tokens_cpu[:n] < batch.num_prompt_tokens[:n])
        return result

    return _prepare_inputs


def _prepare_inputs_v2(original):
    def prepare_inputs(self, *args, **kwargs):
        batch = original(self, *args, **kwargs)
        note_step(self, batch.is_prefilling_np[: batch.num_reqs])
        return batch

    return prepare_inputs


def phase_patches() -> list[Patch]:
    """Return the patches that tell prompts from generation."""
    why = "a rebalance must pay for prompts and for generation, and EPLB's window adds both up"
    until = "EPLB tells a policy which steps were prompts"
    return [
        Patch(
            "eplb-phases",
            f"{_RUNNERS[0]}:GPUModelRunner._prepare_inputs",
            _prepare_inputs,
            relies_on=("scheduler_output", "num_scheduled_tokens"),
            why=why,
            removable_when=until,
        ),
        Patch(
            "eplb-phases-v2",
            f"{_RUNNERS[1]}:GPUModelRunner.prepare_inputs",
            _prepare_inputs_v2,
            relies_on=("scheduler_output", "batch_desc"),
            why=why,
            removable_when=until,
            optional=True,
        ),
    ]
