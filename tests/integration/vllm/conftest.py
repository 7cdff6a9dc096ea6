"""Start real vLLM once for all tests of this folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.formats.load_file import read_load
from tests.support.children import engine_lock, run_child
from tests.support.faults import WEIGHT_FAULTS
from tests.support.paths import ROOT
from tests.support.rebalance_rules import ANY_GAIN_AND_PHASE
from tests.support.vllm_fixtures import checkpoints, files
from tests.support.vllm_runner import CORE_HERE

__all__ = ["checkpoints", "files"]

TWO_RANKS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
ONE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", **CORE_HERE}
OWN_CORE = {**ONE_EACH, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
BOTH = {"VLLM_CPU_OMP_THREADS_BIND": "0,1", **CORE_HERE}

FAULTS = (*WEIGHT_FAULTS, "map changed without moving weights", "two ranks claim one expert",
          "tensor as long as the model has experts", "tensor lost")  # fmt: skip


def run_cases(
    folder: Path, cases: list[dict], env: dict[str, str], timeout: float
) -> dict[str, dict]:
    """Return results by case name; a case that was not reached is an error of its own."""
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    with engine_lock():
        finished = run_child(
            [
                sys.executable,
                "-m",
                "tests.support.vllm_runner",
                str(folder / "cases.json"),
                str(folder / "results.json"),
            ],
            timeout,
            env,
            ROOT,
        )
    (folder / "log").write_text(finished.output)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    missing = {
        "error": f"the engine's process ended with {finished.code}",
        "traceback": finished.output[-4000:],
    }
    return {case["name"]: results.get(case["name"], missing) for case in cases}


@pytest.fixture(scope="session")
def stock(checkpoints, tmp_path_factory) -> dict[str, dict]:
    """Return answers of vLLM without this plugin, on one rank without expert parallelism."""
    cases = [
        {"name": "qwen", "engine": {"model": checkpoints["qwen"]}, "env": BOTH},
        {"name": "glm", "engine": {"model": checkpoints["glm"]}, "env": BOTH},
        {
            "name": "qwen-bf16",
            "engine": {"model": checkpoints["qwen"], "dtype": "bfloat16"},
            "env": BOTH,
        },
    ]
    return run_cases(tmp_path_factory.mktemp("stock"), cases, {"VLLM_PLUGINS": ""}, 600)


def placed_case(name: str, model: str, more: dict, **extra) -> dict:
    """Return a case of two ranks that is probed; ``model`` names its checkpoint."""
    return {
        "name": name,
        "engine": {"model": model, **TWO_RANKS, **more},
        "env": ONE_EACH,
        "probe": True,
        **extra,
    }


def recorded(path: Path, **more) -> dict:
    """Return the arguments of an engine that records its load at ``path``."""
    flags = {"expert_load_record": str(path), "expert_load_interval": 0.5, **more}
    return {"additional_config": flags}


def qwen_cases(folder: Path, files: dict) -> list[dict]:
    """Return the cases of the model without expert groups."""
    zigzag = {"expert_placement_strategy": "zigzag"}
    from_load = {"expert_placement_strategy": "eplb", "expert_placement_file": files["qwen"]}
    filtered = {"enable_ep_weight_filter": True}
    coactivation = recorded(folder / "eager", expert_load_coactivation=True)
    compiled = {"enforce_eager": False, **recorded(folder / "compiled")}
    return [
        placed_case("qwen linear", "qwen", {}, profile=True),
        placed_case("qwen zigzag", "qwen", zigzag, profile=True, sabotage=True),
        placed_case(
            "qwen balanced", "qwen", {"expert_placement_strategy": "balanced"}, faults=FAULTS
        ),
        placed_case("qwen eplb filter", "qwen", from_load | filtered | coactivation),
        placed_case(
            "qwen uneven plan filter",
            "qwen",
            {"expert_placement_file": files["uneven"], **filtered},
        ),
        placed_case("qwen zigzag compiled", "qwen", zigzag | compiled),
        placed_case("qwen-bf16 zigzag", "qwen", zigzag | {"dtype": "bfloat16"}),
    ]


def glm_cases() -> list[dict]:
    """Return the cases of the model with expert groups."""
    checked = {"expert_placement_strategy": "balanced", "expert_placement_verify": "checkpoint"}
    own_core = {"expert_placement_strategy": "round_robin"}
    return [
        placed_case(
            "glm zigzag filter",
            "glm",
            {"expert_placement_strategy": "zigzag", "enable_ep_weight_filter": True},
        ),
        placed_case("glm balanced", "glm", checked),
        placed_case("glm round_robin own core", "glm", own_core) | {"env": OWN_CORE},
    ]


@pytest.fixture(scope="session")
def placed(checkpoints, files, tmp_path_factory) -> dict[str, dict]:
    """Return answers and probes of vLLM with this plugin on two ranks.

    There is a case per strategy and model; some record their load.
    """
    folder = tmp_path_factory.mktemp("placed", numbered=False)
    more = {"expert_placement_strategy": "zigzag", "tensor_parallel_size": 4}
    four_ranks = placed_case("qwen zigzag four ranks", "qwen", more)
    four_ranks["env"] = {**ONE_EACH, "VLLM_CPU_OMP_THREADS_BIND": "0|1|0|1"}
    cases = [*qwen_cases(folder, files), *glm_cases(), four_ranks]
    for case in cases:
        case["engine"]["model"] = checkpoints[case["engine"]["model"]]
    return run_cases(folder, cases, {}, 1500)


MOVING = {
    "qwen eplb load": (
        "qwen",
        {"expert_placement_strategy": "eplb", "expert_placement_file": "qwen"},
    ),
    "glm eplb": (
        "glm",
        {
            "expert_placement_strategy": "eplb",
            "additional_config": {"expert_rebalance": ANY_GAIN_AND_PHASE},
        },
    ),
    "qwen fused checkpoint": (
        "fused",
        {"expert_placement_strategy": "zigzag", "expert_placement_verify": "checkpoint"},
    ),
}
"""Case -> (checkpoint, arguments) of servers whose experts EPLB moves.

The name's first word is the stock case.
"""


@pytest.fixture(scope="session")
def moving(checkpoints, files, tmp_path_factory) -> tuple[dict[str, dict], dict[str, str]]:
    """Return (results, logs) by case of vLLM with ``--enable-eplb``.

    They have two redundant experts, rearranged every second step.
    """
    cases = []
    for name, (model, more) in MOVING.items():
        more = {k: files[v] if k.endswith("file") else v for k, v in more.items()}
        eplb = {
            "enable_eplb": True,
            "eplb_config": {"window_size": 2, "step_interval": 2, "num_redundant_experts": 2},
        }
        env = OWN_CORE if name == "glm eplb" else ONE_EACH
        cases.append(
            {
                "name": name,
                "engine": {"model": checkpoints[model], **TWO_RANKS, **eplb, **more},
                "env": env,
                "probe": True,
            }
        )
    folder = tmp_path_factory.mktemp("moving")
    results = run_cases(folder, cases, {}, 1200)
    parts = (folder / "log").read_text().split("=== case ")
    return results, {part.partition("\n")[0].strip(): part for part in parts}


@pytest.fixture(scope="session")
def recordings(placed, tmp_path_factory) -> dict[str, tuple[list[dict], ExpertLoad]]:
    """Name -> (answers, what was recorded while they were given)."""
    folder = tmp_path_factory.getbasetemp() / "placed"
    of = {"eager": "qwen eplb filter", "compiled": "qwen zigzag compiled"}
    return {name: (placed[case]["answers"], read_load(folder / name)) for name, case in of.items()}


@pytest.fixture(scope="session")
def placed_log(placed, tmp_path_factory) -> str:
    """Return what vLLM wrote while the placed cases ran."""
    return (tmp_path_factory.getbasetemp() / "placed" / "log").read_text()
