"""Multiply in plain torch: grouped by slot, or dense (every slot computes every row).

On CPU a product is made of tiles of one fixed shape, padded with zeros: a BLAS picks its kernel,
and with it the order of additions, by the shape, and a token's last bits would depend on how many
others go to the same expert. So each token's result is the same bits in whatever batch it comes,
which is what lets chunked be compared with whole bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..results import RouteOutput
from ..weights import ExpertWeights
from .base import Matmuls, sum_choices

TILE_ROWS = 16
TILE = 64
"""Columns of a tile on CPU, along the embedding and along the output."""


def accumulate(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a [m, k] @ b [n, k].T`` to ``sums [m, n]``, in the type of ``sums``."""
    a, b = a.to(sums.dtype), b.to(sums.dtype)
    if sums.device.type != "cpu":
        sums.addmm_(a, b.T)
        return
    if not a.shape[0]:
        return
    height, (columns, width) = a.shape[0], b.shape
    tiles = -(-height // TILE_ROWS)
    rows = a.new_zeros((tiles * TILE_ROWS, width))
    rows[:height] = a
    parts = [
        rows[:, k : k + TILE].reshape(tiles, TILE_ROWS, -1).contiguous()
        for k in range(0, width, TILE)
    ]
    for column in range(0, columns, TILE):
        tile = sums.new_zeros((tiles * TILE_ROWS, min(TILE, columns - column)))
        tile[:height] = sums[:, column : column + TILE]
        tile = tile.view(tiles, TILE_ROWS, -1)
        for k, part in zip(range(0, width, TILE), parts):
            tile.baddbmm_(
                part, b[column : column + TILE, k : k + TILE].T.contiguous().expand(tiles, -1, -1)
            )
        sums[:, column : column + TILE] = tile.view(tiles * TILE_ROWS, -1)[:height]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class SortedPlan:
    """Hold assignments sorted by slot.

    Attributes:
        rows: int64 ``[assignments]``, the row of each.
        position: int64 ``[rows, top_k]``, where each choice is in the sorted order, the number of
            assignments where it lies on another rank.
        bounds: slot s has the assignments ``bounds[s]:bounds[s + 1]``, ``[slots + 1]``.
    """

    rows: torch.Tensor
    position: torch.Tensor
    bounds: list[int]


class TorchMatmuls(Matmuls):
    """Multiply once per slot that has rows.

    It waits for the device once, to learn the group sizes.
    """

    name = f"torch {torch.__version__}"

    def plan(self, x: torch.Tensor, output: RouteOutput, weights: ExpertWeights) -> SortedPlan:
        flat = output.local_slots.flatten().long()
        bounds = [0, *output.group_sizes.cumsum(0).tolist()]
        order = torch.where(flat < 0, output.num_slots, flat).argsort(stable=True)[: bounds[-1]]
        position = torch.full_like(flat, bounds[-1])
        position[order] = torch.arange(bounds[-1], device=flat.device)
        top_k = output.local_slots.shape[1]
        return SortedPlan(order // top_k, position.view(-1, top_k), bounds)

    def up(self, x, output, plan, w13):
        return self.up_columns(x, output, plan, w13, None)

    def up_columns(self, x, output, plan, w13, sums):
        if sums is None:
            sums = x.new_zeros((plan.bounds[-1], w13.shape[1]), dtype=_wide(x.dtype))
        self._grouped(sums, x[plan.rows], plan, w13)
        return sums

    @staticmethod
    def _grouped(sums: torch.Tensor, a: torch.Tensor, plan: SortedPlan, w: torch.Tensor) -> None:
        for slot, (start, stop) in enumerate(zip(plan.bounds, plan.bounds[1:])):
            if stop > start:
                accumulate(sums[start:stop], a[start:stop], w[slot])

    def down(self, hidden, output, plan, w2):
        # One row more, of zeros, for the choices of other ranks.
        values = hidden.new_zeros((plan.bounds[-1] + 1, w2.shape[1]), dtype=_wide(hidden.dtype))
        self._grouped(values[:-1], hidden, plan, w2)
        weighted = values[plan.position] * output.weights.unsqueeze(-1).to(values.dtype)
        return sum_choices(weighted).to(hidden.dtype)


class DenseMatmuls(Matmuls):
    """Have every slot compute every row; router weights of slots not chosen are 0.

    It never waits for the device.
    """

    name = f"dense torch {torch.__version__}"

    def plan(self, x, output, weights):
        """Return the router's weight of each slot for each row, ``[slots, rows]``.

        It is 0 where a slot was not chosen.
        """
        table = x.new_zeros((output.num_rows, output.num_slots + 1), dtype=_wide(x.dtype))
        slots = output.local_slots.long()
        # A row's choices are distinct slots, but for those of other ranks, which share the column
        # that is cut off.
        table.scatter_(
            1, torch.where(slots < 0, output.num_slots, slots), output.weights.to(table.dtype)
        )
        return table[:, : output.num_slots].T.contiguous()

    def up(self, x, output, plan, w13):
        return self.up_columns(x, output, plan, w13, None)

    def up_columns(self, x, output, plan, w13, sums):
        if sums is None:
            sums = x.new_zeros((w13.shape[0], x.shape[0], w13.shape[1]), dtype=_wide(x.dtype))
        for slot in range(w13.shape[0]):
            accumulate(sums[slot], x, w13[slot])
        return sums

    def down(self, hidden, output, plan, w2):
        total = hidden.new_zeros((output.num_rows, w2.shape[1]), dtype=_wide(hidden.dtype))
        for slot in range(w2.shape[0]):
            values = torch.zeros_like(total)
            accumulate(values, hidden[slot], w2[slot])
            total += plan[slot, :, None] * values
        return total.to(hidden.dtype)
