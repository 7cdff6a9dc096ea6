"""How each engine's server is started for the demonstration and asked for a completion."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Answer:
    """A greedy completion.

    Attributes:
        token_ids: generated tokens, ``[tokens]``.
        logprobs: their log probabilities (natural logarithm), ``[tokens]``.
    """

    token_ids: list[int]
    logprobs: list[float]


class DemoEngine(ABC):
    """One engine."""

    name: ClassVar[str]

    @abstractmethod
    def command(self, model: Path, port: int, strategy: str | None, record: Path | None) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a server.

        Args:
            model: the checkpoint.
            port: port to listen on.
            strategy: None for the stock engine on one rank, else the placement on two ranks with expert
                parallelism.
            record: file to record the expert load to.
        """

    @abstractmethod
    def complete(self, url: str, model: str, prompt: str, tokens: int) -> Answer:
        """A greedy completion by the server, through the ``openai`` client."""


def _completion(url: str, model: str, prompt: str, tokens: int, extra: Mapping[str, Any]) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        return client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, logprobs=1, extra_body=dict(extra)
        ).choices[0]


class Vllm(DemoEngine):
    """vLLM's CPU build."""

    name = "vllm"

    def command(self, model: Path, port: int, strategy: str | None, record: Path | None) -> tuple[list[str], dict[str, str]]:
        # The module, not the `vllm` command: the CPU build's command fails to find its own version.
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
            "--max-num-batched-tokens", "256", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.2",
            "--return-tokens-as-token-ids",
        ]  # fmt: skip
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        if strategy is None:
            return command, env | {"VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
        command += [
            "--tensor-parallel-size", "2", "--enable-expert-parallel", "--expert-placement-strategy", strategy,
        ]  # fmt: skip
        if record is not None:
            command += ["--expert-load-record", str(record), "--expert-load-interval", "1"]
        return command, env | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

    def complete(self, url: str, model: str, prompt: str, tokens: int) -> Answer:
        choice = _completion(url, model, prompt, tokens, {"ignore_eos": True})
        ids = [int(token.partition(":")[2]) for token in choice.logprobs.tokens]
        return Answer(ids, list(choice.logprobs.token_logprobs))


class Sglang(DemoEngine):
    """SGLang's CPU engine."""

    name = "sglang"

    def command(self, model: Path, port: int, strategy: str | None, record: Path | None) -> tuple[list[str], dict[str, str]]:
        command = [
            sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu",
            "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none",
            "--disable-overlap-schedule", "--max-total-tokens", "4096", "--max-running-requests", "8",
            "--mem-fraction-static", "0.3", "--skip-server-warmup",
        ]  # fmt: skip
        env = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        if strategy is None:
            # A name that no plugin has: an empty value would mean all of them.
            return command, env | {"SGLANG_PLUGINS": "none", "SGLANG_CPU_OMP_THREADS_BIND": "0,1"}
        command += ["--tp-size", "2", "--ep-size", "2", "--expert-placement-strategy", strategy]
        if record is not None:
            command += ["--expert-load-record", str(record), "--expert-load-interval", "1"]
        return command, env | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}

    def complete(self, url: str, model: str, prompt: str, tokens: int) -> Answer:
        choice = _completion(url, model, prompt, tokens, {"ignore_eos": True, "return_token_ids": True})
        return Answer(list(choice.token_ids), list(choice.logprobs.token_logprobs))


DEMO_ENGINES: dict[str, DemoEngine] = {engine.name: engine for engine in (Vllm(), Sglang())}
"""Name -> engine."""
