"""Record the expert load of a running SGLang: ``--expert-load-record``.

Logical ids are taken where they enter `topk._post_process_topk_ids`, which sends them to physical
slots. A recording is independent of placement flags.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..common.settings import RecordingSettings
from .compat import resolved
from .hook_registry import Hook
from .load_recording import COUNT, RECORDING, LoadRecording, routers_of
from .state import STATE, settings_of

logger = logging.getLogger(__name__)


def install_metrics(server_args: Any, path: str) -> None:
    """Report the recording on the launcher's ``/metrics``.

    Args:
        server_args: SGLang's, which carry our settings.
        path: of the recording.
    """
    from ...recording import metrics  # lazy: heavy

    def placement_of(load):
        settings = settings_of(server_args)
        if settings is not None and settings.rebalancing.moves:
            return None
        plan = None if settings is None else settings.plan
        if plan is not None and plan.layer_ids == load.layer_ids:
            return plan
        values = resolved(server_args)
        if getattr(values, "enable_eplb", False) or getattr(values, "ep_num_redundant_experts", 0):
            return None
        return (
            metrics.contiguous(load, values.ep_size) if getattr(values, "ep_size", 1) > 1 else None
        )

    metrics.install(path, placement_of)


def _load_model(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    from . import draft_recording  # lazy: heavy

    settings = STATE.settings
    asked = None if settings is None else settings.recording
    draft = bool(getattr(self, "is_draft_worker", False))
    first, experts = draft_recording.before(self) if asked is not None and draft else (0, 0)
    result = original(self, *args, **kwargs)
    if asked is None or hasattr(self, RECORDING):
        return result
    if draft:
        draft_recording.bind(asked, self, first, experts)
    else:
        setattr(self, RECORDING, _of_target(asked, self))
    return result


def _of_target(asked: RecordingSettings, runner: Any) -> LoadRecording:
    from ...core.model_shape import model_shape  # lazy: heavy

    config = runner.model_config.hf_text_config
    shape = model_shape(config, runner.server_args.model_path)
    found = {layer.layer_id: router for layer, router in routers_of(runner.model).values()}
    routers = dict(sorted(found.items()))
    return LoadRecording(asked, runner, routers, shape.num_experts, runner.server_args.model_path)


def _forward(original: Callable, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    recording = getattr(self, RECORDING, None)
    if recording is not None:
        recording.batch(forward_batch)
    return original(self, forward_batch, *args, **kwargs)


def _post_process(
    original: Callable,
    topk_ids: Any,
    topk_weights: Any,
    topk_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    count = getattr(topk_config, COUNT, None)
    if count is not None:
        counters, row = count
        counters.count(row, topk_ids)
    return original(topk_ids, topk_weights, topk_config, *args, **kwargs)


def recording_hooks() -> list[Hook]:
    """Return the hooks of a worker process that records."""
    until = "SGLang's expert distribution recorder writes windows of logical counts while it serves"
    return [
        Hook(
            name="record-bind",
            target="sglang.srt.model_executor.model_runner:ModelRunner.load_model",
            hook=_load_model,
            relies_on=("self",),
            why="counters are bound to the TopK layers once the model is loaded, before graphs "
            "are captured",
            removable_when=until,
        ),
        Hook(
            name="record-batch",
            target="sglang.srt.model_executor.model_runner:ModelRunner.forward",
            hook=_forward,
            relies_on=("forward_batch",),
            why="which tokens are real and belong to prompts is known before the forward pass",
            removable_when=until,
        ),
        Hook(
            name="record-count",
            target="sglang.srt.layers.moe.topk:_post_process_topk_ids",
            hook=_post_process,
            counted=False,
            relies_on=("topk_ids", "topk_weights", "topk_config"),
            why="the logical ids that the router chose are seen nowhere later",
            upstream="SGLang's `stat` recorder sums physical ids over a whole dump and stops to "
            "gather them",
            removable_when=until,
        ),
    ]
