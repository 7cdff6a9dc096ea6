"""Run a few placements on the installed vLLM against its own single rank; print a table.

python -m tests.support.vllm_versions
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.demo.tiny_models import write_glm4_moe, write_qwen3_moe
from tests.support.children import engine_lock, python, run_child
from tests.support.paths import ROOT

TOLERANCE = 1e-4


def cases(folder: Path) -> list[dict]:
    """Return what is run; checkpoints and the load are written to a folder."""
    qwen, glm = str(write_qwen3_moe(folder / "qwen")), str(write_glm4_moe(folder / "glm"))
    load = folder / "load.safetensors"
    write(ExpertLoad(np.random.default_rng(1).zipf(1.5, (1, 4, 30))), load)
    one = {"VLLM_CPU_OMP_THREADS_BIND": "0,1"}
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    zigzag = {"expert_placement_strategy": "zigzag"}
    from_load = {"expert_placement_strategy": "eplb", "expert_placement_file": str(load)}
    filtered = {"enable_ep_weight_filter": True}

    def placed(name: str, model: str, engine: dict, **more) -> dict:
        ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
        engine = {"model": model, **ranks, **engine}
        return {"name": name, "engine": engine, "env": two, "probe": True, **more}

    return [
        {"name": "qwen stock, one rank", "engine": {"model": qwen}, "env": one},
        {"name": "glm stock, one rank", "engine": {"model": glm}, "env": one},
        placed("qwen zigzag", qwen, zigzag, sabotage=True),
        placed(
            "qwen eplb, filter, compiled", qwen, {**from_load, **filtered, "enforce_eager": False}
        ),
        placed("glm zigzag, filter", glm, {**zigzag, **filtered}),
    ]


def run() -> tuple[list[dict], dict[str, dict]]:
    """Run all cases in one child; return them, and results by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = cases(folder)
        given, found = folder / "cases.json", folder / "results.json"
        given.write_text(json.dumps(wanted))
        command = python("-m", "tests.support.vllm_runner", str(given), str(found))
        with engine_lock():
            finished = run_child(command, 600, cwd=ROOT)
        results = json.loads(found.read_text()) if found.exists() else {}
    error = f"not reached, exit code {finished.code}\n{finished.output[-3000:]}"
    return wanted, {case["name"]: results.get(case["name"], {"error": error}) for case in wanted}


def main() -> int:
    """Print a line for each case; 0 when every placement answers as one rank does."""
    wanted, results = run()
    import torch
    import vllm

    print(
        f"vllm {vllm.__version__} from {Path(vllm.__file__).parents[1].name}, "
        f"torch {torch.__version__}"
    )
    failed = 0
    for case in wanted:
        name, result = case["name"], results[case["name"]]
        if "error" in result:
            print(f"  {name:30} FAILED {result['error']}")
            failed += 1
            continue
        stock = results[f"{name.split()[0]} stock, one rank"]["answers"]
        same = [a["ids"] for a in result["answers"]] == [a["ids"] for a in stock]
        difference = largest(result["answers"], stock)
        hits = [
            sum(n for hit, n in worker["hits"].items() if hit.startswith("cpu-"))
            for worker in result.get("workers", [])
        ]
        wrong = ""
        if "sabotaged" in result:
            wrong = f", sabotaged {largest(result['sabotaged'], stock):.1e}"
        print(
            f"  {name:30} tokens {'equal' if same else 'DIFFERENT'}, "
            f"logprobs within {difference:.1e}, CPU patch hits {hits}{wrong}"
        )
        failed += not same or difference > TOLERANCE
    return 1 if failed else 0


def largest(a: list[dict], b: list[dict]) -> float:
    """Return the greatest difference of log probabilities."""
    return max(
        float(np.abs(np.subtract(x["logprobs"], y["logprobs"])).max())
        for x, y in zip(a, b, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
