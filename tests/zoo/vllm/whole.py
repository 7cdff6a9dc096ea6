"""Compare whole engines: each model of the zoo answers under zigzag as on one rank.

    python -m tests.zoo.vllm.whole RESULTS.json NAME...

Minutes for each ten models, so that no test runs it; what it saw stands in the issue. Workers are
forked from this process and with it what `process.prepare_process` does: what is no expert has the
same values on every rank.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.vllm import process, ranks
from tests.zoo.vllm.recipe import Recipe

PROMPTS = [[3, 14, 15, 92, 65, 35], [89, 79, 32, 38], [46, 26, 43]]

LONGEST = 300.0
"""Seconds that one model may take."""

CLOSE = 2e-3
"""Difference of two log probabilities that another order of summing may make."""


def answers(recipe: Recipe, path: Path, **arguments: Any) -> list[tuple[list[int], list[float]]]:
    """Return tokens and their log probabilities, greedily."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        block_size=32,
        gpu_memory_utilization=0.1,
        **{"dtype": "bfloat16" if linear_attention(recipe.config) else "float32"}
        | dict(recipe.engine)
        | arguments,
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True,
                              detokenize=False)  # fmt: skip
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    found = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        one = output.outputs[0]
        steps = zip(one.logprobs, one.token_ids)
        found.append((list(one.token_ids), [step[token].logprob for step, token in steps]))
    for worker in getattr(getattr(llm.llm_engine, "model_executor", None), "workers", ()):
        worker.proc.terminate()
    return found


def with_heads_of_a_real_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the latent attention's sizes of DeepSeek-V3.

    vLLM's CPU kernels take no others.
    """
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64} if config.get("kv_lora_rank") else {}
    parts = {k: with_heads_of_a_real_model(v) for k, v in config.items() if isinstance(v, dict)}
    return {**config, **parts, **sizes}


def linear_attention(config: dict[str, Any]) -> bool:
    """Return whether a model has gated delta nets, whose CPU kernel takes bfloat16 alone."""
    return any(
        name.startswith("linear_") or isinstance(value, dict) and linear_attention(value)
        for name, value in config.items()
    )


def compare(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Return what one recipe does in a whole engine."""
    path = directory / ranks.directory_of(recipe)
    sized = replace(recipe, config=with_heads_of_a_real_model(recipe.config))
    ranks.write_checkpoint(sized, path)
    ranks_of_two = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    one = answers(recipe, path)
    two = answers(recipe, path, **ranks_of_two, expert_placement_strategy="zigzag")
    found = difference(one, two)
    if not found["same_tokens"] or found["off"] > CLOSE:
        # Then it is vLLM's own doing if its own placement answers the same on two ranks.
        found["own_on_two_ranks"] = difference(answers(recipe, path, **ranks_of_two), two)
    return found


def difference(one: list[Any], two: list[Any]) -> dict[str, Any]:
    """Return whether all tokens are the same, and how far log probabilities are apart.

    Where they are.
    """
    same = [a[0] == b[0] for a, b in zip(one, two)]
    off = [np.abs(np.subtract(a[1], b[1])).max() for a, b, s in zip(one, two, same) if s]
    return {"same_tokens": all(same), "off": float(max(off)) if off else None}


def wait_for(child: int, seconds: float) -> bool:
    """Wait for a child that leads a process group, and end the group.

    Returns whether it ended by itself.
    """
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    return bool(ended)


def main() -> None:
    process.clean_environment()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.v1.executor import multiproc_executor

    import moe_placement_plugin
    from tests.zoo.vllm.recipes import RECIPES

    moe_placement_plugin.enable()
    # vLLM would spawn them, without what this process has prepared.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    process.prepare_process()
    results, names = (
        Path(sys.argv[1]),
        sys.argv[2:] or [n for n, r in RECIPES.items() if not r.draft],
    )
    seen = json.loads(results.read_text()) if results.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            began = time.monotonic()
            # One process for each: an engine can end the one that started it.
            child = os.fork()
            if child == 0:
                os.setsid()  # to be ended with all that it starts
                outcome = Path(directory) / "outcome.json"
                try:
                    made = compare(RECIPES[name], Path(directory))
                except BaseException as error:
                    made = {"error": f"{type(error).__name__}: {error}"[:400]}
                outcome.write_text(json.dumps(made))
                os._exit(0)
            in_time = wait_for(child, LONGEST)
            outcome = Path(directory) / "outcome.json"
            seen[name] = (
                json.loads(outcome.read_text())
                if outcome.exists()
                else {"error": "died" if in_time else f"not through after {LONGEST:g} s"}
            )
            outcome.unlink(missing_ok=True)
            seen[name]["seconds"] = round(time.monotonic() - began, 1)
            results.write_text(json.dumps(seen, indent=1))
            print(name, seen[name], flush=True)


if __name__ == "__main__":
    main()
