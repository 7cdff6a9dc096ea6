"""Run an engine's cases on two GPUs, several at a time, and print a table.

    python -m tests.gpu vllm|sglang OUT [NAME ...]

All cases are run, or those named and what they are compared with.

Exits with 1 when a case differs from the one that it is like. Tolerances: tokens may part where
float32 kernels add in another order, which the table shows as the tokens that agree; log
probabilities are compared up to there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu import cases as all_cases
from tests.support.children import run_child
from tests.support.paths import ROOT

AT_ONCE = 4
LIMIT_S = 200
DTYPE = {"vllm": "float32", "sglang": "bfloat16"}
"""Of cases that name none; SGLang's norms of a GPU take no float32."""
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.15}
"""Between log probabilities of the same token."""


def main() -> None:
    """Run and judge."""
    engine, out, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    models = Path("/tmp") / f"moe-placement-gpu-{engine}"
    cases = getattr(all_cases, f"{engine}_cases")(models)
    if names:
        likes = {case["like"] for case in cases if case["name"] in names}
        cases = [case for case in cases if case["name"] in {*names, *likes}]
    out.mkdir(parents=True, exist_ok=True)

    def run(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
        number, case = numbered
        stem = out / f"{engine}-{case['name'].replace(' ', '-')}"
        if engine == "sglang":
            case["engine"]["port"] = 31000 + 200 * number
        stem.with_suffix(".case").write_text(json.dumps(case))
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            f"tests.gpu.{engine}_child",
            f"{stem}.case",
            f"{stem}.json",
        ]
        finished = run_child(command, LIMIT_S, {}, ROOT)
        stem.with_suffix(".log").write_text(finished.output)
        found = stem.with_suffix(".json")
        result = json.loads(found.read_text()) if found.exists() else {"steps": []}
        result |= {"code": finished.code, "wall_s": time.monotonic() - began}
        if len(result["steps"]) < len(case["steps"]) or finished.code:
            result["tail"] = finished.output[-2500:]
        return result

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = dict(zip((c["name"] for c in cases), pool.map(run, enumerate(cases))))
    (out / f"{engine}-all.json").write_text(json.dumps(results))
    versions = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import torch, {engine}; print({engine}.__version__, torch.__version__)",
        ],
        capture_output=True,
        text=True,
    ).stdout.split("\n")[-2:-1]
    print(f"\n{engine} {versions}; {len(cases)} engines on two GPUs")
    good = all([report(case, results, engine) for case in cases])
    sys.exit(0 if good else 1)


def report(case: dict[str, Any], results: dict[str, Any], engine: str) -> bool:
    """Print a case's lines; whether it is as it should be."""
    mine = results[case["name"]]
    theirs = results.get(case["like"] or "", {"steps": []})
    good = "tail" not in mine
    print(
        f"{case['name']:22s} exit {mine['code']} in {mine['wall_s']:.0f} s", mine.get("draft", "")
    )
    expected = dict(by_weights(theirs["steps"]))
    for step, weights in zip(mine["steps"], (w for w, _ in by_weights(mine["steps"]))):
        said = f"   {json.dumps(step['step'])[:40]:40s} {step.get('seconds', 0):6.1f} s"
        if "ended" in step or "answers" not in step:
            said, good = f"{said} ENDED {step.get('ended', '')[:300]}", False
        elif weights in expected:
            dtype = case["engine"].get("dtype", DTYPE[engine])
            control = step["step"] == "sabotage"  # what wrong experts do must show in the answers
            seen = {k: v for k, v in step.items() if not (control and k == "digests")}
            text, same = compare(seen, expected[weights], dtype)
            same = same != control
            said, good = f"{said} {text}", good and same
        if step.get("retries"):
            said += f" after {step['retries']} refusals while experts moved"
        if step["error"]:
            said += f" refused: {step['error'][:160]}"
            good = good and bool(case.get("refused"))
        print(said)
    if "check" in mine:
        print(f"   check: {mine['check']}")
        good = good and mine["check"][0]
    if not good:
        print("   WRONG", mine.get("tail", ""))
    return good


def by_weights(steps: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return (the weights that were in force, step) of each step."""
    found, weights = [], "first"
    for step in steps:
        if isinstance(step["step"], dict) and not step["error"]:
            weights = json.dumps(step["step"])
        found.append((weights, step))
    return found


def compare(step: dict[str, Any], expected: dict[str, Any], dtype: str) -> tuple[str, bool]:
    """Compare a step's answers and weights with the expected ones."""
    total = agree = 0
    worst = 0.0
    for mine, theirs in zip(step["answers"], expected["answers"]):
        for i in range(min(len(mine["ids"]), len(theirs["ids"]))):
            total += 1
            if mine["ids"][: i + 1] != theirs["ids"][: i + 1]:
                continue
            agree += 1
            worst = max(worst, abs(mine["logprobs"][i] - theirs["logprobs"][i]))
    same = worst < TOLERANCE[dtype] and agree > 0.6 * total
    text = f"{agree}/{total} tokens, log probabilities within {worst:.1e}"
    if "digests" in step and "digests" in expected:
        mine, theirs = by_expert(step["digests"]), by_expert(expected["digests"])
        text += f", {len(mine)} experts' weights {'equal' if mine == theirs else 'DIFFER'}"
        same = same and mine == theirs
    if step["answers"] and step["answers"][0].get("verified") is not None:
        counts = [sum(a["verified"] for a in s["answers"]) for s in (step, expected)]
        text += f", {counts[0]} verifications (expected {counts[1]})"
    return text, same


def by_expert(ranks: list[dict[str, Any]]) -> dict[tuple[str, int], set]:
    """Return the digests of each expert's weights in all of its slots, by (layer, expert)."""
    found: dict[tuple[str, int], set] = {}
    for rank in ranks:
        for layer, slots in rank["layers"].items():
            for expert, digests in slots:
                found.setdefault((layer, expert), set()).add(json.dumps(digests))
    return found


if __name__ == "__main__":
    main()
