"""Report expert load and placement as Prometheus metrics on an engine's own ``/metrics``.

The process that answers ``/metrics`` holds no model. It reads the recording that the workers write
(``--expert-load-record``) when it is scraped, so that nothing is added to serving.

| metric | labels | meaning |
|---|---|---|
| `moe_expert_tokens_total` | phase | routed tokens (tokens x experts per token x layers) so far |
| `moe_expert_balancedness` | layer | mean rank load / greatest |
| `moe_expert_balancedness_overall` | | sum over layers of the means / sum of the greatest |
| `moe_expert_rank_load_ratio` | rank | load of the rank / mean over ranks, all layers |
| `moe_expert_hottest_load_ratio` | layer, expert | tokens of a layer's hottest experts / mean |
| `moe_expert_recording_timestamp_seconds` | | when the newest window was written |
| `moe_placement_events_total` | event | rebalances, moved_bytes, verified_slots, ... |

Ratios and balancedness are those of the newest window. Events are also exchange_seconds,
verify_failures and rebalance_* by reason.

Rank metrics need expert parallelism; while an engine's own EPLB moves experts they are left out,
because only it knows where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement, even_slots
from ..formats.load_file import read_load

HOTTEST = 3
"""Experts per layer that `moe_expert_hottest_load_ratio` names."""


def contiguous(load: ExpertLoad, num_ranks: int) -> Placement:
    """Make the engines' default placement of the load's model on ``num_ranks`` ranks."""
    return Placement(
        physical_to_logical=np.tile(np.arange(load.num_experts), (load.num_layers, 1)),
        num_logical_experts=load.num_experts,
        slots_per_rank=even_slots(load.num_experts, num_ranks),
        layer_ids=load.layer_ids,
        strategy="linear",
    )


class LoadCollector:
    """Collect metrics from a recording when it is scraped.

    Args:
        path: the recording.
        placement_of: the placement in force for a load, or None when ranks mean nothing.
    """

    def __init__(self, path: str | Path, placement_of: Callable[[ExpertLoad], Placement | None]):
        self.path = Path(path)
        self._placement_of = placement_of
        self._stamp: tuple[float, int] | None = None
        self._families: list[Any] = []

    def describe(self) -> list[Any]:
        """Describe nothing: prometheus_client would collect at once, before there is a file."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of the newest recording, none before the first."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime, stat.st_ino)
            if stamp != self._stamp:
                self._families = list(self._measure(read_load(self.path), stat.st_mtime))
                self._stamp = stamp
        except (OSError, PlacementError):
            # Not there yet, or just being taken away: a scrape must not fail for it.
            self._families = []
            self._stamp = None
        yield from self._families

    def _measure(self, load: ExpertLoad, written: float) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        tokens = CounterMetricFamily(
            "moe_expert_tokens", "Routed tokens recorded so far, over all layers.", labels=["phase"]
        )
        for phase in dict.fromkeys(load.phases):
            of_phase = [i for i, p in enumerate(load.phases) if p == phase]
            tokens.add_metric([phase], float(load.counts[of_phase].sum()))
        yield tokens
        yield GaugeMetricFamily(
            "moe_expert_recording_timestamp_seconds",
            "When the newest window was written.",
            value=written,
        )
        newest = _newest(load)
        mean = np.maximum(newest.mean(axis=1), 1e-12)
        hottest = GaugeMetricFamily(
            "moe_expert_hottest_load_ratio",
            "Tokens of a layer's hottest experts / mean of its experts, newest window.",
            labels=["layer", "expert"],
        )
        for row, layer in enumerate(load.layer_ids):
            for expert in np.argsort(-newest[row], kind="stable")[:HOTTEST]:
                hottest.add_metric(
                    [str(layer), str(expert)], float(newest[row, expert] / mean[row])
                )
        yield hottest
        placement = self._placement_of(load)
        if placement is not None:
            yield from _rank_metrics(placement, newest)
        events = CounterMetricFamily(
            "moe_placement_events", "What the engine's workers counted.", labels=["event"]
        )
        for event, number in sorted(dict(load.metadata.get("events") or {}).items()):
            events.add_metric([event], float(number))
        yield events


def _rank_metrics(placement: Placement, newest: np.ndarray) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    by_layer = GaugeMetricFamily(
        "moe_expert_balancedness", "Mean rank load / greatest, newest window.", labels=["layer"]
    )
    for layer, value in zip(placement.layer_ids, placement.balancedness(newest)):
        by_layer.add_metric([str(layer)], float(value))
    yield by_layer
    yield GaugeMetricFamily(
        "moe_expert_balancedness_overall",
        "Sum over layers of the mean rank loads / sum of the greatest, newest window.",
        value=placement.overall_balancedness(newest),
    )
    load = placement.rank_load(newest).sum(axis=0)
    by_rank = GaugeMetricFamily(
        "moe_expert_rank_load_ratio",
        "Load of the rank / mean over ranks, all layers, newest window.",
        labels=["rank"],
    )
    for rank, value in enumerate(load / max(load.mean(), 1e-12)):
        by_rank.add_metric([str(rank)], float(value))
    yield by_rank


def _newest(load: ExpertLoad) -> np.ndarray:
    """Return the counts ``[layers, experts]`` of the newest window of time, phases together."""
    starts = load.metadata.get("window_start")
    if not isinstance(starts, list) or len(starts) != load.num_windows:
        return load.counts[-1]
    last = max(starts)
    return load.counts[[i for i, start in enumerate(starts) if start == last]].sum(axis=0)


_installed: dict[str, LoadCollector] = {}


def install(path: str | Path, placement_of: Callable[[ExpertLoad], Placement | None]) -> None:
    """Let this process's ``/metrics`` report the recording at ``path``; harmless when repeated.

    Engines serve either prometheus_client's own registry or, with several processes behind one
    address, fresh registries around a `MultiProcessCollector`; the collector joins both.

    Args:
        path: the recording.
        placement_of: the placement in force for a load, or None when ranks mean nothing.
    """
    from wrapt import register_post_import_hook

    if str(path) in _installed:
        return
    collector = _installed[str(path)] = LoadCollector(path, placement_of)
    # prometheus_client decides while it is imported whether values go to files shared by processes.
    # SGLang sets that up first, so the import must be the engine's own; an engine without metrics
    # never imports it.
    register_post_import_hook(
        lambda module: module.REGISTRY.register(collector), "prometheus_client"
    )
    register_post_import_hook(
        lambda module: _join_fresh_registries(module, collector), "prometheus_client.multiprocess"
    )


def _join_fresh_registries(multiprocess: Any, collector: LoadCollector) -> None:
    original = multiprocess.MultiProcessCollector.__init__

    def __init__(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        original(self, registry, *args, **kwargs)
        if registry is not None:
            registry.register(collector)

    multiprocess.MultiProcessCollector.__init__ = __init__
