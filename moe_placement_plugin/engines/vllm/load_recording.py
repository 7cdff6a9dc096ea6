"""The counters of one worker of vLLM: which tokens of a batch count, and as what."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import numpy as np

from ..._version import __version__
from ...core.errors import PlacementError
from ...hosts import session
from ...recording.counters import LoadCounters
from ...recording.recorder import LoadRecorder, Windows
from ..common.settings import RecordingSettings
from .capture_points import capture_points

logger = logging.getLogger("vllm.moe_placement_plugin")


class LoadRecording:
    """The counters of one worker process, bound to its model's routers, and their recorder."""

    def __init__(self, record: RecordingSettings, vllm_config: Any, model: Any, device: Any):
        import vllm
        from vllm.distributed import get_tensor_model_parallel_rank

        parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
        self.tp_rank, self.tp_size = get_tensor_model_parallel_rank(), parallel.tensor_parallel_size
        self.dp_rank = parallel.data_parallel_rank
        # Tensor-parallel ranks see the same tokens, unless sequence parallelism gives each a share of them.
        self.shards = self.tp_size if getattr(parallel, "use_sequence_parallel_moe", False) else 1
        self.active = self.tp_rank < self.shards
        self.last_batch: tuple[np.ndarray, np.ndarray] | None = None
        self.target: LoadRecording | None = None  # of a draft's
        self.layers = capture_points(model) if self.active else {}
        self.recorder: LoadRecorder | None = None
        if not self.layers:
            return
        largest_graph = (
            getattr(vllm_config.compilation_config, "max_cudagraph_capture_size", None) or 0
        )
        tokens = max(scheduler.max_num_batched_tokens, largest_graph) + self.tp_size
        self.counters = LoadCounters(
            len(self.layers), record.num_experts, tokens, device, record.coactivation
        )
        alone = parallel.data_parallel_size == self.shards == 1
        for row, set_capture in enumerate(self.layers.values()):
            set_capture(partial(self.counters.count if alone else self.capture, row))
        stages, stage = parallel.pipeline_parallel_size, _pipeline_rank()
        part = (self.dp_rank * stages + stage) * self.shards + (
            self.tp_rank if self.shards > 1 else 0
        )
        metadata = {
            "model": record.model,
            "engine": f"vllm {vllm.__version__}",
            "plugin": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "tensor_parallel_size": self.tp_size,
            "data_parallel_size": parallel.data_parallel_size,
            "expert_parallel": bool(parallel.enable_expert_parallel),
            "hosts": session.host_names(),
            "top_k": vllm_config.model_config.get_num_experts_per_tok()
            if hasattr(vllm_config.model_config, "get_num_experts_per_tok")
            else None,
        }
        windows = Windows(tuple(self.layers), record.num_experts, record.interval, metadata)
        num_parts = parallel.data_parallel_size * stages * self.shards
        self.recorder = LoadRecorder(
            record.path, windows, self.counters.snapshot, record.interval, part, num_parts
        )
        logger.info(
            "moe_placement_plugin: recording the load of %d MoE layers x %d experts to %s every %g s",
            len(self.layers), record.num_experts, record.path, record.interval,
        )  # fmt: skip

    def batch(self, tokens_per_request: np.ndarray, is_prefill: np.ndarray) -> None:
        """A batch of real requests is about to run."""
        self.last_batch = tokens_per_request, is_prefill
        if self.recorder is not None:
            self.counters.mark(tokens_per_request, is_prefill)
            self.recorder.served()

    def dummy(self) -> None:
        """A dummy batch is about to run."""
        if self.recorder is not None:
            self.counters.mark_uncounted()

    def capture(self, row: int, topk_ids: Any) -> None:
        """Count one layer's choices, ``topk_ids [tokens, top_k]``, which may be of several data-parallel ranks.

        The sizes that tell the layouts apart are on the host and fixed for a CUDA graph.
        """
        from vllm.forward_context import get_forward_context

        across = getattr(get_forward_context().dp_metadata, "num_tokens_across_dp_cpu", None)
        if across is None:
            self.counters.count(row, topk_ids)
            return
        sizes = [int(n) for n in across.tolist()]
        own, seen = sizes[self.dp_rank], topk_ids.shape[0]
        shard_sizes = getattr(get_forward_context().dp_metadata, "local_sizes", None)
        if seen == own and self.shards == 1:
            self.counters.count(row, topk_ids)
        elif seen == sum(sizes):  # gathered before routing, rank after rank
            begin = sum(sizes[: self.dp_rank])
            self._count_once(row, topk_ids[begin : begin + own])
        elif shard_sizes is not None and seen == sum(shard_sizes):  # likewise, in padded shards
            begin = sum(shard_sizes[: self.dp_rank * (len(shard_sizes) // len(sizes))])
            self._count_once(row, topk_ids[begin : begin + own])
        elif self.shards > 1 and seen == -(-own // self.tp_size):
            self.counters.count(row, topk_ids, first=self.tp_rank * seen)
        else:
            raise PlacementError(
                f"--expert-load-record: a MoE layer routes {seen} tokens, data-parallel ranks have {sizes}: this layout is not "
                "known; leave the flag out"
            )

    def _count_once(self, row: int, ids: Any) -> None:
        if self.tp_rank == 0:
            self.counters.count(row, ids)


def _pipeline_rank() -> int:
    from vllm.distributed import get_pp_group

    return get_pp_group().rank_in_group
