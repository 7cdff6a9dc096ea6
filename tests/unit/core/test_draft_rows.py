"""A plan's rows for the draft of speculative decoding: what is kept, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moe_placement_plugin import Placement, PlacementError, Topology
from moe_placement_plugin.core.model_shape import ModelShape
from moe_placement_plugin.formats.packed import pack, unpack
from moe_placement_plugin.formats.plan_json import plan_to_dict, read_plan
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.formats.sglang import to_sglang
from moe_placement_plugin.strategies.resolve import resolve_placement

SHAPE = ModelShape((1, 2, 3), 4, name="tiny")
DRAFT = ModelShape((), 6, name="tiny-draft")
WITH_DRAFT = replace(SHAPE, draft=DRAFT)
TWO = Topology(2)


def draft(rows=([5, 4, 3, 2, 1, 0],), experts=6, slots=(3, 3), ids=(61,)) -> Placement:
    return Placement(rows, experts, slots, ids, strategy="draft")


def plan(with_draft: Placement | None, ids=(1, 2, 3)) -> Placement:
    return Placement([[3, 2, 1, 0]] * 3, 4, (2, 2), ids, strategy="eplb", draft=with_draft)


def test_a_plan_with_rows_for_a_draft_comes_back_from_its_file(tmp_path):
    write(plan(draft()), tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["draft"] == {
        "num_logical_experts": 6,
        "slots_per_rank": [3, 3],
        "layer_ids": [61],
        "physical_to_logical": [[5, 4, 3, 2, 1, 0]],
    }
    again = read_plan(tmp_path / "plan.json")
    assert again == plan(draft()) and again.draft == draft()
    assert again != plan(None) and again != plan(draft(rows=[[0, 1, 2, 3, 4, 5]]))
    write(plan(None), tmp_path / "none.json")
    assert "draft" not in json.loads((tmp_path / "none.json").read_text())


@pytest.mark.parametrize("ids", [(1, 2, 3), (0, 1, 2)])
def test_the_engine_and_its_other_hosts_get_them(tmp_path, ids):
    """Also where the plan's layers are renumbered or selected on the way."""
    write(plan(draft(), ids), tmp_path / "plan.json")
    placement = resolve_placement("eplb", tmp_path / "plan.json", WITH_DRAFT, TWO)
    assert placement.draft == draft() and placement.layer_ids == (1, 2, 3)
    assert placement.select_layers((2,)).draft == draft()
    assert unpack(json.loads(json.dumps(pack(placement)))).draft == draft()
    damaged = pack(placement)
    damaged["draft"] = pack(draft(rows=[[0, 1, 2, 3, 4, 5]]))
    with pytest.raises(PlacementError, match="arrived with digest"):
        unpack(damaged)


@pytest.mark.parametrize(
    "rows, engines, message",
    [
        (draft(), None, r"has rows for a draft \(layers \[61\]\), and this engine runs no draft"),
        (draft(), ModelShape((), 8, name="other"), "with 6 experts, the draft other has 8"),
        (draft(slots=(2, 2, 2)), DRAFT, "on 3 EP ranks with 0 redundant experts, the engine"),
        (draft(rows=[[0, 1, 2, 3, 4, 5, 0, 1]], slots=(4, 4)), DRAFT, "2 redundant experts"),
    ],
)
def test_rows_that_fit_no_draft_of_the_engine_are_refused(tmp_path, rows, engines, message):
    path = tmp_path / "plan.json"
    write(plan(rows), path)
    with pytest.raises(PlacementError, match=message) as error:
        resolve_placement("eplb", path, replace(SHAPE, draft=engines), TWO)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [{"physical_to_logical": []}, None])
def test_a_plan_for_the_draft_only_is_refused(tmp_path, rows):
    data = plan_to_dict(plan(draft()))
    del data["physical_to_logical"]
    (tmp_path / "plan.json").write_text(json.dumps(data | (rows or {})))
    with pytest.raises(PlacementError, match="is a plan for the draft only: give the model's own"):
        resolve_placement("eplb", tmp_path / "plan.json", WITH_DRAFT, TWO)


def test_bad_rows_for_a_draft_name_the_draft(tmp_path):
    for change, message in (
        ({"physical_to_logical": [[0] * 6]}, "draft: layer 61 has no slot for expert 1"),
        ({"layers": [1]}, "draft.layers: Extra inputs"),
    ):
        data = plan_to_dict(plan(draft()))
        data["draft"] |= change
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(PlacementError, match=message):
            read_plan(tmp_path / "plan.json")


def test_sglangs_form_has_no_place_for_them():
    assert to_sglang(plan(None))["physical_to_logical_map"]
    with pytest.raises(PlacementError, match="SGLang's form of a plan has no rows for a draft"):
        to_sglang(plan(draft()))


def test_rows_are_those_of_numpy_too():
    assert draft(rows=np.array([[5, 4, 3, 2, 1, 0]])) == draft()
