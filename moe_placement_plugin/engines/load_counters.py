"""Counting tokens per logical expert on the device, inside the forward pass.

Everything that the forward pass touches is allocated once and keeps its address, so that the few operations
per layer can be captured in a CUDA graph and replayed. Nothing waits for the device and nothing is copied to
the host there. The counters only ever grow; windows are differences of snapshots, so no count is lost or
doubled while a snapshot is being taken beside a running forward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PHASES = ("prefill", "decode")
"""What a token was computed for. A snapshot's first axis follows this order."""

_UNCOUNTED = 0  # row of padding tokens and of dummy batches; row p + 1 is phase p


class LoadCounters:
    """Token counts per layer, phase and logical expert of one process.

    A token's row (uncounted, prefill, decode) is written before the forward pass, its experts are added during
    it. One spare slot before and one behind the experts of each row take ids outside ``0..experts-1``: kernels
    mark skipped tokens with -1, and fused shared experts have ids behind the routed ones.

    Args:
        num_layers: MoE layers of this process.
        num_experts: logical experts per layer.
        max_tokens: most tokens of a forward pass, padding included.
        device: where the model runs.
        coactivation: also count which experts are chosen together.
    """

    def __init__(self, num_layers: int, num_experts: int, max_tokens: int, device: Any, coactivation: bool = False):
        import torch

        self.num_experts = num_experts
        # With its index: the thread that takes snapshots has a current device of its own.
        self.device = torch.empty(0, device=device).device
        self._width = num_experts + 2
        self._counts = torch.zeros((num_layers, (len(PHASES) + 1) * self._width), dtype=torch.int64, device=self.device)
        self._pairs = None
        if coactivation:
            self._pairs = torch.zeros((num_layers, self._width, self._width), dtype=torch.int64, device=self.device)
        # Index of expert 0 in the token's row of `_counts`.
        self._start = torch.full((max_tokens, 1), 1 + _UNCOUNTED * self._width, dtype=torch.int64, device=self.device)
        self._one = torch.ones((), dtype=torch.int64, device=self.device)
        self._marked = 0
        self._kernel = _kernel() if self.device.type == "cuda" else None
        # On the host, small batches spend more time in calling torch than in counting.
        self._on_host = (self._counts.numpy(), self._start.numpy()) if self.device.type == "cpu" else None
        self._is_compiling = torch.compiler.is_compiling
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._host: list[Any] = []

    def mark(self, tokens_per_request: np.ndarray, is_prefill: np.ndarray) -> None:
        """Say what the tokens of the coming forward pass are.

        Args:
            tokens_per_request: ``[requests]``, in the order of the batch.
            is_prefill: bool ``[requests]``.
        """
        import torch

        rows = np.where(is_prefill, 1, 2)
        tokens = min(int(tokens_per_request.sum()), len(self._start))
        size = max(tokens, self._marked)
        start = np.full((size, 1), 1 + _UNCOUNTED * self._width, dtype=np.int64)
        start[:tokens, 0] = np.repeat(1 + rows * self._width, tokens_per_request)[:tokens]
        values = torch.from_numpy(start)
        if self._stream is not None:
            # torch's allocator of pinned memory keeps the buffer until the copy has run.
            values = values.pin_memory()
        self._start[:size].copy_(values, non_blocking=True)
        self._marked = tokens

    def mark_uncounted(self) -> None:
        """Say that the coming forward pass is a dummy: profiling, graph capture, an idle data-parallel rank."""
        if self._marked:
            self._start[: self._marked].fill_(1 + _UNCOUNTED * self._width)
            self._marked = 0

    def count(self, layer: int, ids: Any, first: int = 0) -> None:
        """Count one layer's choices; part of the forward pass.

        Args:
            layer: row of the layer in the counters.
            ids: logical expert ids, ``[tokens, top_k]``.
            first: position in the batch of the first of these tokens.
        """
        if self._on_host is not None and self._pairs is None and not self._is_compiling():
            counts, starts = self._on_host
            start = starts[first : first + ids.shape[0]]
            chosen = ids.numpy()[: len(start)]
            if chosen.dtype.kind == "i":
                chosen = np.maximum(chosen, -1)
            index = np.minimum(chosen, self.num_experts) + start
            counts[layer] += np.bincount(index.ravel(), minlength=counts.shape[1])
            return
        start = self._start[first : first + ids.shape[0]]
        ids = ids[: start.shape[0]]
        if self._kernel is not None:
            self._kernel(ids, start, self._counts[layer], self.num_experts)
            if self._pairs is None:
                return
        ids = ids.long().clamp(-1, self.num_experts)
        if self._kernel is None:
            index = (ids + start).flatten()
            self._counts[layer].scatter_add_(0, index, self._one.expand_as(index))
        if self._pairs is not None:
            # 0 and 1 are exact in single precision, and so are sums of fewer than 2**24 of them.
            chosen = ids.new_zeros((ids.shape[0], self._width)).float()
            chosen.scatter_(1, ids + 1, (start > self._width).float().expand_as(ids))
            self._pairs[layer].add_((chosen.T @ chosen).long())

    def snapshot(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The counts so far, copied beside the forward pass on a stream of its own; waits only in the calling thread.

        Returns:
            (int64 ``[phases, layers, experts]``, int64 ``[layers, experts, experts]`` or None).
        """
        counts, pairs = self._to_host()
        experts = slice(1, self.num_experts + 1)
        counts = counts.reshape(len(counts), len(PHASES) + 1, self._width)[:, 1:, experts]
        if pairs is not None:
            pairs = pairs[:, experts, experts]
            pairs = pairs * ~np.eye(self.num_experts, dtype=bool)
        return np.ascontiguousarray(counts.transpose(1, 0, 2)), pairs

    def _to_host(self) -> tuple[np.ndarray, np.ndarray | None]:
        import torch

        tensors = [t for t in (self._counts, self._pairs) if t is not None]
        if self._stream is None:
            copies = [t.cpu().numpy().copy() for t in tensors]
        else:
            if not self._host:
                self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                for host, tensor in zip(self._host, tensors):
                    host.copy_(tensor, non_blocking=True)
                self._stream.synchronize()
            copies = [host.numpy().copy() for host in self._host]
        return copies[0], copies[1] if len(copies) > 1 else None


def _kernel() -> Any:
    """The one-kernel version of counting, None where Triton is missing."""
    try:
        from .load_kernel import count
    except ImportError:
        return None
    return count
