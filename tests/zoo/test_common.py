"""Test that the zoo's own instruments see what they are there to see."""

from __future__ import annotations

import numpy as np
import pytest

from tests.zoo import slots, table
from tests.zoo.checkpoint import Part, expected_slot, expert_tensors

PARTS = (
    Part("layers.{layer}.experts.{expert}.gate", "w13_weight", (4, 8)),
    Part("layers.{layer}.experts.{expert}.up", "w13_weight", (4, 8)),
    Part("layers.{layer}.experts.down", "w2_weight", (8, 4)),
    Part("layers.{layer}.experts.{expert}.scale", "w2_weight_scale", ()),
)

HOLDS = [4, 1, 3]


def _loaded() -> dict[str, np.ndarray]:
    """Return a rank's tensors of layer 1 as a loader would leave them.

    Gate lies above up, with padding.
    """
    every = expert_tensors(PARTS, (0, 1), 6)
    first = [
        np.concatenate([every[f"layers.1.experts.{e}.{half}"] for half in ("up", "gate")])
        for e in HOLDS
    ]
    second = np.zeros((3, 8, 6), np.float32)
    second[:, :, :4] = every["layers.1.experts.down"][HOLDS]
    scales = np.array([every[f"layers.1.experts.{e}.scale"] for e in HOLDS])
    return {"w13_weight": np.stack(first), "w2_weight": second, "w2_weight_scale": scales}


def _differences(loaded: dict[str, np.ndarray]) -> list[str]:
    experts = {e: expected_slot(PARTS, 1, e) for e in range(6)}
    return slots.differences(loaded, experts, HOLDS)


def test_slots_that_hold_what_they_should_show_no_difference():
    assert _differences(_loaded()) == []


@pytest.mark.parametrize("parameter", ["w13_weight", "w2_weight", "w2_weight_scale"])
def test_two_slots_exchanged_in_one_tensor_are_named(parameter):
    loaded = _loaded()
    loaded[parameter] = loaded[parameter][[1, 0, 2]]
    assert _differences(loaded) == [
        f"{parameter}[0] holds expert 1, not expert 4",
        f"{parameter}[1] holds expert 4, not expert 1",
    ]


def test_a_slot_that_nothing_filled_or_that_mixes_two_experts_is_named():
    loaded = _loaded()
    loaded["w2_weight"][2] = 0
    loaded["w13_weight"][0, :4] = loaded["w13_weight"][1, :4]
    assert _differences(loaded) == [
        "w13_weight[0] holds no expert of the checkpoint, not expert 4",
        "w2_weight[2] holds no expert of the checkpoint, not expert 3",
    ]


def test_another_layers_expert_and_a_missing_tensor_are_no_match():
    loaded = _loaded()
    loaded["w2_weight"][0, :, :4] = expert_tensors(PARTS, (0,), 6)["layers.0.experts.down"][4]
    del loaded["w2_weight_scale"]
    assert _differences(loaded) == [
        "w2_weight[0] holds no expert of the checkpoint, not expert 4",
        "the layer has no w2_weight_scale, only ['w13_weight', 'w2_weight']",
    ]


def test_a_table_is_replaced_between_its_lines_only(tmp_path):
    document = tmp_path / "zoo.md"
    begin, end = table.between("one")
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    made = table.markdown(("a", "b"), [("x | y", "z")])
    assert table.current(document, "one") != made
    table.replace(document, {"one": made})
    assert table.current(document, "one") == made
    assert document.read_text().startswith("before\n") and document.read_text().endswith("after\n")
    with pytest.raises(ValueError, match="no table two"):
        table.replace(document, {"two": made})
