"""Hold the rules by which a rebalance is weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ..core.errors import PlacementError
from ..core.load import DECODE, MIXED, PREFILL


@dataclass(frozen=True)
class RebalancePolicy:
    """Say when to rebalance.

    Attributes:
        min_gain: least predicted gain, as a share of the MoE layers' time (of the greatest rank
            load without a cost model).
        max_phase_loss: share that a phase may lose while the whole gains.
        hysteresis: balancedness that must have been lost since the last rebalance.
        max_bytes: most bytes between ranks and from the checkpoint.
        max_pause: seconds that one chunk may take.
        staging_bytes: most staging memory of a rank; half of the slots of the largest layer when
            left out, and more where a layer takes it.
        bandwidth, disk_bandwidth: bytes per second that a rank receives, and reads from the
            checkpoint.
        horizon: for how many times the recorded load the new placement is expected to serve, for
            the payback.
        small_batches: whether decode steps are small, a few tokens per expert: without a cost model
            the dead zone then holds.
        tokens_per_step: tokens of a step over all ranks, of each phase, for a cost model.
        top_k: experts per token, for a cost model.
        calibration: cost model of this device: the name of one that comes with the package, or a
            file of ``moe-placement bench layer``. With it the gain is in time; without it, in the
            greatest rank load.
        watchdog: seconds after which an exchange that has not finished is reported, again and
            again, with what it waits for.
        peer_memory: whether ranks of one host read experts in each other's memory where they can,
            rather than send them.

    Raises:
        PlacementError: when a number makes no sense.
    """

    min_gain: float = 0.02
    max_phase_loss: float = 0.01
    hysteresis: float = 0.01
    max_bytes: int | None = None
    max_pause: float | None = None
    staging_bytes: int | None = None
    bandwidth: float = 25e9
    disk_bandwidth: float = 1e9
    horizon: float = 1.0
    small_batches: bool = True
    tokens_per_step: Mapping[str, int] = field(
        default_factory=lambda: {PREFILL: 8192, DECODE: 1024, MIXED: 4096}
    )
    top_k: int = 8
    calibration: str | None = None
    watchdog: float = 30.0
    peer_memory: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "tokens_per_step":
                if not isinstance(value, Mapping) or not all(
                    isinstance(n, int) and n > 0 for n in value.values()
                ):
                    raise PlacementError(
                        f"tokens_per_step {value!r}: give tokens by phase, such as "
                        '{"prefill": 8192, "decode": 1024}'
                    )
            elif f.name == "calibration":
                if value is not None and not isinstance(value, str):
                    raise PlacementError(
                        f"calibration {value!r}: give the name of a calibration that comes with "
                        "the package, or a path"
                    )
            elif f.name in ("small_batches", "peer_memory"):
                if not isinstance(value, bool):
                    raise PlacementError(f"{f.name} {value!r}: give true or false")
            elif value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise PlacementError(f"{f.name} {value!r}: give a number")
        for name in ("min_gain", "max_phase_loss", "hysteresis"):
            if not 0 <= getattr(self, name) < 1:
                raise PlacementError(
                    f"{name} {getattr(self, name)}: give a share of at least 0 and below 1, 0.02 "
                    "for 2%"
                )
        for name in (
            "max_bytes",
            "max_pause",
            "staging_bytes",
            "bandwidth",
            "disk_bandwidth",
            "horizon",
            "top_k",
            "watchdog",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlacementError(f"{name} {value}: give a positive number")
