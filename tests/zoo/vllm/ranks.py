"""Load one model after another, alone or as a rank of two, and compare.

Each writes a line of JSON for each model, so that whoever waits for them knows how far they came.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from moe_placement_plugin.formats.plan_or_load import write
from tests.zoo import slots
from tests.zoo.checkpoint import (
    expected_slot,
    expert_tensors,
    write_config,
    write_tensors,
)
from tests.zoo.vllm import engine, stand_ins
from tests.zoo.vllm.recipe import Recipe

RANKS = 2
REDUNDANT = 2

AGAIN = 17
"""Exit code of a rank that is to be started again behind what it has written."""
STRATEGIES = ("zigzag", "shuffled", "eplb")

DONE, ANSWERS = "done", "answers.npz"
"""Files in a checkpoint's directory: vLLM alone is done with it, and what it answered."""


def alone(recipes: list[Recipe], results: Path, store: str) -> None:
    """Write each checkpoint and note what vLLM answers with it on one rank, without a placement."""
    with results.open("a", buffering=1) as file:
        for recipe in recipes:
            began = time.process_time()
            path = results.parent / directory_of(recipe)
            try:
                write_checkpoint(recipe, path)
                with stand_ins.standing_in(recipe.lacks):
                    line = _build(recipe, path, store)
            except BaseException as error:
                line = _failed(error)
            line |= {"name": recipe.name, "seconds": time.process_time() - began}
            file.write(json.dumps(line) + "\n")
            path.mkdir(exist_ok=True)
            (path / DONE).touch()


def write_checkpoint(recipe: Recipe, path: Path) -> None:
    """Write a recipe's config and experts, and what else its loader asks for."""
    write_config(path, recipe.config)
    tensors = expert_tensors(recipe.parts, recipe.layers, recipe.experts)
    write_tensors(path / "model.safetensors", tensors, dtypes_of(recipe, tensors))
    for name in recipe.files:
        write_tensors(path / name, {}, {})


def _build(recipe: Recipe, path: Path, store: str) -> dict[str, Any]:
    config = engine.engine_config(path, 1, dict(recipe.engine))
    kernels = stand_ins.without_kernels(bool(recipe.loaded_only))
    with kernels, engine.rank_of(config, 0, 1, store):
        model, _ = engine.load(config, bool(recipe.draft))
        wrong = []
        if not recipe.own_kind:
            wrong = _compare_loaded(recipe, model, lambda layer, n: list(range(n)))
        answers, silent = ({}, "") if recipe.loaded_only else _answers(model, config)
    np.savez(path / ANSWERS, **{k.replace("/", "|"): v for k, v in answers.items()})
    reason = "; ".join(wrong[:3])
    return {"status": "wrong" if wrong else "built", "reason": reason, "silent": silent}


def placed(units: list[tuple[Recipe, str]], rank: int, results: Path, store: str) -> None:
    """Load each model on one of two ranks under a strategy, and compare slots and answers.

    Ends itself with `AGAIN` once the ranks do not say the same: one may have left what the other
    still waits for.

    Args:
        units: recipes, each with a strategy.
    """
    # Ranks that begin again meet in shared memory of another name.
    os.environ["VLLM_DIST_IDENT"] = f"zoo{os.getppid()}{Path(store).stem}"
    with results.open("a", buffering=1) as file:
        for recipe, strategy in units:
            path = results.parent / directory_of(recipe)
            while not (path / DONE).exists():
                time.sleep(0.02)
            began = time.process_time()
            line = {"status": "skipped", "reason": ""}
            if (path / ANSWERS).exists():  # else vLLM alone could not build it
                with np.load(path / ANSWERS) as answers:
                    reference = dict(answers)
                try:
                    with stand_ins.standing_in(recipe.lacks):
                        line = _place(recipe, path, strategy, rank, store, reference)
                except BaseException as error:
                    line = _failed(error)
            line |= {"name": recipe.name, "strategy": strategy}
            file.write(json.dumps(line | {"seconds": time.process_time() - began}) + "\n")
            if not _agree(path, strategy, rank, line["status"]):
                sys.exit(AGAIN)


def _agree(path: Path, strategy: str, rank: int, status: str) -> bool:
    """Return whether the other rank ended alike, and no collective can be left half done."""
    mine, other = (path / f"{strategy}.{r}.status" for r in (rank, 1 - rank))
    mine.with_suffix(".tmp").write_text(status)
    mine.with_suffix(".tmp").rename(mine)
    while not other.exists():
        time.sleep(0.01)
    return other.read_text() == status != "failed"


def _place(
    recipe: Recipe, path: Path, strategy: str, rank: int, store: str, reference: dict
) -> dict[str, Any]:
    if strategy == "eplb" and not recipe.eplb:
        return {"status": "none", "reason": ""}
    table = physical_to_logical(recipe, strategy)
    options = dict(recipe.engine)
    if strategy == "zigzag":
        options["expert_placement_strategy"] = "zigzag"
    else:
        plan = path / f"{strategy}-{rank}.json"
        _write_plan(plan, recipe, table)
        options["additional_config"] = {"expert_placement_file": str(plan)}
    if strategy == "eplb":
        options |= {
            "enable_eplb": True,
            "eplb_config": {"num_redundant_experts": REDUNDANT, "step_interval": 1000000},
        }
        if recipe.draft:  # moved by what EPLB sees only, not by the model's plan
            first = np.arange(table.shape[1]) % recipe.experts
            table = np.tile(first, (len(recipe.layers), 1))
    if recipe.ranks_differ:
        of_one, reference = reference, _unplaced(recipe, path, rank, store)
        if not _differences(reference, of_one, recipe):
            return {
                "status": "wrong",
                "reason": "two ranks of vLLM answer as one: take `ranks_differ` away",
            }
    config = engine.engine_config(path, RANKS, options)
    kernels = stand_ins.without_kernels(bool(recipe.loaded_only))
    with kernels, engine.rank_of(config, rank, RANKS, store):
        with stand_ins.exchanged_experts(recipe.planted):
            model, eplb = engine.load(config, bool(recipe.draft))
        own = table.shape[1] // RANKS

        def should_hold(layer: int, count: int) -> list[int]:
            return table[recipe.layers.index(layer), rank * own : (rank + 1) * own].tolist()

        def at_first(layer: int, count: int) -> list[int]:
            return [i % recipe.experts for i in range(rank * own, (rank + 1) * own)]

        wrong = _compare_loaded(recipe, model, at_first if eplb is not None else should_hold)
        wrong += _compare_tables(recipe, model, eplb, table, rank)
        answers = engine.outputs(model, config) if reference else {}
    wrong += _differences(answers, reference, recipe)
    return {"status": "wrong" if wrong else "placed", "reason": "; ".join(wrong[:4])}


def _differences(
    answers: dict[str, np.ndarray], reference: dict[str, np.ndarray], recipe: Recipe
) -> list[str]:
    """Return what two models answer otherwise, layer by layer."""
    wrong = []
    if set(answers) != set(reference):
        wrong.append(f"MoE layers {sorted(answers)}, on one rank {sorted(reference)}")
    for name in answers.keys() & reference.keys():
        off = np.abs(answers[name] - reference[name]).max()
        scale = np.abs(reference[name]).max()
        close = 2e-2 if recipe.engine.get("dtype") == "bfloat16" else 2e-3
        if not off <= close * scale + 1e-6:
            wrong.append(
                f"{name} answers otherwise than on one rank: off by {off:.3g} of {scale:.3g}"
            )
    return wrong


def _unplaced(recipe: Recipe, path: Path, rank: int, store: str) -> dict[str, np.ndarray]:
    """Return what two ranks answer with vLLM's own placement.

    The plugin's settings are left out.
    """
    config = engine.engine_config(path, RANKS, dict(recipe.engine))
    with engine.rank_of(config, rank, RANKS, store):
        model, _ = engine.load(config)
        return engine.outputs(model, config)


def _answers(model: Any, config: Any) -> tuple[dict[str, np.ndarray], str]:
    """Return the layers' answers; or none, and why vLLM's CPU kernels have no answer."""
    try:
        return engine.outputs(model, config), ""
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {}, f"{Path(where.filename).stem}: {where.line}: {error}".rstrip(": ")


def physical_to_logical(recipe: Recipe, strategy: str) -> np.ndarray:
    """Return the expert that each slot of each MoE layer should hold, ``[layers, slots]``.

    It is written here once more, not asked of the plugin.
    """
    experts = recipe.experts
    if strategy == "zigzag":
        row = [e for rank in range(RANKS) for e in range(rank, experts, RANKS)]
        return np.array([row] * len(recipe.layers))
    rng = np.random.default_rng(crc32(f"{recipe.name}|{strategy}".encode()))
    rows = []
    for _ in recipe.layers:
        order = rng.permutation(experts)
        halves = [order[: experts // 2], order[experts // 2 :]]
        if strategy == "eplb":  # each rank gets a replica of one of the other rank's
            halves = [
                rng.permutation(np.append(half, rng.choice(halves[1 - rank], 1)))
                for rank, half in enumerate(halves)
            ]
        else:  # an expert map numbers a rank's experts as the plan does
            halves = [np.sort(half) for half in halves]
        rows.append(np.concatenate(halves))
    return np.array(rows)


def _write_plan(path: Path, recipe: Recipe, table: np.ndarray) -> None:
    from moe_placement_plugin.core.placement import Placement, even_slots

    plan = Placement(table, recipe.experts, even_slots(table.shape[1], RANKS), recipe.layers)
    if recipe.draft:  # rows for its model, unlike its own, which EPLB takes none of
        experts, redundant = recipe.model_experts or recipe.experts, plan.num_redundant
        slots = experts + redundant
        row = np.arange(slots)[::-1] % experts
        layers = recipe.config.get("text_config", recipe.config)["num_hidden_layers"]
        own = None if redundant else plan
        plan = Placement([row] * layers, experts, even_slots(slots, RANKS), draft=own)
    write(plan, path)


def _compare_loaded(recipe: Recipe, model: Any, should_hold: Any) -> list[str]:
    wrong, seen = [], set()
    for name, layer in engine.routed(model).items():
        if recipe.owner not in name:
            continue
        number = layer_of(name)
        seen.add(number)
        if number not in recipe.layers:
            wrong.append(f"{name} is no MoE layer of the recipe")
            continue
        experts = {
            e: engine.rounded(
                expected_slot(recipe.parts, number, e), getattr(layer, engine.ROUNDED)
            )
            for e in range(recipe.experts)
        }
        held = getattr(layer, engine.PARTS_LOADED)
        hold = should_hold(number, recipe.experts)
        wrong += [f"{name}: {line}" for line in slots.differences(held, experts, hold)]
    missing = set(recipe.layers) - seen
    if missing:
        wrong.append(f"the model has no experts in layers {sorted(missing)}")
    return wrong


def _compare_tables(
    recipe: Recipe, model: Any, eplb: Any, table: np.ndarray, rank: int
) -> list[str]:
    wrong = []
    own = table.shape[1] // RANKS
    for row, (name, layer) in enumerate(engine.routed(model).items()):
        number = layer_of(name)
        if recipe.owner not in name or number not in recipe.layers:
            continue
        should = table[recipe.layers.index(number)]
        if eplb is not None:
            found = eplb.physical_to_logical_map[row].tolist()
            if found != should.tolist():
                wrong.append(f"{name}: EPLB's table is {found}, not {should.tolist()}")
            continue
        found = layer.expert_map_manager.expert_map[: recipe.experts].tolist()
        mine = should[rank * own : (rank + 1) * own].tolist()
        expected = [mine.index(e) if e in mine else -1 for e in range(recipe.experts)]
        if found != expected:
            wrong.append(f"{name}: its expert map is {found}, not {expected}")
    return wrong


def layer_of(name: str) -> int:
    """Return the first number in a layer's name."""
    found = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def directory_of(recipe: Recipe) -> str:
    """Name of the directory of a recipe's checkpoint."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", recipe.name)


def dtypes_of(recipe: Recipe, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Return the type that each tensor's bytes are of, where numpy has none like it."""
    other = {}
    for part in recipe.parts:
        if part.dtype in ("F8_E4M3", "F8_E8M0"):
            for layer in recipe.layers:
                other |= dict.fromkeys(part.tensors(layer, recipe.experts), part.dtype)
    return other


def _failed(error: BaseException) -> dict[str, Any]:
    from moe_placement_plugin.core.errors import PlacementError

    if isinstance(error, KeyboardInterrupt):
        raise error
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, PlacementError):
            return {"status": "refused", "reason": str(chain)}
        chain = chain.__cause__ or chain.__context__
    text = f"{type(error).__name__}: {error}"
    return {"status": "failed", "reason": text[:600], "traceback": traceback.format_exc()[-3000:]}
