"""Record the load of a draft under vLLM's V2 model runner, where a *speculator* runs it.

The first pass of a step has the tokens of the target's batch (a draft model of its own: one more
per request), each further one a token of each request. All further passes may be one CUDA graph:
what their tokens are is written before it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.patching import Patch

RECORDER = "_moe_placement_draft_recording"
"""Attribute of vLLM's proposer or speculator: the `recording.LoadRecording` of its model."""
_DUMMY = "_moe_placement_draft_dummy"
_FOLDER = "vllm.v1.worker.gpu.spec_decode"
_DEPENDENT = f"{_FOLDER}.target_dependent_ar.speculator:TargetDependentARSpeculator"
_STANDALONE = f"{_FOLDER}.standalone_ar.speculator:StandaloneARSpeculator"


def is_followed(speculator: Any) -> bool:
    """Tell whether the passes of a speculator can be told apart.

    dflash's and several MTP modules' cannot.
    """
    classes = {f"{c.__module__}:{c.__qualname__}" for c in type(speculator).__mro__}
    return not classes.isdisjoint((_DEPENDENT, _STANDALONE))


def _propose(extra_tokens: int):
    def make(original):
        def propose(self, input_batch, *args, dummy_run=False, **kwargs):
            recording = getattr(self, RECORDER, None)
            if recording is None:
                return original(self, input_batch, *args, dummy_run=dummy_run, **kwargs)
            if dummy_run:
                recording.dummy()
            else:
                requests = slice(input_batch.num_reqs)
                recording.batch(
                    input_batch.num_scheduled_tokens[requests] + extra_tokens,
                    input_batch.is_prefilling_np[requests],
                )
            setattr(self, _DUMMY, dummy_run)
            return original(self, input_batch, *args, dummy_run=dummy_run, **kwargs)

        return propose

    return make


def _tell_one_token_each(speculator: Any, num_reqs: int) -> None:
    recording = getattr(speculator, RECORDER, None)
    if recording is not None and not getattr(speculator, _DUMMY, True):
        recording.batch(np.ones(num_reqs, dtype=np.int64), np.zeros(num_reqs, dtype=bool))


def _dependent_decode(original):
    def decode(self, num_reqs, *args, **kwargs):
        _tell_one_token_each(self, num_reqs)
        return original(self, num_reqs, *args, **kwargs)

    return decode


def _standalone_decode(original):
    def decode(self, input_batch, *args, **kwargs):
        _tell_one_token_each(self, input_batch.num_reqs)
        return original(self, input_batch, *args, **kwargs)

    return decode


def speculator_patches(until: str) -> list[Patch]:
    """Make the patches that tell the passes of a speculator; part of `recording.recording_patches`.

    Args:
        until: when they can go.
    """
    why = "a draft's further passes have a token of each request, and dummy ones must not count"
    rows = [
        ("propose", f"{_DEPENDENT}.propose", _propose(0), ("input_batch", "dummy_run")),
        ("decode", f"{_DEPENDENT}._multi_step_decode", _dependent_decode, ("num_reqs",)),
        ("graph", f"{_DEPENDENT}._fused_multi_step_decode", _dependent_decode, ("num_reqs",)),
        ("own-propose", f"{_STANDALONE}.propose", _propose(1), ("input_batch", "dummy_run")),
        ("own-decode", f"{_STANDALONE}._multi_step_decode", _standalone_decode, ("input_batch",)),
    ]
    return [
        Patch(
            f"record-speculator-{name}",
            target,
            make,
            relies_on=relies_on,
            why=why,
            removable_when=until,
            optional=True,
        )
        for name, target, make, relies_on in rows
    ]
