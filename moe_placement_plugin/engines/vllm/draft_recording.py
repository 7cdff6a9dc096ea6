"""The load of a draft of speculative decoding, recorded apart from the target's: ``load.draft.safetensors`` beside ``load.safetensors``.

A draft runs several forward passes a step. The first has the tokens of the target's batch, each further one a token of each request.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from ...recording.recorder import check_path
from ..common.drafts import draft_path
from ..common.patching import Patch
from ..common.settings import RecordingSettings
from .layers import num_logical, routed_layers
from .load_recording import LoadRecording
from .speculator_recording import RECORDER, is_followed, speculator_patches

logger = logging.getLogger("vllm.moe_placement_plugin")

_DUMMY = "_moe_placement_draft_dummy"
_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"


def bind_draft(record: RecordingSettings, vllm_config: Any, runner: Any, target: Any) -> None:
    """Record the draft of a model runner, if it has one with experts.

    Args:
        record: what is recorded.
        vllm_config: the engine's config.
        runner: vLLM's model runner, V1 (it has a ``drafter``) or V2 (a ``speculator``), whose models are loaded.
        target: the `recording.LoadRecording` of the runner's own model.

    Raises:
        PlacementError: when the file beside the target's is another model's, or the draft's choices cannot be seen.
    """
    speculator = getattr(runner, "speculator", None)
    proposer = getattr(runner, "drafter", None) if speculator is None else speculator
    model = getattr(proposer, "model", None)
    layers = routed_layers(model) if hasattr(model, "modules") else {}
    if not layers:
        return
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        logger.warning(
            "moe_placement_plugin: the draft's load is not recorded with pipeline parallelism"
        )
        return
    if speculator is not None and not is_followed(speculator):
        logger.warning(
            "moe_placement_plugin: the draft's load is not recorded: the passes of %s cannot be told apart; the model's own "
            "load is",
            type(speculator).__name__,
        )
        return
    experts, path = num_logical(next(iter(layers.values()))), draft_path(record.path)
    check_path(path, (len(layers), experts))
    own = replace(record, path=str(path), num_experts=experts, coactivation=False)
    recording = LoadRecording(own, vllm_config, model, runner.device)
    recording.target = target
    setattr(proposer, RECORDER, recording)


def tell_tokens(recording: Any, num_tokens: int) -> None:
    """Say what the draft's coming pass is computed for: the target's batch if it has as many tokens, else decoding.

    Args:
        recording: the draft's.
        num_tokens: of the pass, without padding.
    """
    last = recording.target.last_batch
    if last is None or int(last[0].sum()) != num_tokens:
        last = np.array([num_tokens]), np.array([False])
    recording.batch(*last)


def _determine_batch(original):
    def _determine_batch_execution_and_padding(self, num_tokens, *args, **kwargs):
        recording = getattr(self, RECORDER, None)
        if recording is not None:
            if getattr(self, _DUMMY, False):
                recording.dummy()
            else:
                tell_tokens(recording, num_tokens)
        return original(self, num_tokens, *args, **kwargs)

    return _determine_batch_execution_and_padding


def _dummy_run(original):
    def dummy_run(self, *args, **kwargs):
        setattr(self, _DUMMY, True)
        try:
            return original(self, *args, **kwargs)
        finally:
            setattr(self, _DUMMY, False)

    return dummy_run


def draft_patches(until: str) -> list[Patch]:
    """The patches that tell the draft's passes apart; part of `recording.recording_patches`.

    Args:
        until: when they can go.
    """
    return [
        Patch(
            "record-draft",
            f"{_PROPOSER}._determine_batch_execution_and_padding",
            _determine_batch,
            relies_on=("num_tokens",),
            why="a draft's passes have other tokens than the target's batch, and are padded by themselves",
            removable_when=until,
            optional=True,
        ),
        Patch(
            "record-draft-dummy",
            f"{_PROPOSER}.dummy_run",
            _dummy_run,
            relies_on=("num_tokens",),
            why="profiling and graph capture run the draft without requests, which must not count",
            removable_when=until,
            optional=True,
        ),
        *speculator_patches(until),
    ]
