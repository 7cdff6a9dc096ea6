"""Tell which expert of a checkpoint a slot holds, by the values alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def signature(values: np.ndarray) -> np.ndarray:
    """Return the values that are not 0, sorted: the same for any order and any padding."""
    flat = np.asarray(values).ravel()
    flat = flat.view(np.uint8) if flat.dtype == np.int8 else flat
    return np.sort(flat[flat != 0])


def same(held: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether a slot's tensor is made of these values and nothing else."""
    one, other = signature(held), signature(expected)
    return one.size > 0 and one.shape == other.shape and bool((one == other).all())


def differences(
    slots: Mapping[str, np.ndarray],
    experts: Mapping[int, Mapping[str, np.ndarray]],
    should_hold: list[int],
) -> list[str]:
    """Return what is wrong with a rank's slots of one layer, a line for each wrong tensor.

    Args:
        slots: parameter -> the rank's tensor, ``[slots, ...]``.
        experts: expert -> parameter -> values, `checkpoint.expected_slot`.
        should_hold: expert of each slot.
    """
    wrong = []
    for parameter in experts[should_hold[0]]:
        held = slots.get(parameter)
        if held is None:
            wrong.append(f"the layer has no {parameter}, only {sorted(slots)}")
            continue
        if len(held) != len(should_hold):
            wrong.append(f"{parameter} has {len(held)} slots, not {len(should_hold)}")
            continue
        for slot, expert in enumerate(should_hold):
            if not same(held[slot], experts[expert][parameter]):
                found = [e for e in experts if same(held[slot], experts[e][parameter])]
                holds = f"expert {found[0]}" if found else "no expert of the checkpoint"
                wrong.append(f"{parameter}[{slot}] holds {holds}, not expert {expert}")
    return wrong
