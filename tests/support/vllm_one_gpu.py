"""Compare two ranks of the installed vLLM on one GPU with its own single rank.

    python -m tests.support.vllm_one_gpu [--dtype float32] [CASE ...]

Everything but NCCL and CUDA graphs is what two GPUs run: Triton kernels, weight loaders, expert
maps, EPLB's exchange. On a machine without a GPU it ends with 2.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import numpy as np

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.gpu import one_gpu
from tests.support.children import python, run_child
from tests.support.paths import ROOT

MODELS = ROOT / "examples" / "tiny_moe"
PROMPTS = [
    "sum: 12+34=",
    "sort: dbca=",
    "copy: hello=",
    "brackets: (()[])=",
    "reverse: abcde=",
    "sum: 7+85=",
] * 2
TOLERANCE = {"float32": 0.02, "bfloat16": 0.5}
"""Largest difference of a log probability.

Triton multiplies float32 as TF32; in bfloat16 experts are summed in another order.
"""


def write_load(name: str, path: Path) -> None:
    """Write a skewed load of the model's MoE layers."""
    config = json.loads((MODELS / name / "config.json").read_text())
    first = config.get("first_k_dense_replace", 0)
    layers = tuple(range(first, config["num_hidden_layers"]))
    write(ExpertLoad(np.random.default_rng(1).zipf(1.5, (1, len(layers), 32)), layers), path)


def under_eplb(interval: int) -> dict:
    """Return the arguments of vLLM's EPLB with 4 redundant experts, moving at every interval."""
    config = {"window_size": interval, "step_interval": interval, "num_redundant_experts": 4}
    return {"enable_eplb": True, "eplb_config": config}


def cases(folder: Path) -> list[dict]:
    """Return what is run; "plugins": "" is the engine without this plugin."""
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    moving = {**ranks, **under_eplb(4)}
    always = {"min_gain": 0, "hysteresis": 0, "max_phase_loss": 0.5}
    rebalance = {"additional_config": {"expert_rebalance": always}}
    zigzag = {"expert_placement_strategy": "zigzag"}
    rows: list[tuple[str, str, dict, str | None]] = []
    for model in ("qwen3-moe", "glm4-moe"):
        load = folder / f"{model}.safetensors"
        write_load(model, load)
        from_load = {"expert_placement_strategy": "eplb", "expert_placement_file": str(load)}
        checked = {**ranks, **zigzag, "expert_placement_verify": "checkpoint"}
        still = {**ranks, **under_eplb(10**6)}
        rows += [
            (model, "one rank", {}, ""),
            (model, "one rank again", {}, ""),
            (model, "stock linear", ranks, ""),
            (model, "stock EPLB, 4 redundant, nothing moved", still, ""),
            (model, "stock EPLB, 4 redundant, moving", moving, ""),
            (model, "zigzag, checkpoint verified", checked, None),
            (model, "eplb from a load", {**ranks, **from_load}, None),
            (model, "zigzag under EPLB, 4 redundant, moving", {**moving, **zigzag}, None),
            (
                model,
                "eplb under EPLB, 4 redundant, moving",
                {**moving, **from_load, **rebalance},
                None,
            ),
        ]
    return [
        {
            "name": f"{model}: {name}",
            "model": model,
            "engine": {"model": str(MODELS / model), **engine},
            "plugins": plugins,
        }
        for model, name, engine, plugins in rows
    ]


def run(case: dict, folder: Path, dtype: str) -> tuple[dict, str]:
    """Return the case's result and its log."""
    shared = {
        "distributed_executor_backend": "mp",
        "disable_custom_all_reduce": True,
        "kv_cache_memory_bytes": 1 << 28,
        "dtype": dtype,
    }
    task = {"name": case["name"], "engine": shared | case["engine"], "prompts": PROMPTS}
    if case["plugins"] is None:
        task["probe"] = True
    (folder / "cases.json").write_text(json.dumps([task]))
    results = folder / "results.json"
    results.unlink(missing_ok=True)
    env = {
        **one_gpu.environment("shared", "vllm", ROOT),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if case["plugins"] is not None:
        env["VLLM_PLUGINS"] = case["plugins"]
    done = run_child(
        python("-m", "tests.support.vllm_runner", str(folder / "cases.json"), str(results)),
        150,
        env,
        ROOT,
    )
    if not results.exists():
        return {"error": f"the engine's process ended with {done.code}"}, done.output
    return json.loads(results.read_text())[case["name"]], done.output


def apart(ours: dict, theirs: dict) -> tuple[int, float, float]:
    """Return how many answers differ, and how far log probabilities are apart.

    It returns (answers with other tokens, greatest and mean difference up to the first other
    token).
    """
    different, gaps = 0, []
    for a, b in zip(ours["answers"], theirs["answers"]):
        same = [x == y for x, y in zip(a["ids"], b["ids"])]
        different += not all(same)
        until = same.index(False) if False in same else len(same)
        gaps += [abs(x - y) for x, y in zip(a["logprobs"][:until], b["logprobs"][:until])]
    return (
        different,
        max(gaps, default=float("inf")),
        float(np.mean(gaps)) if gaps else float("inf"),
    )


def main() -> int:
    """Run the cases; 0 when every placement gives what one rank gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="parts of names of cases")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--logs", type=Path, help="keep the engine's logs here")
    given = parser.parse_args()
    import torch
    import vllm

    if not torch.cuda.is_available():
        print("no GPU here")
        return 2
    print(
        f"vllm {vllm.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}, "
        f"{given.dtype}",
        flush=True,
    )
    failed, references = 0, {}
    with tempfile.TemporaryDirectory() as name:
        every = cases(Path(name))
        wanted = {
            c["name"]
            for c in every
            if not given.only or any(part in c["name"] for part in given.only)
        }
        wanted |= {f"{c['model']}: one rank" for c in every if c["name"] in wanted}
        for case in every:
            if case["name"] not in wanted:
                continue
            result, log = run(case, Path(name), given.dtype)
            if given.logs:
                given.logs.mkdir(parents=True, exist_ok=True)
                (given.logs / (re.sub(r"\W+", "-", case["name"]) + ".log")).write_text(
                    log + "\n" + result.get("traceback", "")
                )
            if "error" in result:
                failed += 1
                print(f"  {case['name']:50} FAILED {result['error'][:300]}", flush=True)
                continue
            reference = references.setdefault(case["model"], result)
            different, most, mean = apart(result, reference)
            good = most <= TOLERANCE[given.dtype] and (given.dtype != "float32" or different == 0)
            failed += not good
            moved = len(re.findall(r"Rearranged experts", log))
            print(
                f"  {case['name']:50} {'ok   ' if good else 'WRONG'} start "
                f"{result['start_s']:5.1f} s, {different} answers differ, log probabilities "
                f"{most:.1e} apart at most, {mean:.1e} in the mean; {moved} rearrangements",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
