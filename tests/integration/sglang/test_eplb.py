"""SGLang's EPLB with our placement to begin with and our planner to rebalance.

Live, on the CPU engine, and its parts without one.
"""

from __future__ import annotations

import logging
import pickle
import re
import time
import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.engines.sglang import eplb, eplb_exchange, eplb_policy, settings, state
from moe_placement_plugin.exchange.watchdog import Watchdog
from moe_placement_plugin.lab.gpu.serving.server_logs import moved
from moe_placement_plugin.rebalancing import exchanger
from moe_placement_plugin.rebalancing.exchanger import Exchanger
from moe_placement_plugin.rebalancing.policy import RebalancePolicy
from moe_placement_plugin.rebalancing.rebalance import Rebalance
from moe_placement_plugin.rebalancing.rebalancer import Rebalancer
from moe_placement_plugin.rebalancing.tables import inverse_maps
from tests.integration.sglang.engines import LONG, Outcome, case, run_cases
from tests.support.children import engine_lock
from tests.unit.engines.sglang.test_flags import (  # noqa: F401
    TWO,
    arguments,
    plugins,
    refused,
    resolve,
)

EPLB = ("--enable-eplb", "--expert-placement-strategy", "eplb")
LAYERS, EXPERTS, RANKS = 3, 8, 2
TOLERANCE = 1e-4
"""Of a log probability between two placements, one of them on one rank, float32.

What differs is the order in which partial sums are added.
"""


def test_strategy_eplb_begins_where_eplb_does(models):
    asked = settings.of(
        resolve(
            arguments(
                models["qwen32"],
                *TWO,
                *EPLB,
                "--ep-num-redundant-experts",
                "4",
                "--expert-rebalance",
                '{"min_gain": 0.1}',
            )
        )
    )
    assert asked.placement.physical_to_logical[3].tolist() == [*range(32), 0, 1, 2, 3]
    arrived = pickle.loads(pickle.dumps(asked))
    assert arrived.moves and arrived.rebalance == {"min_gain": 0.1}
    padded = settings.of(
        resolve(arguments(models["qwen30"], "--tp-size", "4", "--ep-size", "4", *EPLB))
    )
    assert padded.padding == 2 and padded.placement.physical_to_logical[0].tolist() == [
        *range(30),
        0,
        1,
    ]


def test_other_strategies_and_loads_are_where_eplb_begins(models, files):
    zigzag = settings.of(
        resolve(
            arguments(
                models["qwen32"], *TWO, "--enable-eplb", "--expert-placement-strategy", "zigzag"
            )
        )
    )
    assert zigzag.moves and zigzag.placement.physical_to_logical[0].tolist() == [
        *range(0, 32, 2),
        *range(1, 32, 2),
    ]
    planned = settings.of(
        resolve(
            arguments(models["qwen32"], *TWO, *EPLB, "--expert-placement-file", str(files["load"]))
        )
    )
    assert planned.plans and not zigzag.plans
    by_file = settings.of(
        resolve(
            arguments(
                models["qwen32"],
                *TWO,
                "--enable-eplb",
                "--expert-placement-file",
                str(files["permutation"]),
            )
        )
    )
    assert by_file.moves and by_file.plans
    assert planned.moves and planned.placement.physical_to_logical[0].tolist() != list(range(32))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            (*TWO, "--expert-placement-strategy", "eplb", "--expert-rebalance", "{}"),
            "without --enable-eplb",
        ),
        (
            (
                *TWO,
                "--expert-placement-strategy",
                "zigzag",
                "--enable-eplb",
                "--expert-rebalance",
                "{}",
            ),
            "nothing of ours rebalances",
        ),
        ((*TWO, "--enable-eplb", "--expert-rebalance", "{}"), "add it, or leave it out"),
        (
            (*TWO, *EPLB, "--expert-rebalance", '{"min_gian": 1}'),
            "'min_gian' is not one of min_gain",
        ),
        ((*TWO, *EPLB, "--eplb-algorithm", "deepseek"), "--eplb-algorithm deepseek.*both decide"),
        (
            ("--tp-size", "4", "--ep-size", "2", *EPLB),
            "--tp-size 4 and --ep-size 2.*make them equal",
        ),
        ((*TWO, *EPLB, "--load-format", "dummy"), "--load-format dummy"),
        ((*TWO, "--eplb-algorithm", "expert_placement"), "expert_placement without --enable-eplb"),
        (
            (*TWO, *EPLB, "--expert-rebalance", '{"calibration": "/no/such"}'),
            "calibration '/no/such' is neither a file",
        ),
    ],
)
def test_what_would_not_go_well_is_refused(models, more, words):
    assert re.search(words, message := refused(arguments(models["qwen32"], *more))), message


def test_a_model_that_does_not_list_its_experts(monkeypatch):
    layer = torch.nn.Module()
    layer.layer_id, layer.num_local_experts, layer.num_fused_shared_experts = 2, 5, 0
    layer.w2_weight, layer.correction_bias = (
        torch.nn.Parameter(torch.ones(5, 3)),
        torch.nn.Parameter(torch.ones(5)),
    )
    monkeypatch.setattr(eplb, "expert_layers", lambda model: {"mlp.experts": layer})
    model = torch.nn.Module()
    eplb.list_weights(model)
    layer.w2_weight.data = torch.zeros(5, 3)  # as a transformation after loading does
    assert [t.data_ptr() for t in model.routed_experts_weights_of_layer[2]] == [
        layer.w2_weight.data_ptr()
    ]
    listed = types.SimpleNamespace(routed_experts_weights_of_layer={})
    eplb.list_weights(listed)
    assert listed.routed_experts_weights_of_layer == {}
    layer.num_fused_shared_experts = 1
    with pytest.raises(PlacementError, match="--disable-shared-experts-fusion"):
        eplb.list_weights(torch.nn.Module())


def test_forward_passes_are_put_together_into_windows_of_their_phase():
    counts = np.zeros((40, 1, 2), dtype=np.int32)
    counts[:34, 0, 0] = 1
    found, of = eplb_policy.windows(counts, ["decode"] * 40, 16)
    assert (
        found.shape == (16, 1, 2)
        and found.sum() == 34
        and set(found[:, 0, 0]) == {2, 3}
        and set(of) == {"decode"}
    )
    assert eplb_policy.windows(counts[:3], ["mixed"] * 3)[0][:, 0, 0].tolist() == [1, 1, 1]
    none, _ = eplb_policy.windows(counts[34:], ["decode"] * 6)
    assert not none.any() and len(none) == 1
    found, of = eplb_policy.windows(counts, ["prefill", "decode"] * 20, 4)
    assert found[:, 0, 0].sum() == 34 and of == ("prefill",) * 4 + ("decode",) * 4


def test_a_pass_is_what_its_batch_was_where_the_recorder_keeps_it(monkeypatch):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from moe_placement_plugin.engines.sglang import eplb_phases

    monkeypatch.setattr(state.worker, "passes", state.ForwardPasses())
    monkeypatch.setattr(eplb_phases, "_one_batch", lambda: True)
    accumulator = types.SimpleNamespace(
        _global_physical_count_of_buffered_step=types.SimpleNamespace(_curr_index=2)
    )

    def append(self, *args):
        self._global_physical_count_of_buffered_step._curr_index = (
            self._global_physical_count_of_buffered_step._curr_index + 1
        ) % 4

    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED):
        eplb_phases._start(lambda *args: None, None, types.SimpleNamespace(forward_mode=mode))
        eplb_phases._append(append, accumulator, 0, "", {}, {})
    assert eplb_phases.phases_of_passes(4) == ["mixed", "mixed", "prefill", "decode"]
    monkeypatch.setattr(eplb_phases, "_one_batch", lambda: False)
    assert eplb_phases.phases_of_passes(4) == ["mixed"] * 4


def test_our_planner_as_an_algorithm_with_any_strategy(models):
    ours = ("--enable-eplb", "--eplb-algorithm", "expert_placement")
    zigzag = resolve(
        arguments(models["qwen32"], *TWO, *ours, "--expert-placement-strategy", "zigzag")
    )
    assert settings.of(zigzag).plans and settings.of(zigzag).placement.strategy == "zigzag"
    alone = resolve(arguments(models["qwen32"], *TWO, *ours))
    assert settings.of(alone).plans and settings.of(alone).strategy == "eplb"


class Metadata(types.SimpleNamespace):
    """The tables of SGLang's metadata, and its `update`."""

    def update(self, other, update_layer_ids):
        for name in vars(self):
            getattr(self, name)[update_layer_ids] = getattr(other, name)[update_layer_ids]


def metadata(table, usable=None) -> Metadata:
    table = np.array(table)
    to_physical, _ = inverse_maps(table, EXPERTS, usable)
    wide = np.full((*to_physical.shape[:2], table.shape[1]), -1)
    wide[..., : to_physical.shape[2]] = to_physical
    return Metadata(
        physical_to_logical_map_cpu=torch.tensor(table),
        logical_to_all_physical_map_cpu=torch.tensor(wide),
    )


@pytest.fixture
def serving(monkeypatch):
    """Layers 0 (dense), 1 and 2 of 8 experts in 10 slots on 2 ranks, as SGLang begins."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.eplb import expert_location

    in_force = metadata(np.tile(np.arange(10) % EXPERTS, (LAYERS, 1)))
    monkeypatch.setattr(expert_location, "get_global_expert_location_metadata", lambda: in_force)
    group = types.SimpleNamespace(world_size=2, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_moe_ep_group", lambda: group)
    monkeypatch.setattr(eplb.elastic, "live_ranks", lambda: None)
    monkeypatch.setattr(eplb.eplb_phases, "ranks_that_count_a_token", lambda: 1)
    facts = types.SimpleNamespace(topology=Topology(RANKS))
    monkeypatch.setattr(state.worker, "eplb", state.Eplb(facts, None))
    settings.set_current(settings.Settings("eplb"))
    yield in_force
    settings.set_current(None)


def under_way(**policy) -> Rebalance:
    """A rebalance that we plan, which has begun."""
    planner = Rebalancer(RebalancePolicy(**policy), (1, 2), 1000, logging.getLogger())
    here = state.worker.eplb.rebalance = Rebalance(Watchdog(), (1,), planner)
    return here


def planned(counts):
    def theirs(*args):
        raise AssertionError("SGLang's own algorithm was asked")

    return eplb_policy.plan(theirs, torch.tensor(counts), 10, 5, None, 1, None)


def hot(expert: int) -> np.ndarray:
    counts = np.full((4, LAYERS, EXPERTS), 10)
    counts[:, 1, expert] = 100
    counts[:, 0] = 0
    return counts


def test_our_plan_moves_little_and_leaves_what_is_no_moe_layer(serving):
    here = under_way()
    table, to_physical, count = planned(hot(3))
    assert here.decision.rebalance and len(here.exchange.transfers)
    old = serving.physical_to_logical_map_cpu
    assert table[0].equal(old[0]) and table[2].equal(old[2])  # nothing recorded, nothing to gain
    assert int(count[1, 3]) >= 2, "the hot expert has no replica"
    assert 1 <= int((table[1] != old[1]).sum()) <= 4
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            slots = [s for s in to_physical[layer, expert].tolist() if s >= 0]
            assert len(slots) == int(count[layer, expert]) and {
                int(table[layer, s]) for s in slots
            } == {expert}


@pytest.mark.parametrize("counts", [hot(3), np.zeros((4, LAYERS, EXPERTS), dtype=int)])
def test_declined_keeps_the_placement(serving, counts):
    here = under_way(min_gain=0.99)
    table, _, _ = planned(counts)
    assert table.equal(serving.physical_to_logical_map_cpu)
    assert here.decision is None or not here.decision.rebalance


def test_without_strategy_eplb_the_algorithm_is_sglangs(serving):
    state.worker.eplb.rebalance = Rebalance(Watchdog())
    assert eplb_policy.plan(lambda *args: args, 1, 2, 3, 4, 5, 6) == (1, 2, 3, 4, 5, 6)


class Recorded(Exchanger):
    """Plans, and moves nothing."""

    def __init__(self):
        self.num_experts, self.num_slots, self.ranks = EXPERTS, 5, RANKS
        self.topology = Topology(RANKS)
        self.expert_bytes, self.plans = {1: 100, 2: 100}, []

    def exchange(self, plan, on_commit=None, reader=None, watchdog=None):
        self.plans.append((plan, reader))
        on_commit(tuple(plan.changed_rows.tolist()))


def updated(new, layers=(1, 2)):
    recorded = state.worker.eplb.exchanger = Recorded()
    state.worker.eplb.viewed = eplb_exchange.reload.generation()

    def theirs(*args, **kwargs):
        raise AssertionError("SGLang's own exchange was asked")

    assert eplb_exchange.update(theirs, None, {}, new, list(layers), nnodes=1, rank=0) == {}
    return recorded.plans


def test_layers_that_stay_are_passed_over(serving):
    here = under_way()
    table = serving.physical_to_logical_map_cpu.numpy()
    assert not updated(metadata(table)) and not here.moved
    goal = table.copy()
    goal[2] = goal[2][::-1]
    ((plan, reader),) = updated(metadata(goal))
    assert plan.new.layer_ids == (2,) and here.moved == [2] and reader is None
    assert serving.physical_to_logical_map_cpu.tolist() == goal.tolist()


def test_the_exchange_that_was_weighed_is_carried_out_chunk_by_chunk(serving, monkeypatch):
    here = under_way()
    counts = np.full((4, LAYERS, EXPERTS), 10)
    counts[:, 1:, 3] = 100
    table, *_ = planned(counts)
    weighed = here.exchange
    assert weighed.new.layer_ids == (1, 2) and len(weighed.transfers)

    def planned_anew(*args):
        raise AssertionError("the exchange was planned once more")

    monkeypatch.setattr(exchanger, "plan_exchange", planned_anew)
    goal = metadata(table.numpy())
    moves = []
    for number, layer in enumerate((1, 2)):
        ((plan, _),) = updated(goal, [layer])
        moves += [move._replace(row=number) for move in plan.transfers]
    assert moves == list(weighed.transfers) and here.moved == [1, 2]
    assert serving.physical_to_logical_map_cpu.tolist() == table.tolist()


def test_a_table_that_sglang_has_changed_since_is_what_is_exchanged_to(serving):
    """The fault: an exchange that was weighed leads to a table that nobody asks for any more."""
    here = under_way()
    table, *_ = planned(hot(3))
    assert here.exchange is not None
    goal = table.numpy().copy()
    goal[1] = goal[1][::-1]
    ((plan, _),) = updated(metadata(goal), [1])
    assert plan.new.physical_to_logical.tolist() == [goal[1].tolist()]
    assert serving.physical_to_logical_map_cpu[1].tolist() == goal[1].tolist()


def test_a_dead_rank_gets_no_expert_and_no_token(serving, monkeypatch):
    here = under_way()
    monkeypatch.setattr(eplb.elastic, "live_ranks", lambda: (0,))
    with pytest.raises(PlacementError, match="5 slots for 8 experts"):
        planned(hot(3))
    table = np.tile(
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7], (LAYERS, 1)
    )  # both ranks hold all
    serving.__dict__.update(vars(metadata(table)))
    kept, to_physical, count = eplb_policy.plan(None, torch.tensor(hot(3)), 16, 8, None, 1, None)
    assert kept.tolist() == table.tolist() and not here.decision.rebalance
    assert to_physical.shape[2] == 1 and int(to_physical.max()) == 7 and (count == 1).all()


def test_maps_alone_change_where_a_dead_rank_held_replicas_only(serving):
    here = under_way()
    table = serving.physical_to_logical_map_cpu.numpy()
    goal = metadata(table, usable=np.arange(10) != 8)
    assert not updated(goal) and not here.moved  # nothing moves
    assert serving.logical_to_all_physical_map_cpu[1].equal(goal.logical_to_all_physical_map_cpu[1])
    assert 8 in serving.logical_to_all_physical_map_cpu[0]  # which was not to be updated


class Manager:
    """What `eplb.rebalance` asks of SGLang's manager."""

    def _get_model(self):
        return types.SimpleNamespace(
            routed_experts_weights_of_layer={1: [torch.zeros(5, 2)], 2: [torch.zeros(5, 2)]}
        )


@pytest.fixture
def rebalancing(serving, monkeypatch):
    """Layers that were checked, for a rebalance in two chunks."""
    checked = []
    monkeypatch.setattr(
        eplb, "recheck", lambda model, what, only, alone: checked.append(list(only))
    )
    monkeypatch.setattr(eplb.verification, "current", lambda: object())
    monkeypatch.setattr(eplb.elastic, "may_lose_ranks", lambda: False)
    monkeypatch.setattr(eplb, "renew", lambda model: True)
    settings.set_current(settings.Settings("eplb", rebalance={"watchdog": 0.05}, moves=True))
    yield checked
    settings.set_current(None)


def chunks(self):
    for layer in (1, 2):
        yield
        state.worker.eplb.rebalance.moved.append(layer)


def test_what_moved_is_verified_before_the_next_forward_pass(rebalancing):
    steps = eplb.rebalance(chunks, Manager())
    seen = []
    for _ in steps:
        seen.append(list(rebalancing))
        assert state.worker.eplb.rebalance is None, "a forward pass is no part of a rebalance"
    assert seen == [[], [[1]]] and rebalancing == [[1], [2]]


def test_a_damaged_exchange_ends_the_server(rebalancing, monkeypatch):
    def damaged(model, what, only, alone):
        raise PlacementError(what)

    monkeypatch.setattr(eplb, "recheck", damaged)
    with pytest.raises(PlacementError, match="damaged by an exchange"):
        list(eplb.rebalance(chunks, Manager()))
    assert state.worker.eplb.rebalance is None


def test_an_exchange_that_does_not_finish_says_what_it_waits_for(rebalancing, caplog):
    def slow(self):
        state.worker.eplb.rebalance.waits_for("transfers", (1, 2))
        time.sleep(0.08)
        yield

    with caplog.at_level(logging.WARNING, "moe_placement_plugin.engines.sglang.eplb"):
        list(eplb.rebalance(slow, Manager()))
    assert "waiting for: transfers, layers 1..2, ranks [1]" in caplog.records[0].getMessage()


@pytest.fixture(scope="module")
def moving(models, tmp_path_factory) -> Outcome:
    """An engine whose experts move all the time."""
    often = {
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": 2,
        "eplb_rebalance_layers_per_chunk": 3,
    }
    rules = {"min_gain": 0.0, "hysteresis": 0.0, "small_batches": False}
    wanted = case(
        "moving",
        models["qwen32"],
        2,
        2,
        expert_placement_strategy="eplb",
        ep_num_redundant_experts=4,
        expert_rebalance=rules,
        **often,
    )
    with engine_lock():
        return run_cases([wanted | {"max_new_tokens": LONG}], tmp_path_factory.mktemp("engines"))[
            "moving"
        ]


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_answers_stay_while_experts_move(moving, stock):
    assert "rows" in moving.result, moving.log[-3000:]
    assert moving.ids == stock["qwen32"].ids and len(moving.ids[0]) == LONG
    difference = np.abs(np.array(moving.values) - np.array(stock["qwen32"].values)).max()
    print(f"log probabilities differ by at most {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_experts_moved_at_least_four_times_and_were_verified_each_time(moving):
    log = moving.log
    for rank in (0, 1):
        mine = [line for line in log.splitlines() if f"TP{rank} EP{rank}]" in line]
        accepted = [line for line in mine if "expert rebalance accepted" in line]
        assert len(accepted) >= 4, log[-3000:]
        assert len([line for line in mine if re.search(r"verified \d+ slots again", line)]) >= len(
            accepted
        )
    # The serving benchmark reads the same lines.
    found = moved(log, "sglang")
    assert (
        found["accepted"] >= 4
        and found["engine_rebalances"] >= 4
        and found["exchange_ms"] >= found["chunk_ms"] > 0
    )
    assert found["moved_bytes"] and found["verify_ms"]
    decisions = [re.findall(rf"TP{rank} .*expert rebalance (.*)", log) for rank in (0, 1)]
    assert decisions[0] == decisions[1], "the ranks disagree"
    for patch in ("eplb-rebalance", "eplb-plan", "eplb-update"):
        assert moving.processes_with(f"patch {patch} in use") == {"TP0 EP0", "TP1 EP1"}
