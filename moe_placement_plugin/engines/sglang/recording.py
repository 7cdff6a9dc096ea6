"""Recording the expert load of a running SGLang: ``--expert-load-record``.

Logical ids are taken where they enter `topk._post_process_topk_ids`, which sends them to physical slots. Independent of
placement flags: its settings ride on ``ServerArgs`` under an attribute of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...core.errors import PlacementError
from ...recording.recorder import DEFAULT_INTERVAL, check_interval, check_path
from .compat import attention_dp_width, check_version, model_config, resolved
from .hook_registry import Hook, HookSet
from .load_recording import COUNT, RECORDING, LoadRecording, routers_of

logger = logging.getLogger(__name__)

ATTRIBUTE = "_moe_expert_load_record"
FLAGS = ("expert_load_record", "expert_load_interval", "expert_load_coactivation")

_current: RecordSettings | None = None


@dataclass
class RecordSettings:
    """What is to be recorded.

    Attributes:
        path: the recording.
        interval: seconds between two writes.
        coactivation: whether pairs are counted.
    """

    path: str
    interval: float
    coactivation: bool

    def __setstate__(self, state: dict[str, Any]) -> None:
        global _current
        self.__dict__.update(state)
        _current = self


def current() -> RecordSettings | None:
    """The settings of this process, None when nothing is recorded."""
    return _current


def add_arguments(group: Any) -> None:
    """Add the flags to an argparse group."""
    group.add_argument(
        "--expert-load-record", type=str, default=None, metavar="PATH",
        help="Record how many tokens each logical expert of each layer receives, into this file.",
    )  # fmt: skip
    group.add_argument(
        "--expert-load-interval", type=str, default=None, metavar="SECONDS",
        help="Seconds between two writes of the recording, which is also the length of a window (default 60).",
    )  # fmt: skip
    group.add_argument(
        "--expert-load-coactivation",
        action="store_true",
        default=None,
        help="Also record which experts are chosen together.",
    )


def request(values: dict[str, Any]) -> RecordSettings | None:
    """Take the recording flags out of ``values`` (arguments of ``ServerArgs``), and check what can be checked already.

    Raises:
        PlacementError: a path that cannot be written, a bad interval, an unsupported SGLang.
    """
    path, interval, pairs = (values.pop(flag, None) for flag in FLAGS)
    if path is None:
        for flag, value in zip(FLAGS[1:], (interval, pairs)):
            if value:
                raise PlacementError(
                    f"--{flag.replace('_', '-')} without --expert-load-record: nothing is recorded; add the path"
                )
        return None
    import sglang

    check_version(sglang.__version__)
    check_path(path)
    return RecordSettings(str(path), check_interval(interval or DEFAULT_INTERVAL), bool(pairs))


def accept(server_args: Any, asked: RecordSettings | None) -> Any:
    """Let ``server_args`` carry the request, and check it once SGLang has resolved its own arguments."""
    global _current
    if asked is not None:
        setattr(server_args, ATTRIBUTE, asked)
        _install_metrics(server_args, asked)
        _current = asked
        ON_REQUEST.apply_now()
    return server_args


def _install_metrics(server_args: Any, asked: RecordSettings) -> None:
    from ...recording import metrics  # lazy: heavy
    from . import settings  # lazy: heavy

    def placement_of(load):
        placed = settings.of(server_args)
        if placed is not None and placed.moves:
            return None
        if (
            placed is not None
            and placed.placement is not None
            and placed.placement.layer_ids == load.layer_ids
        ):
            return placed.placement
        values = resolved(server_args)
        if getattr(values, "enable_eplb", False) or getattr(values, "ep_num_redundant_experts", 0):
            return None
        return (
            metrics.contiguous(load, values.ep_size) if getattr(values, "ep_size", 1) > 1 else None
        )

    metrics.install(asked.path, placement_of)


def _check_server_args(original: Callable, server_args: Any) -> Any:
    asked = getattr(server_args, ATTRIBUTE, None)
    if asked is not None:
        _check(server_args, asked)
    return original(server_args)


def _check(server_args: Any, asked: RecordSettings) -> None:
    from ...core.model_shape import model_shape  # lazy: heavy

    values = resolved(server_args)
    flag = f"--expert-load-record {asked.path}"
    config = model_config(server_args).hf_text_config
    shape = model_shape(config, server_args.model_path)
    check_path(asked.path, (len(shape.layer_ids), shape.num_experts))
    a2a = str(getattr(values, "moe_a2a_backend", "none") or "none")
    width = attention_dp_width(values)
    attention_dp, shared_attention = width > 1, values.tp_size > width
    if getattr(values, "enable_two_batch_overlap", False):
        raise PlacementError(
            f"{flag} together with --enable-two-batch-overlap: tokens would be counted wrongly; leave one of the two out"
        )
    if a2a == "none" and attention_dp:
        raise PlacementError(
            f"{flag} together with --enable-dp-attention without an all-to-all back end: the ranks route each other's tokens, which cannot "
            "be told apart; add --moe-a2a-backend deepep, or leave --enable-dp-attention (--attn-dp-size) out while recording"
        )
    if a2a != "none" and shared_attention:
        raise PlacementError(
            f"{flag} together with --moe-a2a-backend {a2a} and tensor-parallel attention: each rank routes a share of the tokens that "
            "only it knows; add --enable-dp-attention with --dp-size equal to --tp-size (from 0.5.23 on --attn-dp-size), or use "
            "--moe-a2a-backend none while recording"
        )


def _load_model(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    from . import draft_recording  # lazy: heavy

    asked, draft = current(), bool(getattr(self, "is_draft_worker", False))
    first, experts = draft_recording.before(self) if asked is not None and draft else (0, 0)
    result = original(self, *args, **kwargs)
    if asked is None or hasattr(self, RECORDING):
        return result
    if draft:
        draft_recording.bind(asked, self, first, experts)
    else:
        setattr(self, RECORDING, _of_target(asked, self))
    return result


def _of_target(asked: RecordSettings, runner: Any) -> LoadRecording:
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


ON_REQUEST = HookSet(
    [
        Hook(
            name="record-check",
            target="sglang.srt.server_args:ServerArgs.check_server_args",
            hook=_check_server_args,
            relies_on=("self",),
            why="what cannot be recorded is refused once SGLang has resolved its arguments, before workers start",
            removable_when="SGLang records the load of logical experts in windows by itself",
        ),
    ]
)
"""What the launcher gets when a recording is asked for."""


@lru_cache(maxsize=1)
def hooks() -> HookSet:
    """The hooks of a worker process that records; the same object in every call."""
    until = "SGLang's expert distribution recorder writes windows of logical counts while it serves"
    return HookSet(
        [
            Hook(
                name="record-bind", target="sglang.srt.model_executor.model_runner:ModelRunner.load_model", hook=_load_model,
                relies_on=("self",), why="counters are bound to the TopK layers once the model is loaded, before graphs are captured",
                removable_when=until,
            ),
            Hook(
                name="record-batch", target="sglang.srt.model_executor.model_runner:ModelRunner.forward", hook=_forward,
                relies_on=("forward_batch",), why="which tokens are real and belong to prompts is known before the forward pass",
                removable_when=until,
            ),
            Hook(
                name="record-count", target="sglang.srt.layers.moe.topk:_post_process_topk_ids", hook=_post_process, counted=False,
                relies_on=("topk_ids", "topk_weights", "topk_config"), why="the logical ids that the router chose are seen nowhere later",
                upstream="SGLang's `stat` recorder sums physical ids over a whole dump and stops to gather them",
                removable_when=until,
            ),
        ]
    )  # fmt: skip
