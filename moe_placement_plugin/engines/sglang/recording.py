"""Recording the expert load of a running SGLang: ``--expert-load-record``.

Logical ids are taken where they enter `topk._post_process_topk_ids`, which sends them to physical slots. Independent of
placement flags: its settings ride on ``ServerArgs`` under an attribute of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ...errors import PlacementError
from ...hosts import session
from ..load_counters import LoadCounters
from ..load_recorder import DEFAULT_INTERVAL, LoadRecorder, Windows, check_interval, check_path
from .hooks import Hook, HookSet
from .versions import attention_dp_width, check_version, model_config, replicas, resolved

logger = logging.getLogger(__name__)

ATTRIBUTE = "_moe_expert_load_record"
FLAGS = ("expert_load_record", "expert_load_interval", "expert_load_coactivation")

# Attribute of the TopK config of every MoE layer of the target model: (counters, row of the layer).
_COUNT = "_moe_expert_load_count"
_RECORDING = "_moe_expert_load_recording"

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
    from ... import metrics
    from . import settings

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
    from ..model_shape import model_shape

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


class LoadRecording:
    """The counters of one model runner, bound to its TopK layers, and their recorder."""

    def __init__(self, asked: RecordSettings, runner: Any):
        import sglang
        from sglang.srt.runtime_context import get_parallel

        from ... import __version__
        from ..model_shape import model_shape

        args = resolved(runner.server_args)
        config = runner.model_config.hf_text_config
        shape = model_shape(config, runner.server_args.model_path)
        width, copies = attention_dp_width(args), replicas(args)
        attention_dp = width > 1
        tp_rank, stage = get_parallel().tp_rank, get_parallel().pp_rank
        # With data-parallel attention every rank has tokens of its own; else all tensor-parallel ranks have the same.
        counts = attention_dp or tp_rank == 0
        routers = _routers(runner.model)
        self.recorder: LoadRecorder | None = None
        if not counts or not routers:
            return
        tokens = _most_tokens(runner, args)
        self.counters = LoadCounters(
            len(routers), shape.num_experts, tokens, runner.device, asked.coactivation
        )
        for row, router in enumerate(routers.values()):
            object.__setattr__(router.topk_config, _COUNT, (self.counters, row))
        rank = _data_parallel_rank(runner) if copies > 1 else 0
        ranks = copies
        if attention_dp:
            rank, ranks = rank * args.tp_size + tp_rank, copies * args.tp_size
        stages = getattr(args, "pp_size", 1)
        metadata = {
            "model": runner.server_args.model_path,
            "engine": f"sglang {sglang.__version__}",
            "plugin": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "tensor_parallel_size": args.tp_size,
            "data_parallel_size": width * copies,
            "expert_parallel": getattr(args, "ep_size", 1) > 1,
            "hosts": session.host_names(),
            "top_k": getattr(config, "num_experts_per_tok", None),
        }
        windows = Windows(tuple(routers), shape.num_experts, asked.interval, metadata)
        self.recorder = LoadRecorder(
            asked.path,
            windows,
            self.counters.snapshot,
            asked.interval,
            rank * stages + stage,
            ranks * stages,
        )
        logger.info(
            "moe_placement_plugin: recording the load of %d MoE layers x %d experts to %s every %g s",
            len(routers), shape.num_experts, asked.path, asked.interval,
        )  # fmt: skip

    def batch(self, forward_batch: Any) -> None:
        """A batch of requests is about to run."""
        if self.recorder is None:
            return
        mode = forward_batch.forward_mode
        if mode.is_idle() or forward_batch.batch_size == 0:
            self.counters.mark_uncounted()
            return
        lengths = forward_batch.extend_seq_lens_cpu
        if mode.is_extend() and not mode.is_target_verify() and lengths is not None:
            tokens = np.asarray(lengths, dtype=np.int64)
            cached = np.asarray(forward_batch.extend_prefix_lens_cpu or np.zeros_like(tokens))
            # With chunked prefill, decoding requests ride along as extensions by one token.
            prefill = (
                (tokens > 1) | (cached == 0)
                if mode.is_mixed()
                else np.ones(len(tokens), dtype=bool)
            )
        else:
            size = forward_batch.batch_size
            # One token each, or several draft tokens each that are verified.
            each = (
                max(1, forward_batch.input_ids.shape[0] // size) if mode.is_target_verify() else 1
            )
            tokens, prefill = np.full(size, each), np.zeros(size, dtype=bool)
        self.counters.mark(tokens, prefill)
        self.recorder.served()


def _data_parallel_rank(runner: Any) -> int:
    if hasattr(runner, "ps"):  # up to 0.5.22
        return runner.ps.dp_rank or 0
    from sglang.srt.runtime_context import get_parallel

    return getattr(get_parallel(), "dp_rank", None) or 0


def _most_tokens(runner: Any, args: Any) -> int:
    chunk = args.chunked_prefill_size or -1
    largest = [args.max_prefill_tokens or 0, chunk, runner.model_config.context_len, 4096]
    return max(largest) + args.tp_size


def _routers(model: Any) -> dict[int, Any]:
    """Layer id -> TopK layer of every MoE layer, in order.

    Raises:
        PlacementError: when a layer routes inside its kernel.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    found: dict[int, Any] = {}
    backend = get_moe_runner_backend()
    for name, parent in model.named_modules():
        children = list(parent.children())
        experts = [child for child in children if isinstance(child, FusedMoE)]
        routers = [child for child in children if isinstance(child, TopK)]
        if not experts:
            continue
        if len(experts) != 1 or len(routers) != 1:
            raise PlacementError(
                f"--expert-load-record: {name} has {len(experts)} expert layers and {len(routers)} TopK layers, expected one of each: this "
                "model routes in a way of its own; leave the flag out"
            )
        output = getattr(routers[0].topk_config.output_format, "name", None)
        inside = (
            backend.is_triton_kernels()
            or backend.is_flashinfer_trtllm()
            or backend.is_flashinfer_mxfp4()
        )
        if output in ("BYPASSED", "TRITON_KERNEL") or (output is None and inside):
            raise PlacementError(
                f"--expert-load-record: {name} routes inside its kernel ({output or backend.value}), which reports no experts: choose "
                "--moe-runner-backend triton, or leave the flag out"
            )
        found[experts[0].layer_id] = routers[0]
    return dict(sorted(found.items()))


def _load_model(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    asked = current()
    if (
        asked is not None
        and not getattr(self, "is_draft_worker", False)
        and not hasattr(self, _RECORDING)
    ):
        setattr(self, _RECORDING, LoadRecording(asked, self))
    return result


def _forward(original: Callable, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    recording = getattr(self, _RECORDING, None)
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
    count = getattr(topk_config, _COUNT, None)
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
