"""Count tokens per logical expert on the device, inside the forward pass.

Everything that the forward pass touches is allocated once and keeps its address, so that the few
operations per layer can be captured in a CUDA graph and replayed. Nothing waits for the device and
nothing is copied to the host there. The counters only ever grow; windows are differences of
snapshots, so no count is lost or doubled while a snapshot is being taken beside a running forward
pass.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ..core.load import DECODE, PREFILL

PHASES = (PREFILL, DECODE)
"""What a token was computed for. A snapshot's first axis follows this order."""

_KEPT = 256
"""Tokens whose choices a CPU keeps before it counts them.

numpy's calls, cold after a layer of torch, take longer than counting: a decode step of few tokens
is not to pay for them.
"""

_UNCOUNTED = 0  # row of padding tokens and of dummy batches; row p + 1 is phase p


class LoadCounters:
    """Count tokens per layer, phase and logical expert of one process.

    A token's row (uncounted, prefill, decode) is written before the forward pass, its experts are
    added during it. One spare slot before and one behind the experts of each row take ids outside
    ``0..experts-1``: kernels mark skipped tokens with -1, and fused shared experts have ids behind
    the routed ones.

    Args:
        num_layers: MoE layers of this process.
        num_experts: logical experts per layer.
        max_tokens: most tokens of a forward pass, padding included.
        device: where the model runs.
        coactivation: also count which experts are chosen together.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        max_tokens: int,
        device: Any,
        coactivation: bool = False,
    ):
        import torch

        self.num_experts = num_experts
        # With its index: the thread that takes snapshots has a current device of its own.
        self.device = torch.empty(0, device=device).device
        self._width = num_experts + 2
        self._counts = torch.zeros(
            (num_layers, (len(PHASES) + 1) * self._width), dtype=torch.int64, device=self.device
        )
        self._pairs = None
        if coactivation:
            self._pairs = torch.zeros(
                (num_layers, self._width, self._width), dtype=torch.int64, device=self.device
            )
        # Index of expert 0 in the token's row of `_counts`.
        self._start = torch.full(
            (max_tokens, 1), 1 + _UNCOUNTED * self._width, dtype=torch.int64, device=self.device
        )
        self._one = torch.ones((), dtype=torch.int64, device=self.device)
        self._marked = 0
        # What `mark` was told last: one decode step after the other has the same batch.
        self._batch: tuple[bytes, bytes] | None = None
        self._kernel = kernel() if self.device.type == "cuda" else None
        self._on_host: tuple[np.ndarray, np.ndarray] | None = None
        if self.device.type == "cpu":
            self._on_host = self._counts.numpy(), self._start.numpy()
        self._kept = _Kept(num_layers) if self._on_host and not coactivation else None
        # The forward pass adds to what is kept while a snapshot, in a thread of its own, empties
        # it.
        self._lock = threading.Lock()
        self._is_compiling = torch.compiler.is_compiling
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._host: list[Any] = []

    def mark(self, tokens_per_request: np.ndarray, is_prefill: np.ndarray) -> None:
        """Say what the tokens of the coming forward pass are.

        Args:
            tokens_per_request: ``[requests]``, in the order of the batch.
            is_prefill: bool ``[requests]``.
        """
        batch = tokens_per_request.tobytes(), is_prefill.tobytes()
        if batch == self._batch:
            return
        self._batch = batch
        starts = np.where(is_prefill, 1 + self._width, 1 + 2 * self._width)
        starts = np.repeat(starts, tokens_per_request)[: len(self._start), None]
        tokens = len(starts)
        if self._on_host is not None:
            _, marks = self._on_host
            if self._kept is not None:
                self._kept.end_step()
            marks[:tokens] = starts
            marks[tokens : self._marked] = 1 + _UNCOUNTED * self._width
        else:
            import torch

            values = torch.full(
                (max(tokens, self._marked), 1), 1 + _UNCOUNTED * self._width, dtype=torch.int64
            )
            values[:tokens] = torch.from_numpy(starts)
            if self._stream is not None:
                # torch's allocator of pinned memory keeps the buffer until the copy has run.
                values = values.pin_memory()
            self._start[: len(values)].copy_(values, non_blocking=True)
        self._marked = tokens

    def mark_uncounted(self) -> None:
        """Say that the coming forward pass is a dummy.

        Such are profiling, graph capture and those of an idle data-parallel rank.
        """
        if self._marked:
            if self._kept is not None:
                self._kept.end_step()
            self._start[: self._marked].fill_(1 + _UNCOUNTED * self._width)
            self._marked = 0
            self._batch = None

    def count(self, layer: int, ids: Any, first: int = 0) -> None:
        """Count one layer's choices; part of the forward pass.

        Args:
            layer: row of the layer in the counters.
            ids: logical expert ids, ``[tokens, top_k]``.
            first: position in the batch of the first of these tokens.
        """
        if self._kept is not None and not self._is_compiling():
            with self._lock:
                if not self._kept.add(layer, ids, first):
                    self._begin_step(layer, ids, first)
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

    def _begin_step(self, layer: int, ids: Any, first: int) -> None:
        """Keep the first choices of a forward pass, or count them where they cannot be kept."""
        assert self._on_host is not None and self._kept is not None, "asked on the host alone"
        starts = self._on_host[1][first : first + len(ids)]
        if len(starts) < len(ids) or not self._kept.fits(ids):
            self._add(slice(layer, layer + 1), ids.numpy()[None], starts)
            return
        if self._kept.is_full(ids):
            self._count_kept()
        self._kept.begin_step(ids, first, starts)
        self._kept.add(layer, ids, first)

    def _count_kept(self) -> None:
        """Count what was kept; the lock is held."""
        if self._kept is not None and self._kept.tokens:
            self._add(slice(None), *self._kept.take())

    def _add(self, layers: slice, ids: np.ndarray, start: np.ndarray) -> None:
        """Count ``ids [layers, tokens, top_k]`` with marks ``start [tokens, 1]`` on the host."""
        assert self._on_host is not None, "asked on the host alone"
        counts, _ = self._on_host
        ids = ids[:, : len(start)]
        if ids.dtype.kind == "i":
            ids = np.maximum(ids, -1)
        index = np.minimum(ids, self.num_experts) + start
        index += np.arange(len(ids))[:, None, None] * counts.shape[1]
        counts[layers] += np.bincount(index.ravel(), minlength=len(ids) * counts.shape[1]).reshape(
            len(ids), -1
        )

    def snapshot(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Copy the counts so far, beside the forward pass on a stream of their own.

        Only the calling thread waits.

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
            with self._lock:
                self._count_kept()
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


class _Kept:
    """Keep choices on the host that are still to be counted, one forward pass after the other.

    A step is what one forward pass, or a part of it with another share of the batch, adds: a block
    of all layers, in which -1, no expert, stands until a layer has come.
    """

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._choices: Any = None  # [layers, _KEPT, top_k], once top_k is known
        self._marks = np.empty((_KEPT, 1), dtype=np.int64)
        self._shape: Any = None
        self._first = 0
        # The current step's block, layer by layer; None for a layer that has come.
        self._views: list[Any] = []
        # First token -> block, for steps of the current shape.
        self._blocks: dict[int, tuple[Any, ...]] = {}
        self.tokens = 0

    def add(self, layer: int, ids: Any, first: int) -> bool:
        """Keep a layer's ``ids`` if they belong to the current step; tell whether they do.

        Whatever is done here is done in each layer.
        """
        if ids.shape != self._shape or first != self._first or not self._views:
            return False
        view = self._views[layer]
        if view is None:
            return False
        self._views[layer] = None
        view.copy_(ids)
        return True

    def fits(self, ids: Any) -> bool:
        """Tell whether choices like ``ids`` can be kept at all."""
        tokens, top_k = ids.shape
        if self._choices is None:
            import torch

            # Snapshots write to it outside of inference mode, in which forward passes run.
            with torch.inference_mode(False):
                self._choices = torch.full((self._num_layers, _KEPT, top_k), -1, dtype=ids.dtype)
        like_others = top_k == self._choices.shape[2] and ids.dtype == self._choices.dtype
        return bool(tokens <= _KEPT and like_others)

    def is_full(self, ids: Any) -> bool:
        """Tell whether what is kept must be counted before ``ids`` can be kept."""
        return self.tokens + len(ids) > _KEPT

    def begin_step(self, ids: Any, first: int, start: np.ndarray) -> None:
        """Make room for tokens like ``ids``, whose marks are ``start [tokens, 1]``."""
        if ids.shape != self._shape:
            self._blocks.clear()
        end = self.tokens + len(ids)
        if self.tokens not in self._blocks:
            self._blocks[self.tokens] = self._choices[:, self.tokens : end].unbind()
        self._marks[self.tokens : end] = start
        self._views = list(self._blocks[self.tokens])
        self._shape, self._first, self.tokens = ids.shape, first, end

    def end_step(self) -> None:
        """Take whatever comes next for another batch, with other marks."""
        self._views = []

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Give up all that is kept: choices ``[layers, tokens, top_k]``, marks ``[tokens, 1]``."""
        choices = self._choices[:, : self.tokens]
        taken = choices.numpy().copy(), self._marks[: self.tokens].copy()
        choices.fill_(-1)
        self.tokens = 0
        self.end_step()
        return taken


def kernel() -> Any:
    """Return the one-kernel version of counting, None where Triton is missing."""
    try:
        from .counters_triton import count  # lazy: heavy
    except ImportError:
        return None
    return count
