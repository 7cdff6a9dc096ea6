"""Hold how many tokens each logical expert received: what placements are planned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .errors import PlacementError

PREFILL, DECODE, MIXED = PHASES = ("prefill", "decode", "mixed")
"""What a forward pass, or a window of them, is: prompts only, generation only, or both."""


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Count tokens per window of time (or workload), MoE layer and logical expert.

    Attributes:
        counts: int64 or float64 ``[windows, layers, experts]``, tokens routed to each logical
            expert; one window may be given as ``[layers, experts]``.
        layer_ids: index of each row's layer within the model, ``[layers]``; ``0..layers-1`` when
            left empty.
        phases: what each window holds, ``[windows]``: ``"prefill"``, ``"decode"`` or ``"mixed"``,
            which all hold when left empty.
        coactivation: optional int64 or float64 ``[layers, experts, experts]``, tokens that chose
            both experts; symmetric, its diagonal unused.
        metadata: free-form facts (model, engine, time, ...), JSON-compatible.

    Raises:
        PlacementError: when shapes disagree or a count is negative or not finite.
    """

    counts: np.ndarray
    layer_ids: tuple[int, ...] = ()
    phases: tuple[str, ...] = ()
    coactivation: np.ndarray | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = _as_counts(self.counts, "counts")
        if counts.ndim == 2:
            counts = counts[None]
        if counts.ndim != 3 or 0 in counts.shape:
            raise PlacementError(
                f"a load of shape {counts.shape}: it must be [windows, layers, experts] (or "
                "[layers, experts]) and not empty; record again"
            )
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)
        windows, layers, experts = counts.shape
        ids = tuple(int(i) for i in self.layer_ids) or tuple(range(layers))
        if len(ids) != layers or len(set(ids)) != layers:
            raise PlacementError(
                f"{len(ids)} layer_ids for {layers} layers: give one distinct id per layer"
            )
        object.__setattr__(self, "layer_ids", ids)
        phases = tuple(self.phases) or (MIXED,) * windows
        if len(phases) != windows or not set(phases) <= set(PHASES):
            raise PlacementError(
                f"phases {phases} for {windows} windows: give prefill, decode or mixed for each "
                "window"
            )
        object.__setattr__(self, "phases", phases)
        if self.coactivation is not None:
            pairs = _as_counts(self.coactivation, "coactivation")
            if pairs.shape != (layers, experts, experts):
                raise PlacementError(
                    f"coactivation of shape {pairs.shape}: it must be {(layers, experts, experts)}"
                )
            pairs.setflags(write=False)
            object.__setattr__(self, "coactivation", pairs)

    @property
    def num_windows(self) -> int:
        """Count the windows."""
        return self.counts.shape[0]

    @property
    def num_layers(self) -> int:
        """Count the layers, including rows of dense layers if the recorder wrote such."""
        return self.counts.shape[1]

    @property
    def num_experts(self) -> int:
        """Count the logical experts of a layer."""
        return self.counts.shape[2]

    @property
    def total(self) -> np.ndarray:
        """Add the counts up over the windows, ``[layers, experts]``."""
        return self.counts.sum(axis=0)

    def require_tokens(self, layer_ids: Sequence[int] = ()) -> None:
        """Refuse a load without a token.

        A plan would be made from it all the same, as if all experts were used alike.

        Args:
            layer_ids: the layers that must have one each, where it is known which are MoE layers.

        Raises:
            PlacementError: naming the first layer without a token.
        """
        seen = np.asarray(self.counts.any(axis=(0, 2)))
        if not seen.any():
            raise PlacementError(
                "the recording is empty (no token in any layer): record while requests are served"
            )
        without = [i for i in layer_ids if not seen[self.layer_ids.index(i)]]
        if without:
            raise PlacementError(
                f"the recording has no token in MoE layer {without[0]} ({len(without)} of "
                f"{len(layer_ids)} layers have none): it is a part of a recording, or of another "
                "model; record on this one, all pipeline stages together"
            )

    def moe_layers(self) -> ExpertLoad:
        """Leave out the rows that saw no token.

        Recorders that number dense layers too write such.

        Raises:
            PlacementError: when no row saw a token.
        """
        self.require_tokens()
        return self._rows(np.flatnonzero(self.counts.any(axis=(0, 2))).tolist())

    def select_layers(self, layer_ids: Sequence[int]) -> ExpertLoad:
        """Return the load of just the given layers of the model, in the given order.

        A load whose rows are numbered from 0 and are as many as the layers asked for is taken row
        by row: recorders that number only MoE layers write such.

        Raises:
            PlacementError: when the load does not have these layers.
        """
        if tuple(layer_ids) == self.layer_ids:
            return self
        if set(layer_ids) <= set(self.layer_ids):
            return self._rows([self.layer_ids.index(i) for i in layer_ids])
        if self.num_layers == len(layer_ids) and self.layer_ids == tuple(range(self.num_layers)):
            return replace(self, layer_ids=tuple(layer_ids))
        raise PlacementError(
            f"the load has {self.num_layers} layers, the model has {len(layer_ids)} MoE layers "
            f"({min(layer_ids)}..{max(layer_ids)}): it was recorded on another model; record on "
            "this one"
        )

    def _rows(self, rows: list[int]) -> ExpertLoad:
        return replace(
            self,
            counts=self.counts[:, rows],
            layer_ids=tuple(self.layer_ids[r] for r in rows),
            coactivation=None if self.coactivation is None else self.coactivation[rows],
        )

    @classmethod
    def concatenate(cls, loads: Sequence[ExpertLoad]) -> ExpertLoad:
        """Join the windows of several loads; co-activation is added up where all have it.

        Raises:
            PlacementError: when the loads are of different layers or experts.
        """
        first = loads[0]
        for other in loads[1:]:
            if other.layer_ids != first.layer_ids or other.num_experts != first.num_experts:
                raise PlacementError(
                    f"loads of {first.num_layers} layers x {first.num_experts} experts and "
                    f"{other.num_layers} x {other.num_experts}: loads to be planned together must "
                    "be of one model"
                )
        counted = [load.coactivation for load in loads if load.coactivation is not None]
        pairs = np.sum(counted, axis=0) if len(counted) == len(loads) else None
        return cls(
            counts=np.concatenate([load.counts for load in loads]),
            layer_ids=first.layer_ids,
            phases=tuple(phase for load in loads for phase in load.phases),
            coactivation=pairs,
            metadata=first.metadata,
        )


def _as_counts(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        raise PlacementError(
            f"{name} has rows of different lengths: every layer needs the same experts"
        ) from None
    if array.dtype == bool or not (
        np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    ):
        raise PlacementError(
            f"{name} has type {array.dtype}: token counts are numbers; record again"
        )
    array = np.array(
        array, dtype=np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64
    )
    bad = np.argwhere(~np.isfinite(array) | (array < 0))
    if bad.size:
        where = tuple(int(i) for i in bad[0])
        raise PlacementError(
            f"{name}{list(where)} is {array[where]}: token counts must be finite and not "
            "negative; record again"
        )
    return array
