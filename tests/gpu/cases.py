"""List what is tried on two GPUs.

A case per engine start, and the case that must have answered the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_placement_plugin.lab.demo.tiny_models import Size, write_qwen3_moe
from tests.support.draft_models import write_glm4_moe_with_mtp
from tests.support.stacked_models import write_gpt_oss

Case = dict[str, Any]

SIZE = Size(hidden=256, expert=128, layers=4, heads=8, kv_heads=2, head_dim=64)
ZIGZAG = {"expert_placement_strategy": "zigzag"}
MOVING = {"min_gain": 0, "hysteresis": 0, "small_batches": False}


def vllm_cases(folder: Path) -> list[Case]:
    """Return the cases of vLLM; models are written to ``folder``."""
    return [*_reloads(folder), *_gpt_oss(folder), *_drafts(folder)]


def _vllm_eplb(use_async: bool) -> dict[str, Any]:
    """Return arguments with which vLLM's EPLB moves experts all the time."""
    return {
        "enable_eplb": True,
        "eplb_config": {
            "window_size": 4,
            "step_interval": 4,
            "num_redundant_experts": 2,
            "use_async": use_async,
        },
        "expert_placement_strategy": "eplb",
        "additional_config": {"expert_rebalance": {**MOVING, "max_phase_loss": 0.5}},
    }


def _reloads(folder: Path) -> list[Case]:
    """Return engines that sleep and get new weights, with and without experts that move."""
    qwen, other = (
        str(write_qwen3_moe(folder / f"qwen{seed}", 32, seed=seed, size=SIZE)) for seed in (0, 7)
    )
    rl = ["answer", "sleep 1", "sleep 2", {"reload": {"weights_path": other}}]
    sleeping = {"model": qwen, "enable_sleep_mode": True}
    sync, in_background = ({**sleeping, **_vllm_eplb(use_async)} for use_async in (False, True))
    return [
        case("linear", sleeping, rl),
        case("zigzag", {**sleeping, **ZIGZAG}, rl, like="linear"),
        case("eplb sync", sync, [*rl[:2], "answer", rl[3], "answer"], like="linear"),
        case(
            "eplb async",
            in_background,
            ["answer", "answer", *rl[1:2], "answer", rl[3], "answer", "answer"],
            like="linear",
        ),
        case("eplb async level 2", in_background, ["answer", "sleep 2"], refused=True),
    ]


def _gpt_oss(folder: Path) -> list[Case]:
    """Return engines of gpt-oss, in full precision and in MXFP4."""
    cases = []
    for name, mxfp4 in (("oss", False), ("oss-mxfp4", True)):
        model = str(write_gpt_oss(folder / name, mxfp4=mxfp4, size=SIZE))
        engine = {"model": model, "dtype": "bfloat16"}
        cases += [
            case(f"{name} linear", engine, ["answer"]),
            case(f"{name} zigzag", {**engine, **ZIGZAG}, ["answer"], like=f"{name} linear"),
        ]
    return cases


def _drafts(folder: Path) -> list[Case]:
    """Return engines with an MTP draft."""
    draft = {
        "model": str(write_glm4_moe_with_mtp(folder / "mtp")),
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
    }
    recorded = {
        "additional_config": {
            "expert_load_record": str(folder / "load.safetensors"),
            "expert_load_interval": 0.5,
        }
    }
    steps, like = ["answer"] * 3, "mtp linear"
    return [
        case("mtp linear", draft, steps),
        case("mtp zigzag", {**draft, **ZIGZAG, **recorded}, steps, like=like, rest=2),
        case("mtp eplb async", {**draft, **_vllm_eplb(True)}, steps, like=like),
        case("mtp zigzag graphs", {**draft, **ZIGZAG, "enforce_eager": False}, steps, like=like),
    ]


def sglang_cases(folder: Path) -> list[Case]:
    """Return the cases of SGLang; models are written to ``folder``."""
    from tests.integration.sglang.speculative import write_qwen2_moe

    qwen, other = (
        str(write_qwen3_moe(folder / f"qwen{seed}", 32, seed=seed, size=SIZE)) for seed in (0, 7)
    )
    mtp, oss = str(write_glm4_moe_with_mtp(folder / "mtp")), folder / "oss"
    own = str(write_qwen2_moe(folder / "qwen2"))
    saver = {"model_path": qwen, "enable_memory_saver": True, "enable_weights_cpu_backup": True}
    eplb = {
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": 4,
        "expert_placement_strategy": "eplb",
        "expert_rebalance": {**MOVING, "min_gain": 0.0, "hysteresis": 0.0},
        "ep_num_redundant_experts": 4,
    }
    rl = ["answer", "sleep", {"disk": other}, "answer"]
    gpt_oss = {
        "model_path": str(write_gpt_oss(oss, size=Size(layers=3), yarn=False)),
        "dtype": "bfloat16",
    }
    speculation = {
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    nextn = {"model_path": mtp, "speculative_algorithm": "NEXTN", **speculation}
    alone = {
        "model_path": own,
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": own,
        **speculation,
    }
    record = {"expert_load_record": str(folder / "load.safetensors")}
    return [
        case("linear", saver, rl),
        case("zigzag", {**saver, **ZIGZAG}, rl, like="linear", check=True),
        case("eplb", {**saver, **eplb}, [*rl, "answer"], like="linear", check=True),
        case("oss linear", gpt_oss, ["answer"]),
        case("oss zigzag", {**gpt_oss, **ZIGZAG}, ["answer"], like="oss linear", check=True),
        case("nextn linear", nextn, ["answer"] * 2),
        case(
            "nextn zigzag",
            {**nextn, **ZIGZAG, **record},
            ["answer"] * 2,
            like="nextn linear",
            rest=3,
        ),
        case("nextn eplb", {**nextn, **eplb}, ["answer"] * 2, like="nextn linear"),
        case("standalone linear", alone, ["answer"] * 2),
        case("standalone zigzag", {**alone, **ZIGZAG}, ["answer"] * 2, like="standalone linear"),
    ]


def case(name: str, engine: dict[str, Any], steps: list, like: str | None = None, **more) -> Case:
    """Make a case.

    Args:
        name: of the case.
        engine: the engine's arguments.
        steps: see the engine's child.
        like: the case whose answers these must equal.
        more: "refused": the last step must be; "rest": seconds before it stops; "check": ask the
            weight checker.
    """
    return {"name": name, "engine": engine, "steps": steps, "like": like, **more}
