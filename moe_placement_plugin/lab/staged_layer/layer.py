"""Run a whole staged layer, in one piece or in chunks whose exchange overlaps computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch

from ...core.errors import PlacementError
from ...core.placement import even_slots
from .collectives import EpGroup
from .dispatching import dispatch, gather_selection, gather_tokens, plan_dispatch
from .matmuls.base import Matmuls
from .matmuls.torch_matmuls import TILE
from .own_first import add_own, bring_others, own_rows, return_others
from .placed import PlacedExperts
from .results import ExpertHidden, RouteMetadata, Selection
from .select import Routing
from .stages import check_inputs, gmm_down, gmm_up, select, unroute
from .weights import ExpertWeights, SharedExperts


class ExchangeLane:
    """Run exchanges beside the computation: on a stream of its own on CUDA, at once elsewhere."""

    def __init__(self, device: torch.device):
        # Before the matmuls, whose thousands of blocks would else let an exchange begin only when
        # they end. NCCL has streams of its own: make the group with
        # ``ProcessGroupNCCL.Options(is_high_priority_stream=True)``.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Begin ``function(*arguments)`` after what the caller's stream holds now.

        The result is waited for by calling the answer.
        """
        if self._stream is None:
            result = function(*arguments)
            return lambda: result
        self._stream.wait_stream(torch.cuda.current_stream())
        _record(arguments, self._stream)
        with torch.cuda.stream(self._stream):
            result = function(*arguments)
            done = torch.cuda.Event()
            done.record(self._stream)

        def wait() -> Any:
            current = torch.cuda.current_stream()
            current.wait_event(done)
            _record(result, current)
            return result

        return wait


def _record(value: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that every tensor in ``value`` is used on ``stream`` too."""
    if isinstance(value, torch.Tensor):
        value.record_stream(stream)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _record(item, stream)
    elif is_dataclass(value):
        for field in fields(value):
            _record(getattr(value, field.name), stream)


@dataclass(eq=False)
class StagedMoE:
    """Compute a MoE layer on one rank of an EP group.

    Attributes:
        routing: the model's rule.
        placed: where the experts lie.
        weights: of this rank's slots.
        matmuls: who multiplies.
        group: the EP ranks.
        shared: shared experts, or None.
        use_ring: all-gather + reduce-scatter, or all-to-all.
        dealing: how replicas are dealt, see `PlacedExperts.deal`.
    """

    routing: Routing
    placed: PlacedExperts
    weights: ExpertWeights
    matmuls: Matmuls
    group: EpGroup
    shared: SharedExperts | None = None
    use_ring: bool = True
    dealing: Literal["hash", "turn"] = "hash"

    def __post_init__(self) -> None:
        # One rank has nothing to exchange, and nothing to gain from another stream.
        self._lane = ExchangeLane(
            self.weights.w13.device if self.group.size > 1 else torch.device("cpu")
        )

    def __call__(
        self,
        x: torch.Tensor,
        logits: torch.Tensor,
        token_chunks: int = 1,
        embedding_chunks: int = 1,
        tokens_per_rank: Sequence[int] | None = None,
        own_first: bool = False,
    ) -> torch.Tensor:
        """Return the layer's output for this rank's tokens.

        Args:
            x: ``[tokens, hidden]``.
            logits: ``[tokens, experts]``.
            token_chunks: split each rank's tokens into so many chunks; one chunk is exchanged while
                another is computed.
            embedding_chunks: with the ring: split the embedding, gathering the next columns while
                these are multiplied, and returning finished columns while the next are computed.
            tokens_per_rank: see `route`.
            own_first: chunk by source: a rank's own tokens are computed while the others' come and
                while the others' results go, see `own_first`. With one chunk of each.

        Returns:
            ``[tokens, hidden]``. On CPU with the torch matmuls the same bits for every number of
            chunks.

        Raises:
            PlacementError: when shapes or chunks do not fit.
        """
        check_inputs(x, logits, self.placed, self.group)
        if token_chunks < 1 or embedding_chunks < 1 or (token_chunks > 1 and embedding_chunks > 1):
            raise PlacementError(
                f"{token_chunks} token chunks and {embedding_chunks} embedding chunks: give 1 or "
                "more of one, 1 of the other"
            )
        if embedding_chunks > 1 and not self.use_ring:
            raise PlacementError(
                f"{embedding_chunks} embedding chunks with the all-to-all exchange: use "
                "token_chunks, or the ring"
            )
        if own_first and max(token_chunks, embedding_chunks) > 1:
            raise PlacementError(
                f"own_first with {token_chunks} token and {embedding_chunks} embedding chunks: "
                "give 1 of each or leave it out"
            )
        # Chosen for all tokens at once: a chunk must not choose or deal otherwise than the batch.
        selection = select(logits, self.routing, self.placed, 0, self.dealing)
        bounds = _bounds(x.shape[0], token_chunks)
        parts = [selection.rows(start, stop) for start, stop in bounds]
        per_chunk = None
        if tokens_per_rank is not None:
            per_chunk = list(zip(*(even_slots(n, token_chunks) for n in tokens_per_rank)))
        plans = plan_dispatch(parts, self.placed, self.group, self.use_ring, per_chunk)
        if embedding_chunks > 1:
            return self._by_columns(x, selection, plans[0], embedding_chunks)
        if own_first and self.group.size > 1:
            return self._by_source(x, selection, plans[0])
        return self._by_tokens([x[start:stop] for start, stop in bounds], parts, plans)

    def _by_tokens(
        self, xs: list[torch.Tensor], parts: list[Selection], plans: list[RouteMetadata]
    ) -> torch.Tensor:
        def bring(i: int) -> Callable[[], Any]:
            return self._lane.start(dispatch, xs[i], parts[i], plans[i], self.placed, self.group)

        coming, going = [bring(0)], []
        shared = self._shared(xs)
        for i in range(len(xs)):
            here = coming.pop()
            if i + 1 < len(xs):
                coming.append(bring(i + 1))
            rows, output, metadata = here()
            hidden = gmm_up(rows, output, self.weights, self.matmuls)
            partial = gmm_down(hidden, output, self.weights, self.matmuls)
            going.append(self._lane.start(unroute, partial, metadata, self.group))
        finished = [wait() for wait in going]
        result = finished[0] if len(finished) == 1 else torch.cat(finished)
        return result if shared is None else result + shared

    def _by_source(
        self, x: torch.Tensor, selection: Selection, plan: RouteMetadata
    ) -> torch.Tensor:
        coming = self._lane.start(bring_others, x, selection, plan, self.placed, self.group)
        rows, own = own_rows(x, selection, plan, self.placed)
        own_hidden = gmm_up(rows, own, self.weights, self.matmuls)
        shared = self._shared([x])
        rows, others = coming()
        partial = gmm_down(
            gmm_up(rows, others, self.weights, self.matmuls), others, self.weights, self.matmuls
        )
        going = self._lane.start(return_others, partial, plan, self.group)
        own_partial = gmm_down(own_hidden, own, self.weights, self.matmuls)
        result = add_own(going(), own_partial, plan, self.group)
        return result if shared is None else result + shared

    def _shared(self, xs: list[torch.Tensor]) -> torch.Tensor | None:
        """Compute the shared experts of all tokens at once, while the first chunk is under way."""
        if self.shared is None:
            return None
        return self.shared(xs[0] if len(xs) == 1 else torch.cat(xs))

    def _by_columns(
        self, x: torch.Tensor, selection: Selection, plan: RouteMetadata, chunks: int
    ) -> torch.Tensor:
        bounds = _column_bounds(x.shape[1], chunks)

        def bring(i: int) -> Callable[[], torch.Tensor]:
            start, stop = bounds[i]
            return self._lane.start(gather_tokens, x[:, start:stop], plan, self.group)

        described = self._lane.start(gather_selection, selection, plan, self.placed, self.group)
        coming = [bring(0)]
        shared = self._shared([x])
        output = described()
        hidden: ExpertHidden | None = None
        for i in range(chunks):
            here = coming.pop()
            if i + 1 < chunks:
                coming.append(bring(i + 1))
            hidden = gmm_up(here(), output, self.weights, self.matmuls, into=hidden)
        assert hidden is not None, "there is at least one chunk"
        going = []
        for start, stop in bounds:
            partial = gmm_down(hidden, output, self.weights, self.matmuls, start, stop)
            going.append(self._lane.start(unroute, partial, plan, self.group))
        result = torch.cat([wait() for wait in going], dim=1)
        return result if shared is None else result + shared


def _bounds(length: int, chunks: int) -> list[tuple[int, int]]:
    sizes = even_slots(length, chunks)
    stops = [sum(sizes[: i + 1]) for i in range(chunks)]
    return [(stop - size, stop) for stop, size in zip(stops, sizes)]


def _column_bounds(width: int, chunks: int) -> list[tuple[int, int]]:
    """Return chunks of whole tiles.

    A product on CPU is a sum over tiles, and a chunk must not cut one.
    """
    tiles = -(-width // TILE)
    if chunks > tiles:
        raise PlacementError(
            f"{chunks} embedding chunks of a hidden size of {width}: at most {tiles}, each a "
            f"multiple of {TILE} columns"
        )
    return [(start * TILE, min(stop * TILE, width)) for start, stop in _bounds(tiles, chunks)]
