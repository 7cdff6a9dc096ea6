"""Predict the time of a rank's MoE layer by a model that is fitted to measurements.

The model goes by tokens and active experts. A grouped expert GEMM reads the weights of every expert
that has a token (which dominates small decode batches) and computes for every token (which
dominates prefill); what is done once for each row that arrives at the rank, sorting and adding up
its experts' results, depends on the exchange: ``fixed + per_expert * active + per_token * tokens +
per_row * rows``. At small batches a rank with few tokens on many experts can be the slow one, which
is why token balance alone can buy nothing there (METRO; PB-OEPLB).

Nothing here is measured by the package itself: a calibration file holds measurements of one kernel
on one device, made by ``moe-placement bench layer``, and what they were measured on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import PlacementError

FORMAT = "moe-layer-calibration"
FORMAT_VERSION = 1
ROWS = 3
"""The fit's column of rows: left out where some measurement's are not known, or all are alike."""


class Measurement(BaseModel):
    """Hold one timed MoE layer of one rank.

    Attributes:
        tokens: tokens times chosen experts that the rank computed (rows of the grouped GEMM).
        active_experts: local experts with at least one of them.
        rows: tokens that arrived at the rank: those with a choice there, or all after an
            all-gather. None where that was not kept.
        microseconds: time of the layer's expert computation.
        held_out: not used by the fit; the error is stated on these.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: int = Field(ge=0)
    active_experts: int = Field(ge=0)
    rows: int | None = Field(default=None, ge=0)
    microseconds: float = Field(gt=0, allow_inf_nan=False)
    held_out: bool = False


class Calibration(BaseModel):
    """Hold a calibration file: measurements of one layer shape and kernel on one device.

    Attributes:
        device: the device's name, such as ``NVIDIA H200``.
        layer: what was measured: ``hidden_size``, ``intermediate_size``, ``local_experts``,
            ``dtype``, ``kernel``.
        provenance: versions, date and command.
        measurements: at least four that are not held out.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["moe-layer-calibration"] = "moe-layer-calibration"
    version: int = FORMAT_VERSION
    device: str
    layer: dict[str, Any]
    provenance: dict[str, Any] = Field(default_factory=dict)
    measurements: list[Measurement]

    @property
    def summary(self) -> str:
        """Say what was measured, in one line."""
        known = (
            ("shape", "shape {}"),
            ("hidden_size", "hidden size {}"),
            ("intermediate_size", "experts of {}"),
            ("dtype", "{}"),
            ("kernel", "{}"),
            ("phase", "{}"),
        )
        return ", ".join(
            [
                self.device,
                *(text.format(self.layer[key]) for key, text in known if key in self.layer),
            ]
        )

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Read a calibration file.

        Raises:
            PlacementError: when it is missing, foreign or of another version.
        """
        from ..formats.atomic import read_json  # lazy: heavy

        return cls._parse(read_json(path, "calibration"), str(path))

    @classmethod
    def _parse(cls, data: Any, source: str) -> Calibration:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlacementError(
                f'{source} is no calibration file: it lacks "format": "{FORMAT}"; make one with '
                "`moe-placement bench layer`"
            )
        if data.get("version") != FORMAT_VERSION:
            raise PlacementError(
                f"{source} has calibration version {data.get('version')!r}, this release reads "
                f"version {FORMAT_VERSION}: measure again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the top level"
            raise PlacementError(
                f"{source}: {where}: {first['msg']}; measure again or mend that field"
            ) from None

    def write(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        from ..formats.atomic import write_atomically  # lazy: heavy

        data = self.model_dump()
        lines = [json.dumps(m) for m in data.pop("measurements")]
        head = json.dumps(data, indent=1).removesuffix("\n}")
        body = ",\n  ".join(lines)
        write_atomically(path, f'{head},\n "measurements": [\n  {body}\n ]\n}}\n'.encode())


def shipped() -> dict[str, Calibration]:
    """Return name -> calibration of those in ``simulation/calibrations/*.json``."""
    folder = resources.files(__package__) / "calibrations"
    if not folder.is_dir():
        return {}
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name[:-5]: Calibration._parse(json.loads(f.read_text()), f.name) for f in found}


def find_calibration(name: str) -> Calibration:
    """Return a calibration by the name of a shipped one or by path.

    Raises:
        PlacementError: when there is neither.
    """
    known = shipped()
    if name in known:
        return known[name]
    if not Path(name).exists():
        names = ", ".join(known) or "none"
        raise PlacementError(
            f"calibration {name!r} is neither a file nor one that comes with this package "
            f"({names}): measure one with `moe-placement bench layer`"
        )
    return Calibration.read(name)


@dataclass(frozen=True)
class LayerCost:
    """Predict times of a layer by a fitted model; in microseconds.

    Attributes:
        fixed: of an empty layer.
        per_expert: for each local expert with at least one token.
        per_token: for each token routed to the rank (a token on two local experts counts twice).
        per_row: for each token that arrives at the rank (a token on two local experts counts once);
            0 when the measurements cannot tell it.
        error: mean relative error on the held-out measurements, None when none were held out.
        worst_error: greatest relative error on them.
        held_out: how many were held out.
    """

    fixed: float
    per_expert: float
    per_token: float
    per_row: float = 0.0
    error: float | None = None
    worst_error: float | None = None
    held_out: int = 0

    def time(self, tokens: np.ndarray, active: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the microseconds of ranks with so many tokens, active experts and rows.

        Args:
            tokens, active, rows: of each rank, any shapes that broadcast.
        """
        return (
            self.fixed
            + self.per_expert * np.asarray(active)
            + self.per_token * np.asarray(tokens)
            + self.per_row * np.asarray(rows)
        )

    @property
    def formula(self) -> str:
        """Say the model in words."""
        rows = f" + {self.per_row:.5f} per row" if self.per_row else ""
        return (
            f"{self.fixed:.2f} us + {self.per_expert:.3f} per active expert + "
            f"{self.per_token:.5f} per token{rows}"
        )

    @property
    def accuracy(self) -> str:
        """Say the error in words."""
        if self.error is None:
            return "error unknown: the calibration holds no measurement back"
        return (
            f"mean error {self.error:.1%}, worst {self.worst_error:.1%} on {self.held_out} "
            "held-out measurements"
        )


def fit(measurements: Sequence[Measurement]) -> LayerCost:
    """Fit the model to the measurements that are not held out.

    Least squares in relative error; no coefficient is negative.

    Raises:
        PlacementError: when there are too few, or they do not tell tokens and experts apart.
    """
    used = [m for m in measurements if not m.held_out]
    if len(used) < 4:
        raise PlacementError(
            f"{len(used)} measurements to fit a cost model from: give 4 or more that are not held "
            "out"
        )
    features, times = _arrays(used)
    if np.linalg.matrix_rank(features[:, :ROWS]) < ROWS:
        raise PlacementError(
            "the measurements vary tokens and active experts together or not at all, so that "
            "their costs cannot be told apart: measure at several numbers of both"
        )
    if any(m.rows is None for m in measurements) or np.linalg.matrix_rank(features) <= ROWS:
        features = features[:, :ROWS]
    found = _non_negative(features / times[:, None])
    best: dict[str, Any] = dict(
        zip(("fixed", "per_expert", "per_token", "per_row"), map(float, found))
    )
    held = [m for m in measurements if m.held_out]
    if not held:
        return LayerCost(**best)
    features, times = _arrays(held)
    errors = np.abs(features[:, : len(best)] @ found / times - 1)
    return LayerCost(
        **best,
        error=float(errors.mean()),
        worst_error=float(errors.max()),
        held_out=len(held),
    )


def _arrays(measurements: Sequence[Measurement]) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns 1, active experts, tokens, rows (NaN where not kept), and the times."""
    features = [
        [1.0, m.active_experts, m.tokens, np.nan if m.rows is None else m.rows]
        for m in measurements
    ]
    return np.array(features), np.array([m.microseconds for m in measurements])


def _non_negative(weighted: np.ndarray) -> np.ndarray:
    """Return the non-negative coefficients of the columns whose sums are nearest to one.

    With so few columns all faces of the quadrant can be tried.
    """
    columns = weighted.shape[1]
    best, least = np.zeros(columns), np.inf
    for size in range(columns, 0, -1):
        for face in combinations(range(columns), size):
            solution, *_ = np.linalg.lstsq(weighted[:, face], np.ones(len(weighted)), rcond=None)
            residual = float(((weighted[:, face] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and residual < least:
                best, least = np.zeros(columns), residual
                best[list(face)] = solution
    return best
