"""Recording the expert load of a running vLLM: ``--expert-load-record``.

Logical ids are taken where vLLM hands them out, before EPLB maps them to slots. Which tokens of a batch are
real, and whether they belong to a prompt, is known when the batch is prepared; see `LoadCounters`.
"""

from __future__ import annotations

import logging
from typing import Any

from ...core.model_shape import model_shape
from ...recording.recorder import (
    DEFAULT_INTERVAL,
    check_interval,
    check_path,
)
from ..common.patching import Patch, PatchSet
from ..common.request import Request
from ..common.settings import RecordingSettings, Settings
from .draft_recording import bind_draft, draft_patches
from .load_recording import LoadRecording
from .state import settings_of

logger = logging.getLogger("vllm.moe_placement_plugin")

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_RECORDER = "_moe_placement_load_recording"


def recording_settings(vllm_config: Any, request: Request) -> RecordingSettings | None:
    """Say what is to be recorded, checked before any process starts; None when nothing is.

    Raises:
        PlacementError: for a path that cannot be written or an interval that makes no sense.
    """
    if request.record is None:
        return None
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    shape = model_shape(model.hf_text_config, model.model, model.get_num_experts())
    check_path(request.record, (len(shape.layer_ids), shape.num_experts))
    whole = parallel.enable_expert_parallel and not parallel.enable_eplb
    return RecordingSettings(
        request.record,
        check_interval(request.interval or DEFAULT_INTERVAL),
        request.coactivation,
        shape.num_experts,
        model.model,
        parallel.tensor_parallel_size * parallel.data_parallel_size if whole else None,
    )


def install_metrics(settings: Settings) -> None:
    """Report the recording on this process's ``/metrics``.

    Args:
        settings: the engine's, with a recording.
    """
    from ...recording import metrics  # lazy: heavy

    recording = settings.recording
    assert recording is not None, "asked for a recording only"
    ranks = recording.ep_ranks

    def placement_of(load):
        if settings.static is not None and settings.static.layer_ids == load.layer_ids:
            return settings.static
        return metrics.contiguous(load, ranks) if ranks else None

    metrics.install(recording.path, placement_of)


def _load_model(original):
    def load_model(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        settings = settings_of(self.vllm_config)
        record = settings.recording if settings is not None else None
        if record is not None:
            runner = self.model_runner
            recording = LoadRecording(record, self.vllm_config, runner.get_model(), self.device)
            setattr(runner, _RECORDER, recording)
            bind_draft(record, self.vllm_config, runner, recording)
        return result

    return load_model


def _dummy_run(original):
    def _dummy_run(self, *args, **kwargs):
        recording = getattr(self, _RECORDER, None)
        if recording is not None:
            recording.dummy()
        return original(self, *args, **kwargs)

    return _dummy_run


def _prepare_inputs(original):
    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens, *args, **kwargs):
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        recording = getattr(self, _RECORDER, None)
        if recording is not None:
            batch = self.input_batch
            n = batch.num_reqs
            recording.batch(
                num_scheduled_tokens[:n],
                batch.num_computed_tokens_cpu[:n] < batch.num_prompt_tokens[:n],
            )
        return result

    return _prepare_inputs


def _prepare_inputs_v2(original):
    def prepare_inputs(self, *args, **kwargs):
        batch = original(self, *args, **kwargs)
        recording = getattr(self, _RECORDER, None)
        if recording is not None:
            recording.batch(
                batch.num_scheduled_tokens[: batch.num_reqs],
                batch.is_prefilling_np[: batch.num_reqs],
            )
        return batch

    return prepare_inputs


def recording_patches() -> PatchSet:
    """The patches of ``--expert-load-record``."""
    why_dummy = "profiling, graph capture and idle data-parallel ranks run batches without requests, which must not count"
    why_batch = "which tokens are real and belong to prompts is known where the batch is prepared"
    why_bind = "the routers' capture callback is bound once the model is loaded, before graphs are captured"
    until = "vLLM records logical expert load by itself (issues 39178, 43715)"
    runner, runner_v2 = (f"{module}:GPUModelRunner" for module in _RUNNERS)
    worker = "vllm.v1.worker.gpu_worker:Worker.load_model"
    return PatchSet(
        [
            Patch("record-bind", worker, _load_model, why=why_bind, removable_when=until),
            Patch("record-dummy", f"{runner}._dummy_run", _dummy_run, relies_on=("num_tokens",), why=why_dummy,
                  removable_when=until),
            Patch(
                "record-batch", f"{runner}._prepare_inputs", _prepare_inputs, relies_on=("scheduler_output", "num_scheduled_tokens"),
                why=why_batch, removable_when=until,
            ),
            Patch(
                "record-dummy-v2", f"{runner_v2}._dummy_run", _dummy_run, relies_on=("num_tokens",),
                why=why_dummy, removable_when=until, optional=True,
            ),
            Patch(
                "record-batch-v2", f"{runner_v2}.prepare_inputs", _prepare_inputs_v2, relies_on=("scheduler_output", "batch_desc"),
                why=why_batch, removable_when=until, optional=True,
            ),
            *draft_patches(until),
        ]
    )  # fmt: skip
