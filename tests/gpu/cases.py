"""Define what is tried on two GPUs.

That is a case per engine start, and the case that must have answered the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_placement_plugin.lab.demo.tiny_models import Size, write_qwen3_moe
from tests.support.draft_models import write_glm4_moe_with_mtp
from tests.support.rebalance_rules import ANY_GAIN, ANY_GAIN_AND_PHASE
from tests.support.stacked_models import write_gpt_oss

Case = dict[str, Any]

SIZE = Size(hidden=256, expert=128, layers=4, heads=8, kv_heads=2, head_dim=64)
ZIGZAG = {"expert_placement_strategy": "zigzag"}


def vllm_cases(folder: Path) -> list[Case]:
    """Return the cases of vLLM; models are written to ``folder``."""
    qwen, other = (
        str(write_qwen3_moe(folder / f"qwen{seed}", 32, seed=seed, size=SIZE)) for seed in (0, 7)
    )
    mtp = str(write_glm4_moe_with_mtp(folder / "mtp"))
    oss = {
        name: str(write_gpt_oss(folder / name, mxfp4=mxfp4, size=SIZE))
        for name, mxfp4 in (("oss", False), ("oss-mxfp4", True))
    }
    rl = ["answer", "sleep 1", "sleep 2", {"reload": {"weights_path": other}}]
    sleeping = {"model": qwen, "enable_sleep_mode": True}

    def eplb(use_async: bool) -> dict[str, Any]:
        return {
            "enable_eplb": True,
            "eplb_config": {
                "window_size": 4,
                "step_interval": 4,
                "num_redundant_experts": 2,
                "use_async": use_async,
            },
            "expert_placement_strategy": "eplb",
            "additional_config": {"expert_rebalance": ANY_GAIN_AND_PHASE},
        }

    cases = [
        case("linear", {**sleeping}, rl),
        case("zigzag", {**sleeping, **ZIGZAG}, [*rl, "sabotage"], like="linear"),
        case(
            "eplb sync",
            {**sleeping, **eplb(False)},
            [*rl[:2], "answer", rl[3], "answer"],
            like="linear",
        ),
        case(
            "eplb async",
            {**sleeping, **eplb(True)},
            ["answer", "answer", *rl[1:2], "answer", rl[3], "answer", "answer"],
            like="linear",
        ),
        case("eplb async level 2", {**sleeping, **eplb(True)}, ["answer", "sleep 2"], refused=True),
    ]
    for name, path in oss.items():
        cases.append(case(f"{name} linear", {"model": path, "dtype": "bfloat16"}, ["answer"]))
        cases.append(
            case(
                f"{name} zigzag",
                {"model": path, "dtype": "bfloat16", **ZIGZAG},
                ["answer"],
                like=f"{name} linear",
            )
        )
    mtp_draft = {
        "model": mtp,
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
    }
    # A draft that is the target itself: all that a right one drafts is accepted.
    own = {"method": "draft_model", "model": qwen, "num_speculative_tokens": 3}
    own_draft = {"model": qwen, "speculative_config": own}
    recorded = {
        "additional_config": {
            "expert_load_record": str(folder / "load.safetensors"),
            "expert_load_interval": 0.5,
        }
    }
    answers = ["answer"] * 3
    cases += [
        case("mtp linear", mtp_draft, answers),
        case("mtp zigzag", {**mtp_draft, **ZIGZAG, **recorded}, answers, like="mtp linear", rest=2),
        case("mtp eplb async", {**mtp_draft, **eplb(True)}, answers, like="mtp linear"),
        case("draft linear", own_draft, answers),
        case("draft zigzag", {**own_draft, **ZIGZAG}, answers, like="draft linear"),
        case(
            "draft zigzag graphs",
            {**own_draft, **ZIGZAG, "enforce_eager": False},
            answers,
            like="draft linear",
        ),
    ]
    return cases


def sglang_cases(folder: Path) -> list[Case]:
    """Return the cases of SGLang; models are written to ``folder``."""
    from tests.integration.sglang.speculative import write_qwen2_moe

    qwen, other = (
        str(write_qwen3_moe(folder / f"qwen{seed}", 32, seed=seed, size=SIZE)) for seed in (0, 7)
    )
    mtp, oss = str(write_glm4_moe_with_mtp(folder / "mtp")), folder / "oss"
    own = str(write_qwen2_moe(folder / "qwen2", size=SIZE))
    saver = {"model_path": qwen, "enable_memory_saver": True, "enable_weights_cpu_backup": True}
    eplb = {
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": 4,
        "expert_placement_strategy": "eplb",
        "expert_rebalance": ANY_GAIN,
        "ep_num_redundant_experts": 4,
    }
    rl = ["answer", "sleep", {"disk": other}, "answer"]
    gpt_oss = {
        "model_path": str(write_gpt_oss(oss, size=SIZE, yarn=False)),
        "disable_hybrid_swa_memory": True,  # no layer of this one has a window
        # SGLang makes its attention of the configuration's type, whatever --dtype says.
        "json_model_override_args": '{"dtype": "bfloat16", "torch_dtype": "bfloat16"}',
    }
    # SGLang 0.5.23 alone cannot load a bfloat16 gpt-oss over two ranks: it cuts no bias.
    one_rank = {"tp_size": 1, "ep_size": 1}
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
        case("oss linear", {**gpt_oss, **one_rank}, ["answer"]),
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
    """Return a case.

    Args:
        name: of the case.
        engine: the engine's arguments.
        steps: see the engine's child.
        like: the case whose answers these must equal.
        more: "refused": the last step must be; "rest": seconds before it stops; "check": ask the
            weight checker.
    """
    return {"name": name, "engine": engine, "steps": steps, "like": like, **more}
