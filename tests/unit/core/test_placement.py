import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_placement_plugin import Placement, PlacementError
from moe_placement_plugin.core.placement import even_slots
from moe_placement_plugin.formats.plan_json import read_plan
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.formats.sglang import to_sglang

from ..strategies.strategies_for_tests import placements


@given(placements())
def test_derived_maps_invert_each_other(p):
    for row in range(p.num_layers):
        for expert in range(p.num_logical_experts):
            slots = [s for s in p.logical_to_physical[row, expert] if s >= 0]
            assert slots == sorted(np.flatnonzero(p.physical_to_logical[row] == expert).tolist())
            assert len(slots) == p.replica_counts[row, expert] >= 1
        for rank in range(p.num_ranks):
            expert_map = p.expert_map(row, rank)
            local = p.local_experts(row, rank)
            assert local.size == p.slots_per_rank[rank] == (expert_map >= 0).sum()
            for slot, expert in enumerate(local):
                assert expert_map[expert] == slot


@given(placements(), st.integers(0, 2**32 - 1))
def test_rank_load_conserves_tokens_and_follows_replicas(p, seed):
    counts = np.random.default_rng(seed).integers(0, 1000, (2, p.num_layers, p.num_logical_experts))
    load = p.rank_load(counts)
    np.testing.assert_allclose(load.sum(axis=-1), counts.sum(axis=-1))
    for window in range(2):
        for row in range(p.num_layers):
            expected = np.zeros(p.num_ranks)
            for slot, expert in enumerate(p.physical_to_logical[row]):
                expected[p.rank_of_slot[slot]] += (
                    counts[window, row, expert] / p.replica_counts[row, expert]
                )
            np.testing.assert_allclose(load[window, row], expected)
    balance = p.balancedness(counts)
    assert ((0 < balance) & (balance <= 1 + 1e-12)).all()


@given(placements())
def test_files_round_trip(p):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write(p, path)
        q = read_plan(path)
        assert [f.name for f in Path(folder).iterdir()] == ["plan.json"]
    assert p == q and hash(p) == hash(q)
    assert (q.strategy, q.metadata, q.layer_ids) == ("random", {"seed": 1}, p.layer_ids)


@given(placements())
def test_select_layers_keeps_rows(p):
    ids = p.layer_ids[::-1]
    q = p.select_layers(ids)
    assert q.layer_ids == ids
    np.testing.assert_array_equal(q.physical_to_logical, p.physical_to_logical[::-1])


def test_digest_depends_on_the_map_and_not_on_the_name():
    a = Placement([[0, 1, 2, 3]], 4, (2, 2), strategy="a")
    assert a == Placement([[0, 1, 2, 3]], 4, (2, 2), strategy="b")
    assert a != Placement([[0, 1, 3, 2]], 4, (2, 2))
    assert a != Placement([[0, 1, 2, 3]], 4, (3, 1))
    assert a != Placement([[0, 1, 2, 3]], 4, (2, 2), (5,))


def test_is_immutable():
    p = Placement([[0, 1]], 2, (1, 1))
    with pytest.raises(ValueError):
        p.physical_to_logical[0, 0] = 1


def test_sglang_form_numbers_all_layers():
    p = Placement([[3, 2, 1, 0], [1, 0, 3, 2]], 4, (2, 2), (1, 3))
    rows = to_sglang(p, num_layers=5)["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 3]]
    json.dumps(rows)
    with pytest.raises(PlacementError, match="same number of slots"):
        to_sglang(Placement([[0, 1, 2]], 3, (2, 1)))
    with pytest.raises(PlacementError, match="num_layers 2"):
        to_sglang(p, 2)


@given(st.integers(0, 300), st.integers(1, 40))
def test_even_slots_differ_by_at_most_one(slots, ranks):
    per_rank = even_slots(slots, ranks)
    assert (
        sum(per_rank) == slots
        and max(per_rank) - min(per_rank) <= 1
        and list(per_rank) == sorted(per_rank, reverse=True)
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[0, 1, 2]], 4, (2, 1)), r"layer 0 has no slot for expert 3.*give the expert a slot"),
        (
            ([[0, 0, 1, 2]], 3, (2, 2)),
            r"layer 0 holds expert 0 2 times on rank 0.*move it to another rank",
        ),
        (
            ([[0, 1, 7]], 3, (2, 1)),
            r"slot 2 holds expert 7: expert ids of this plan must lie in 0\.\.2",
        ),
        (([[0, 1, -1]], 2, (2, 1)), r"holds expert -1"),
        (([[0, 1]], 2, (2, 1)), r"adds up to 3, but a layer has 2 slots"),
        (([[0, 1], [0]], 2, (1, 1)), r"rows of different lengths"),
        (([0, 1], 2, (1, 1)), r"shape \(2,\)"),
        (([[0.5, 1]], 2, (1, 1)), r"expert ids are integers"),
        (([[]], 1, (0,)), r"at least one of each"),
        (([[0, 1]], 2, (1, 1), (3, 4)), r"layer_ids \[3, 4\] for 1 layers"),
        (([[0, 1], [0, 1]], 2, (1, 1), (3, 3)), r"one distinct id"),
        (([[0, 1]], 2, (3, -1)), r"fewer than 0 slots"),
        (([[2**40, 1]], 2, (1, 1)), r"beyond 32 bits"),
    ],
)
def test_invalid_placements_are_refused(arguments, message):
    with pytest.raises(PlacementError, match=message):
        Placement(*arguments)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[1]", "no plan file"),
        ('{"format": "moe-placement-plan", "version": 99}', "plan version 99"),
        ('{"format": "moe-placement-plan", "version": 1, "strategy": "x"}', "num_logical_experts"),
        (
            '{"format": "moe-placement-plan", "version": 1, "strategy": "x", '
            '"num_logical_experts": 2, "slots_per_rank": [1, 1], "physical_to_logical": [[0, '
            '"1"]]}',
            r"physical_to_logical\.0\.1",
        ),
        (
            '{"format": "moe-placement-plan", "version": 1, "strategy": "x", '
            '"num_logical_experts": 2, "slots_per_rank": [1, 1], "physical_to_logical": [[0, '
            "0]]}",
            "no slot for expert 1",
        ),
        (
            '{"format": "moe-placement-plan", "version": 1, "strategy": "x", '
            '"num_logical_experts": 2, "slots_per_rank": [1, 1], "physical_to_logical": [[0, '
            '1]], "typo": 1}',
            "typo",
        ),
    ],
)
def test_bad_plan_files_name_the_file_and_the_field(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlacementError, match=message) as error:
        read_plan(path)
    assert str(path) in str(error.value)


def test_missing_and_unwritable_files(tmp_path):
    with pytest.raises(PlacementError, match="does not exist"):
        read_plan(tmp_path / "no.json")
    with pytest.raises(PlacementError, match="cannot be written"):
        write(Placement([[0]], 1, (1,)), tmp_path / "no" / "plan.json")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write(Placement([[0, 1]], 2, (1, 1)), path)
    before = path.read_bytes()
    monkeypatch.setattr(
        "os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(PlacementError, match="No space left"):
        write(Placement([[1, 0]], 2, (1, 1)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
