"""A few placements on the vLLM that this interpreter imports, against its own single rank; prints a table.

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


def main() -> int:
    """0 when every placement gives the tokens and log probabilities of one rank."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        qwen, glm = str(write_qwen3_moe(folder / "qwen")), str(write_glm4_moe(folder / "glm"))
        load = folder / "load.safetensors"
        write(ExpertLoad(np.random.default_rng(1).zipf(1.5, (1, 4, 30))), load)
        one = {"VLLM_CPU_OMP_THREADS_BIND": "0,1"}
        two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
        cases = [
            {"name": "qwen stock, one rank", "engine": {"model": qwen}, "env": one},
            {"name": "glm stock, one rank", "engine": {"model": glm}, "env": one},
            {"name": "qwen zigzag", "engine": {"model": qwen, **ranks, "expert_placement_strategy": "zigzag"}, "env": two, "probe": True,
             "sabotage": True},
            {"name": "qwen eplb, filter, compiled", "engine": {"model": qwen, **ranks, "expert_placement_strategy": "eplb",
             "expert_placement_file": str(load), "enable_ep_weight_filter": True, "enforce_eager": False}, "env": two, "probe": True},
            {"name": "glm zigzag, filter", "engine": {"model": glm, **ranks, "expert_placement_strategy": "zigzag",
             "enable_ep_weight_filter": True}, "env": two, "probe": True},
        ]  # fmt: skip
        (folder / "cases.json").write_text(json.dumps(cases))
        with engine_lock():
            finished = run_child(
                python(
                    "-m",
                    "tests.support.vllm_runner",
                    str(folder / "cases.json"),
                    str(folder / "results.json"),
                ),
                600,
                cwd=ROOT,
            )
        path = folder / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
    import torch
    import vllm

    print(
        f"vllm {vllm.__version__} from {Path(vllm.__file__).parents[1].name}, torch {torch.__version__}"
    )
    for case in cases:
        result = results.get(
            case["name"],
            {"error": f"not reached, exit code {finished.code}\n{finished.output[-3000:]}"},
        )
        if "error" in result:
            print(f"  {case['name']:30} FAILED {result['error']}")
            failed += 1
            continue
        stock = results[f"{case['name'].split()[0]} stock, one rank"]["answers"]
        same = [a["ids"] for a in result["answers"]] == [a["ids"] for a in stock]
        difference = largest(result["answers"], stock)
        hits = [
            sum(n for name, n in w["hits"].items() if name.startswith("cpu-"))
            for w in result.get("workers", [])
        ]
        wrong = (
            f", sabotaged {largest(result['sabotaged'], stock):.1e}"
            if "sabotaged" in result
            else ""
        )
        print(
            f"  {case['name']:30} tokens {'equal' if same else 'DIFFERENT'}, logprobs within {difference:.1e}, CPU patch hits {hits}{wrong}"
        )
        failed += not same or difference > TOLERANCE
    return 1 if failed else 0


def largest(a: list[dict], b: list[dict]) -> float:
    """Greatest difference of log probabilities."""
    return max(
        float(np.abs(np.subtract(x["logprobs"], y["logprobs"])).max())
        for x, y in zip(a, b, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
