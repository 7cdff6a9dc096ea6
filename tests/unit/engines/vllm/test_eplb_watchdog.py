"""An exchange that does not finish says what it waits for."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest

from moe_placement_plugin.engines.vllm import eplb, state
from moe_placement_plugin.rebalancing.exchanger import ExchangeLimits


@pytest.fixture
def begun(monkeypatch):
    """Begins with EPLB on a server whose watchdog is quick."""

    def begin(server) -> None:
        models = [state.EplbModel(of_vllm) for of_vllm in server.model_states.values()]
        known = state.Eplb(server, 0.05, ExchangeLimits(), models)
        monkeypatch.setattr(state.STATE, "eplb", known)

    return begin


def test_an_async_rebalance_without_progress_is_reported_again_and_again(
    caplog, monkeypatch, begun
):
    now = [100.0]
    monkeypatch.setattr(eplb, "time", SimpleNamespace(monotonic=lambda: now[0]))
    of_vllm = SimpleNamespace(rebalanced=True, pending_result=None)
    step = eplb._step(lambda self, *args: "done")
    server = SimpleNamespace(
        is_async=True,
        model_states={"m": of_vllm},
        _should_record_current_step=lambda log_stats: False,
    )
    begun(server)
    with caplog.at_level(logging.WARNING, "vllm.moe_placement_plugin"):
        assert step(server) == "done" and not caplog.records
        now[0] += 0.06
        step(server)
        step(server)
        assert [r.getMessage() for r in caplog.records] == [
            "moe_placement_plugin: async rebalance without progress for 0 s; waiting for: the "
            "background transfer of this rank's next layer"
        ]
        of_vllm.pending_result = SimpleNamespace(layer_idx=3)  # progress, and then none
        step(server)
        now[0] += 0.12
        step(server)
        assert (
            "waiting for: other EP ranks to receive layer 3, which this rank has"
            in caplog.records[-1].getMessage()
        )
        number = len(caplog.records)
        of_vllm.rebalanced, of_vllm.pending_result = False, None
        now[0] += 0.06
        step(server)
        assert len(caplog.records) == number


def test_a_rearrangement_that_takes_too_long_names_layers_and_ranks(caplog, monkeypatch, begun):
    parallel_state = pytest.importorskip("vllm.distributed.parallel_state")
    group = SimpleNamespace(world_size=2, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_ep_group", lambda: group)
    of_vllm = SimpleNamespace(model=SimpleNamespace(num_moe_layers=3))
    server = SimpleNamespace(is_async=False, model_states={"m": of_vllm})
    begun(server)
    with caplog.at_level(logging.WARNING):
        eplb._rearrange(lambda self, is_profile: time.sleep(0.08))(server, True)
    waits = "waiting for: rearrange and all-reduce of the load, layers 0..2, ranks [1]"
    # Once for each 0.05 s: more than once where the machine is busy.
    assert caplog.records and all(waits in record.getMessage() for record in caplog.records)
