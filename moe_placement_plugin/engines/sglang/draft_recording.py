"""Record the load of a draft of speculative decoding apart from the target's.

It goes to ``load.draft.safetensors`` beside ``load.safetensors``. A draft runs several passes a
step: one over the tokens of a prompt or over those that were verified, and one for each further
draft token. On a GPU SGLang replays them as graphs, past `ModelRunner.forward`: the graphs' runners
are told here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.model_shape import num_experts_of
from ...recording.recorder import check_path
from ..common.drafts import draft_path
from ..common.patching import DRAFT_RECORDING
from ..common.settings import RecordingSettings
from . import drafts
from .compat import resolved
from .hook_registry import Hook, apply_now
from .layers import expert_layers
from .load_recording import RECORDING, LoadRecording, routers_of

logger = logging.getLogger(__name__)

RECORDED = ("EAGLE", "EAGLE3", "STANDALONE")
"""Values of ``--speculative-algorithm`` whose drafts are recorded.

Others have graphs of their own.
"""


class DraftRecording(LoadRecording):
    """Hold the counters of a draft's model runner."""

    def batch(self, forward_batch: Any) -> None:
        """Note that a pass of the draft is about to run.

        It may be a graph of several passes with as many tokens each.
        """
        mode, size = forward_batch.forward_mode, forward_batch.batch_size
        if self.recorder is None:
            return
        if mode.is_idle() or size == 0 or mode.is_extend():
            super().batch(forward_batch)
            return
        # The tokens that were verified, or one draft token of each branch.
        each = forward_batch.positions.shape[0] // size
        self.counters.mark(np.full(size, each), np.zeros(size, dtype=bool))
        self.recorder.served()


def bind(asked: RecordingSettings, runner: Any, first: int, experts: int) -> None:
    """Record the draft of a model runner, if it has experts and its passes can be told.

    Args:
        asked: what is recorded.
        runner: SGLang's ``ModelRunner`` of the draft, whose model is loaded.
        first: number of its first layer without one in its name, see `drafts.first_number`.
        experts: logical experts of its layers.

    Raises:
        PlacementError: when the file beside the target's is another model's.
    """
    layers = expert_layers(runner.model)
    if not layers:
        return
    why = _unknown(runner, experts)
    if why:
        logger.warning(
            "moe_placement_plugin: the load of the draft's %d MoE layers is not recorded, %s "
            "holds the target's: %s",
            len(layers),
            asked.path,
            why,
        )
        return
    numbers = drafts.numbers_of(layers, first)
    names = {layer: name for name, layer in layers.items()}
    blocks = routers_of(runner.model).values()
    routers = {n: router for layer, router in blocks if (n := numbers[names[layer]]) is not None}
    routers = dict(sorted(routers.items()))
    own = replace(asked, path=str(draft_path(asked.path)), coactivation=False)
    check_path(own.path, (len(routers), experts))
    name = str(resolved(runner.server_args).speculative_draft_model_path)
    apply_now(DRAFT_RECORDING)
    setattr(runner, RECORDING, DraftRecording(own, runner, routers, experts, name))


def _unknown(runner: Any, experts: int) -> str:
    """Say why a draft is not recorded; empty where it is."""
    args = resolved(runner.server_args)
    algorithm = str(args.speculative_algorithm or "").upper()
    if algorithm not in RECORDED or getattr(runner, "draft_model_idx", None) is not None:
        return f"drafts of {algorithm} in graphs of their own do not say which tokens they are for"
    if int(getattr(args, "pp_size", 1)) > 1:
        return "with pipeline parallelism only its last stage has one"
    numbers = drafts.numbers_of(expert_layers(runner.model), 0)
    if None in numbers.values() or len(set(numbers.values())) < len(numbers):
        return "its layers' names have no numbers to tell them by"
    try:
        routers_of(runner.model)
    except PlacementError as error:
        return str(error)
    return "" if experts else "its config names no experts"


def _replay(original: Callable, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    recording = getattr(self.model_runner, RECORDING, None)
    if recording is not None:
        recording.batch(forward_batch)
    return original(self, forward_batch, *args, **kwargs)


def draft_recording_hooks() -> list[Hook]:
    """Return the hooks of a worker that records a draft."""
    package = "sglang.srt.speculative"
    graphs = {
        "steps": f"{package}.eagle_draft_cuda_graph_runner:EAGLEDraftCudaGraphRunner.execute",
        "extend": f"{package}.eagle_draft_extend_cuda_graph_runner:"
        "EAGLEDraftExtendCudaGraphRunner.execute",
    }
    return [
        Hook(
            name=f"record-draft-{name}",
            target=target,
            hook=_replay,
            relies_on=("forward_batch",),
            why="a draft's graphs are replayed past ModelRunner.forward, where batches are told",
            removable_when="SGLang records the load of logical experts in windows by itself",
        )
        for name, target in graphs.items()
    ]


def before(runner: Any) -> tuple[int, int]:
    """Return what is known of a draft whose model is not built yet.

    Some models change their config while they are built.

    Returns:
        The number of the first layer without one in its name, and the logical experts.
    """
    config = runner.model_config.hf_text_config
    return drafts.first_number(runner), num_experts_of(config)
