"""Test models that copy rows of a tensor of all experts by position: gpt-oss and Llama 4.

They are loaded by a real vLLM, and through its loader.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.demo.tiny_models import Size, write_qwen3_moe
from tests.integration.vllm.conftest import BOTH, ONE_EACH, TWO_RANKS, run_cases
from tests.support.children import engine_lock, python_path, run_child
from tests.support.paths import ROOT
from tests.support.stacked_models import write_gpt_oss, write_llama4

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

FAULTS_SITE = ROOT / "tests" / "support" / "faults_site"
PLAN = ((5, 0, 3, 6, 1, 2, 7, 4), (7, 2, 4, 1, 6, 0, 5, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stacked")
    plan = folder / "plan.json"
    write(Placement(PLAN, 8, (4, 4)), plan)
    uneven = folder / "uneven.json"
    write(Placement(PLAN, 8, (5, 3)), uneven)
    return {
        "plan": str(plan),
        "uneven": str(uneven),
        "oss": str(write_gpt_oss(folder / "oss")),
        "oss4": str(write_gpt_oss(folder / "oss4", mxfp4=True)),
        "llama": str(write_llama4(folder / "llama")),
        "qwen": str(write_qwen3_moe(folder / "qwen", num_experts=8, size=Size(layers=2))),
    }


@pytest.fixture(scope="module")
def served(files, tmp_path_factory) -> dict[str, dict]:
    """Return answers of a real engine, and logs, by case."""
    zigzag, plan = {"expert_placement_strategy": "zigzag"}, {"expert_placement_file": files["plan"]}

    def case(name, more, model="oss", **env):
        engine = {"model": files[model], **TWO_RANKS, **more}
        return {"name": name, "engine": engine, "env": {**ONE_EACH, **env}}

    def faulty(name, more, fault, model="oss"):
        return case(name, more, model, TEST_LOAD_FAULT=fault, PYTHONPATH=python_path(FAULTS_SITE))

    cases = [
        {"name": "one rank", "engine": {"model": files["oss"]}, "env": BOTH},
        case("zigzag", zigzag),
        case("plan", plan),
        case("uneven", {"expert_placement_file": files["uneven"]}),
        case("sharded", {**zigzag, "load_format": "sharded_state"}),
        faulty("as stock", zigzag, "rows as stock"),
        faulty("own loader", zigzag, "loader of its own", "qwen"),
    ]
    folder = tmp_path_factory.mktemp("served")
    results = run_cases(folder, cases, {}, 900)
    for part in (folder / "log").read_text().split("=== case "):
        results.get(part.partition("\n")[0].strip(), {})["log"] = part
    return results


@pytest.mark.parametrize("name", ["zigzag", "plan", "uneven"])
def test_gpt_oss_in_full_precision_answers_as_one_rank(served, name):
    expected, result = served["one rank"], served[name]
    assert "error" not in result, result.get("traceback")
    for ours, theirs in zip(result["answers"], expected["answers"], strict=True):
        assert ours["ids"] == theirs["ids"]
        assert np.abs(np.subtract(ours["logprobs"], theirs["logprobs"])).max() < 1e-4


@pytest.mark.parametrize(
    "name, message",
    [
        ("as stock", "by position"),
        ("own loader", "loaded Qwen3MoeForCausalLM in a way of its own"),
        ("sharded", "together with --load-format sharded_state"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(served, name, message):
    assert "error" in served[name]
    assert message in served[name]["error"] + served[name]["log"]


LOADED = {
    "oss": ("oss", "plan", ()),
    "oss rows permuted": ("oss", "plan", ("without splitting",)),
    "oss4": ("oss4", "plan", ("mxfp4 method",)),
    "oss4 rows permuted": ("oss4", "plan", ("mxfp4 method", "without splitting")),
    "llama": ("llama", "plan", ()),
}
REFUSED = {
    "oss as stock": ("oss", "plan", ("as stock",), "by position"),
    "oss4 as stock": ("oss4", "plan", ("mxfp4 method", "as stock"), "by position"),
    "llama as stock": ("llama", "plan", ("as stock",), "by position"),
    "oss uneven without splitting": (
        "oss",
        "uneven",
        ("without splitting",),
        "copied in 2 equal parts",
    ),
    "half of w13": ("qwen", "plan", ("half of w13",), "only its part w1 was seen"),
}


@pytest.fixture(scope="module")
def loaded(files, tmp_path_factory) -> Path:
    """Return the folder with what vLLM's loader put into every slot of two ranks.

    See `tests.support.vllm_loader`.
    """
    folder = tmp_path_factory.mktemp("loaded")
    cases = [
        {
            "name": name,
            "engine": {
                "model": files[model],
                "expert_placement_file": files[plan],
                "dtype": "bfloat16" if model == "oss4" else "float32",
            },
            "switch": switches,
        }
        for name, (model, plan, switches, *_) in (LOADED | REFUSED).items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [
        sys.executable,
        "-m",
        "tests.support.vllm_loader",
        str(folder / "cases.json"),
        str(folder),
    ]
    with engine_lock():
        finished = run_child(command, 600, {}, ROOT)
    (folder / "log").write_text(finished.output)
    return folder


def rows_of(checkpoint: dict, layer: int, expert: int) -> dict[str, np.ndarray]:
    """Return what a slot that holds an expert must hold, by parameter, from the checkpoint."""
    found = {}
    for name, tensor in checkpoint.items():
        head, _, rest = name.partition(".experts.")
        if f".layers.{layer}." not in head or not rest:
            continue
        stem = "w13" if rest.startswith("gate_up") else "w2"
        row = tensor[expert]
        if rest.endswith("_bias"):
            found[f"{stem}_bias"] = row
        elif rest.endswith("_scales"):
            found[f"{stem}_weight_scale"] = row
        elif rest.endswith("_blocks"):
            found[f"{stem}_weight"] = row.reshape(row.shape[0], -1)
        else:
            found[f"{stem}_weight"] = row.T
    return found


@pytest.mark.parametrize("name", LOADED)
def test_every_slot_holds_its_expert_of_the_checkpoint(loaded, files, name):
    import torch
    from safetensors.numpy import load_file
    from safetensors.torch import load_file as load_torch

    checkpoint = load_file(Path(files[LOADED[name][0]]) / "model.safetensors")
    compared = 0
    for rank in range(2):
        error = loaded / f"{name}.{rank}.error"
        assert not error.exists(), error.read_text()
        tensors = load_torch(loaded / f"{name}.{rank}.safetensors")
        for layer, row in enumerate(PLAN):
            (prefix,) = {k.rpartition("/")[0] for k in tensors if f".{layer}." in k}
            assert tensors[f"{prefix}/experts"].tolist() == list(row[4 * rank : 4 * rank + 4])
            for slot, expert in enumerate(row[4 * rank : 4 * rank + 4]):
                for key, expected in rows_of(checkpoint, layer, expert).items():
                    found = tensors[f"{prefix}/{key}"][slot]
                    part = found[tuple(slice(n) for n in expected.shape)]
                    assert part.equal(torch.from_numpy(expected.copy()).to(found.dtype)), (
                        rank,
                        layer,
                        slot,
                        key,
                    )
                    compared += 1
    assert compared >= 2 * 8 * 2


@pytest.mark.parametrize("name", REFUSED)
def test_rows_by_position_and_halves_are_refused(loaded, name):
    messages = [loaded / f"{name}.{rank}.error" for rank in range(2)]
    texts = [path.read_text() for path in messages if path.exists()]
    assert texts, (loaded / "log").read_text()[-3000:]
    assert any("PlacementError" in text and REFUSED[name][3] in text for text in texts), texts
