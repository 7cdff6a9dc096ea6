"""Test every MoE architecture of the installed SGLang: placed, or refused by name.

They are compared slot by slot.

Two ranks load each tiny checkpoint through SGLang's own loader under each placement (`worker`);
each slot is compared with the checkpoint's expert, and what TopK and experts answer, summed over
the ranks, with a single rank's that has no plugin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sglang")

from tests.support.children import engine_lock  # noqa: E402

from . import registered, table  # noqa: E402
from .cases import (  # noqa: E402
    INCOMPLETE,
    MISTAKEN,
    PLACEMENTS,
    all_cases,
    expected_refusal,
    name_of,
)
from .drafts import DRAFTED  # noqa: E402
from .launched import launch, results_in  # noqa: E402
from .quantized import QUANTIZED  # noqa: E402
from .recipe import Recipe  # noqa: E402
from .recipes import RECIPES  # noqa: E402
from .refused import DENSE, DRAFTS, NOT_ON_A_CPU, REFUSED, TRANSFORMERS  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of outputs of order 10.

Their partial sums are added in another order (float32: measured up to 3e-6); another expert is off
by order 1.
"""

CASES = [
    (recipe, placement) for recipe in (*RECIPES, *QUANTIZED, *DRAFTED) for placement in PLACEMENTS
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Return what each case's ranks said."""
    folder = tmp_path_factory.mktemp("zoo")
    with engine_lock():
        finished = launch(all_cases(), folder)
    (folder / "log.txt").write_text(finished.output)
    assert finished.code == 0, finished.output[-3000:]
    return results_in(folder)


def _id(value: Any) -> str:
    return value.name if isinstance(value, Recipe) else str(value)


def fails_as_known(recipe: Recipe, error: str) -> bool:
    """Whether SGLang itself fails as its recipe says; torch's CUDA build says it in other words."""
    known = [recipe.unbuildable]
    if recipe.unbuildable == "Torch not compiled with CUDA enabled":
        known.append("Found no NVIDIA driver on your system")
    return any(words in error for words in known)


@pytest.mark.parametrize(("recipe", "placement"), CASES, ids=_id)
def test_placed_or_refused(results, recipe, placement):
    result = results[name_of(recipe, placement)]
    refusal = expected_refusal(recipe, placement)
    if recipe.unbuildable:
        said = [result.get("error", ""), *(rank["error"] for rank in result.get("ranks", []))]
        assert any(fails_as_known(recipe, error) for error in said)
        return
    assert "error" not in result, result.get("error")
    if refusal:
        assert refusal in result.get("refused", "")
        return
    assert not result.get("refused"), result["refused"]
    one, ranks = result["one"], result["ranks"]
    assert [r["error"] for r in (one, *ranks)] == [""] * 3
    assert one["wrong"] == []
    assert one["patches"] == [], "what is compared with has the plugin too"
    assert all({"placement", "slots", "model"} <= set(rank["patches"]) for rank in ranks)
    _same(one, ranks, recipe)
    if placement == "replicas":
        _same(one, [rank["rebalanced"] for rank in ranks], recipe)
    if recipe.draft is not None:
        assert one["draft"]["wrong"] == []
        _same(one["draft"], [rank["draft"] for rank in ranks], recipe.draft)


def _same(one: dict[str, Any], ranks: list[dict[str, Any]], recipe: Recipe) -> None:
    """Check that every slot holds its expert, and the layers answer as those of one rank."""
    assert [r["wrong"] for r in ranks] == [[], []]
    assert all(r["slots"] for r in ranks)
    if recipe.raw:
        return
    tolerance = TOLERANCE[one["dtype"]]
    assert set(one["outputs"]) == set(recipe.moe)
    for layer, expected in one["outputs"].items():
        found = sum(rank["outputs"][layer] for rank in ranks)
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0, equal_nan=False)
    assert {tuple(r["blocks"]) for r in ranks} == {tuple(one["blocks"])}
    for layer, expected in one["blocks"].items():
        for rank in ranks:
            np.testing.assert_allclose(
                rank["blocks"][layer], expected, atol=tolerance, rtol=0, equal_nan=False
            )


@pytest.mark.parametrize("recipe", REFUSED, ids=_id)
def test_refused(results, recipe):
    result = results[name_of(recipe, "zigzag")]
    if recipe.unbuildable:
        assert fails_as_known(recipe, result["error"])
        return
    assert "error" not in result, result.get("error")
    assert expected_refusal(recipe, "zigzag") in result.get("refused", "")
    assert "late" not in result, "refused only when the model had been loaded"


def test_a_slot_with_another_expert_is_noticed(results):
    """The comparison itself: loaded by one map, compared by another."""
    ranks = results[MISTAKEN["name"]]["ranks"]
    assert all("is not expert" in rank["wrong"][0] for rank in ranks)


def test_a_checkpoint_without_biases_is_refused(results):
    """SGLang itself would serve whatever memory holds in their place."""
    assert "brought no w13_weight_bias" in results[INCOMPLETE["name"]].get("refused", "")


def test_outputs_tell_experts_apart(results):
    """Different placements sum up to the same; a rank's part alone is far from it."""
    result = results[name_of(next(r for r in RECIPES if r.name == "Qwen3MoeForCausalLM"), "zigzag")]
    for layer, expected in result["one"]["outputs"].items():
        assert (
            np.abs(result["ranks"][0]["outputs"][layer] - expected).max()
            > 1000 * TOLERANCE["float32"]
        )


def test_every_moe_class_is_listed():
    """A class that a new SGLang registers has to be put into the zoo."""
    listed = (
        {recipe.architecture for recipe in (*RECIPES, *REFUSED)}
        | DRAFTS
        | TRANSFORMERS
        | set(DENSE)
        | set(NOT_ON_A_CPU)
    )
    found = set(registered.moe_classes())
    assert found - listed == set(), "MoE classes that the zoo does not know"
    assert listed - found == set(), "listed, but not of this SGLang"


@pytest.mark.parametrize("architecture", NOT_ON_A_CPU)
def test_what_cannot_be_imported_cannot_be(architecture):
    why = registered.why_not_imported(registered.moe_classes()[architecture])
    assert NOT_ON_A_CPU[architecture] in why


def test_the_table_in_the_docs_is_fresh():
    assert table.current() == table.section(), "run `python -m tests.zoo.sglang.table`"
