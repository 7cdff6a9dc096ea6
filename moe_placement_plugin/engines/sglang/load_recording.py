"""Count the load of one model of a worker, target or draft.

The counters are bound to its TopK layers, and are told of each batch what it is.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...hosts import session
from ...recording.counters import LoadCounters
from ...recording.recorder import LoadRecorder, Windows
from ..common.settings import RecordingSettings
from .compat import attention_dp_width, replicas, resolved
from .layers import moe_blocks, routing_kernel

logger = logging.getLogger(__name__)

COUNT = "_moe_expert_load_count"
"""Attribute of the TopK config of every recorded MoE layer: (counters, row of the layer)."""

RECORDING = "_moe_expert_load_recording"
"""Attribute of SGLang's ``ModelRunner``: its `LoadRecording`."""


class LoadRecording:
    """Bind the counters of one model runner to its TopK layers, and hold their recorder.

    Args:
        asked: path, interval and whether pairs are counted.
        runner: SGLang's ``ModelRunner``, whose model is loaded.
        routers: number of each MoE layer -> its TopK layer.
        experts: logical experts of a layer.
        model: what the user called the model.
    """

    def __init__(
        self,
        asked: RecordingSettings,
        runner: Any,
        routers: dict[int, Any],
        experts: int,
        model: str,
    ):
        import sglang
        from sglang.srt.runtime_context import get_parallel

        from ..._version import __version__  # lazy: heavy

        args = resolved(runner.server_args)
        config = runner.model_config.hf_text_config
        width, copies = attention_dp_width(args), replicas(args)
        attention_dp = width > 1
        tp_rank, stage = get_parallel().tp_rank, get_parallel().pp_rank
        # With data-parallel attention every rank has tokens of its own; else all tensor-parallel
        # ranks have the same.
        counts = attention_dp or tp_rank == 0
        self.recorder: LoadRecorder | None = None
        if not counts or not routers:
            return
        tokens = _most_tokens(runner, args)
        self.counters = LoadCounters(
            len(routers), experts, tokens, runner.device, asked.coactivation
        )
        for row, router in enumerate(routers.values()):
            object.__setattr__(router.topk_config, COUNT, (self.counters, row))
        rank = _data_parallel_rank(runner) if copies > 1 else 0
        ranks = copies
        if attention_dp:
            rank, ranks = rank * args.tp_size + tp_rank, copies * args.tp_size
        stages = getattr(args, "pp_size", 1)
        metadata = {
            "model": model,
            "engine": f"sglang {sglang.__version__}",
            "plugin": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "tensor_parallel_size": args.tp_size,
            "data_parallel_size": width * copies,
            "expert_parallel": getattr(args, "ep_size", 1) > 1,
            "hosts": session.host_names(),
            "top_k": getattr(config, "num_experts_per_tok", None),
        }
        windows = Windows(tuple(routers), experts, asked.interval, metadata)
        self.recorder = LoadRecorder(
            asked.path,
            windows,
            self.counters.snapshot,
            asked.interval,
            rank * stages + stage,
            ranks * stages,
        )
        logger.info(
            "moe_placement_plugin: recording the load of %d MoE layers x %d experts to %s every "
            "%g s",
            len(routers), experts, asked.path, asked.interval,
        )  # fmt: skip

    def batch(self, forward_batch: Any) -> None:
        """Note that a batch of requests is about to run."""
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


def routers_of(model: Any) -> dict[str, tuple[Any, Any]]:
    """Map the name of every MoE block to its ``FusedMoE`` and ``TopK``.

    Raises:
        PlacementError: when a layer routes inside its kernel.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name, experts, router in moe_blocks(model, "--expert-load-record: ", "leave the flag out"):
        kernel = routing_kernel(router)
        if kernel is not None:
            raise PlacementError(
                f"--expert-load-record: {name} routes inside its kernel ({kernel}), which reports "
                "no experts: choose --moe-runner-backend triton, or leave the flag out"
            )
        found[name] = experts, router
    return found
