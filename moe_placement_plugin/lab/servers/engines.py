"""Start each engine's server on this machine, and ask it for a completion."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import ClassVar
from urllib.request import Request, urlopen

from ...core.errors import PlacementError

NEVER = 10**9
"""Forward passes between two rebalances of an EPLB that shall not rebalance."""


@dataclass(frozen=True)
class Completion:
    """Hold a greedy completion.

    Attributes:
        token_ids: generated tokens, ``[tokens]``.
        logprobs: their log probabilities (natural logarithm), ``[tokens]``.
        alternatives: the most probable tokens at each place and their log probabilities, as many as
            were asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    alternatives: list[dict[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Placed:
    """Describe a placement that a server is started with.

    Attributes:
        strategy: name of the strategy.
        ranks: EP ranks, which are also the tensor-parallel ranks.
        file: plan or recorded load of ``--expert-placement-file``.
        redundant: redundant experts per layer.
        record: file to record the expert load to.
    """

    strategy: str
    ranks: int = 2
    file: Path | None = None
    redundant: int = 0
    record: Path | None = None

    def flags(self) -> list[str]:
        """Return this package's flags, which are the same in both engines."""
        flags = ["--expert-placement-strategy", self.strategy]
        if self.file is not None:
            flags += ["--expert-placement-file", str(self.file)]
        if self.record is not None:
            flags += ["--expert-load-record", str(self.record), "--expert-load-interval", "1"]
        return flags


@dataclass(frozen=True)
class ServerSettings:
    """Hold what all servers of a comparison share.

    Attributes:
        cpu: serve on this machine's CPU.
        dtype: of weights and activations; ``float32`` makes answers comparable to the last token.
        max_model_len: tokens of a prompt with its answer.
        stock_ranks: tensor-parallel ranks of the server without a placement.
        arguments: more arguments of the engine's own.
    """

    cpu: bool = True
    dtype: str = "float32"
    max_model_len: int = 256
    stock_ranks: int = 1
    arguments: tuple[str, ...] = ()


def cores_of_ranks(ranks: int) -> str:
    """Return this machine's cores for each rank, as both engines' CPU builds want them.

    They are ``0,1`` for one rank, ``0|1`` for two.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    return "|".join(
        ",".join(str(cores[(rank * each + i) % len(cores)]) for i in range(each))
        for rank in range(ranks)
    )


class ServingEngine(ABC):
    """Say how one engine's server is started and asked."""

    name: ClassVar[str]

    @abstractmethod
    def command(
        self,
        model: Path,
        port: int,
        placed: Placed | None,
        settings: ServerSettings = ServerSettings(),
    ) -> tuple[list[str], dict[str, str]]:
        """Return command line and environment of a server.

        Args:
            model: the checkpoint.
            port: port to listen on.
            placed: None for the stock engine without expert parallelism and with this plugin
                switched off, else the placement.
            settings: what it shares with the servers that it is compared with.

        Raises:
            PlacementError: when the engine cannot be started so.
        """

    def complete(
        self, url: str, model: str, prompt: str | list[int], tokens: int, alternatives: int = 1
    ) -> Completion:
        """Have the server complete a prompt greedily.

        Args:
            url: of the server.
            model: its name.
            prompt: text or token ids.
            tokens: to generate.
            alternatives: most probable tokens to name at each place.

        Raises:
            PlacementError: when the server gives none: it has died, or its engine has.
        """
        try:
            return self._complete(url, model, prompt, tokens, alternatives)
        except (OSError, HTTPException) as error:
            raise PlacementError(f"{url} gave no answer: {error}") from error

    @abstractmethod
    def _complete(
        self, url: str, model: str, prompt: str | list[int], tokens: int, alternatives: int
    ) -> Completion:
        """Do what `complete` does; raises OSError or HTTPException when there is no answer."""


class Vllm(ServingEngine):
    """Start vLLM's CPU build."""

    name = "vllm"

    def command(
        self,
        model: Path,
        port: int,
        placed: Placed | None,
        settings: ServerSettings = ServerSettings(),
    ) -> tuple[list[str], dict[str, str]]:
        # The module, not the `vllm` command: the CPU build's command fails to find its own version.
        command = _words(
            "vllm.entrypoints.openai.api_server",
            {
                "--model": model,
                "--served-model-name": "tiny",
                "--host": "127.0.0.1",
                "--port": port,
                "--dtype": settings.dtype,
                "--max-model-len": settings.max_model_len,
                "--return-tokens-as-token-ids": None,
            },
        )
        env = {"HF_HUB_OFFLINE": "1"}
        ranks = settings.stock_ranks if placed is None else placed.ranks
        if settings.cpu:
            command += f"""--enforce-eager --max-num-batched-tokens {settings.max_model_len}
                --max-num-seqs 8 --gpu-memory-utilization 0.2""".split()
            env |= {
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": cores_of_ranks(ranks),
            }
        if ranks > 1:
            command += ["--tensor-parallel-size", str(ranks)]
        if placed is None:
            env["VLLM_PLUGINS"] = ""
        else:
            command += ["--enable-expert-parallel", *placed.flags()]
            if placed.redundant:
                # vLLM has redundant experts under its EPLB only; an interval that is never reached
                # leaves them where they are.
                eplb = {
                    "num_redundant_experts": placed.redundant,
                    "window_size": 1000,
                    "step_interval": NEVER,
                }
                command += ["--enable-eplb", "--eplb-config", json.dumps(eplb)]
        return [*command, *settings.arguments], env

    def _complete(
        self, url: str, model: str, prompt: str | list[int], tokens: int, alternatives: int
    ) -> Completion:
        from openai import APIError, OpenAI

        with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
            asked = {
                "max_tokens": tokens,
                "temperature": 0,
                "logprobs": alternatives,
                "extra_body": {"ignore_eos": True},
            }
            try:
                choice = client.completions.create(model=model, prompt=prompt, **asked).choices[0]
            except APIError as error:
                raise OSError(str(error)) from error
        found = choice.logprobs
        top = [
            {_token_id(token): logprob for token, logprob in place.items()}
            for place in found.top_logprobs
        ]
        return Completion(
            [_token_id(token) for token in found.tokens], list(found.token_logprobs), top
        )


class Sglang(ServingEngine):
    """Start SGLang's CPU engine."""

    name = "sglang"

    def command(
        self,
        model: Path,
        port: int,
        placed: Placed | None,
        settings: ServerSettings = ServerSettings(),
    ) -> tuple[list[str], dict[str, str]]:
        command = _words(
            "sglang.launch_server",
            {
                "--model-path": model,
                "--served-model-name": "tiny",
                "--host": "127.0.0.1",
                "--port": port,
                "--dtype": settings.dtype,
                "--context-length": settings.max_model_len,
                "--skip-server-warmup": None,
            },
        )
        env = {"HF_HUB_OFFLINE": "1"}
        ranks = settings.stock_ranks if placed is None else placed.ranks
        if settings.cpu:
            command += f"""--device cpu --attention-backend torch_native
                --sampling-backend pytorch --grammar-backend none --disable-overlap-schedule
                --max-total-tokens {max(4096, 2 * settings.max_model_len)}
                --max-running-requests 8 --mem-fraction-static 0.3""".split()
            env |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "TORCHDYNAMO_DISABLE": "1",
                "SGLANG_CPU_OMP_THREADS_BIND": cores_of_ranks(ranks),
            }
        if ranks > 1:
            command += ["--tp-size", str(ranks)]
        if placed is None:
            # A name that no plugin has: an empty value would mean all of them.
            env["SGLANG_PLUGINS"] = "none"
        else:
            command += ["--ep-size", str(ranks), *placed.flags()]
            if placed.redundant:
                command += ["--ep-num-redundant-experts", str(placed.redundant)]
        return [*command, *settings.arguments], env

    def _complete(
        self, url: str, model: str, prompt: str | list[int], tokens: int, alternatives: int
    ) -> Completion:
        # SGLang's own API: token ids over the other one are younger than the oldest version that we
        # run with.
        asked = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "return_logprob": True,
            "top_logprobs_num": alternatives,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        request = Request(
            f"{url}/generate", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=120) as answer:  # noqa: S310 - a server of our own
            found = json.load(answer)["meta_info"]
        chosen = found["output_token_logprobs"]
        top = [
            {int(token): float(logprob) for logprob, token, _ in place}
            for place in found["output_top_logprobs"]
        ]
        return Completion(
            [int(token) for _, token, _ in chosen],
            [float(logprob) for logprob, _, _ in chosen],
            top,
        )


def _words(module: str, options: Mapping[str, object]) -> list[str]:
    """Return the command that runs a module with options; one whose value is None stands alone."""
    words = [sys.executable, "-m", module]
    for name, value in options.items():
        words += [name] if value is None else [name, str(value)]
    return words


def _token_id(word: str) -> int:
    """Return the 17 of ``token_id:17``."""
    return int(word.partition(":")[2])


SERVING_ENGINES: dict[str, ServingEngine] = {engine.name: engine for engine in (Vllm(), Sglang())}
"""Name -> engine."""


def report_of_workers(log: Path) -> str:
    """Return the line of a server's log in which a worker reports the placement in force.

    It is empty without one.
    """
    said = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if "moe_placement_plugin:" in line
    ]
    lines = [line for line in said if "EP rank" in line] or [
        line for line in said if "EPLB begins with placement" in line
    ]
    return lines[0].partition("moe_placement_plugin:")[2].strip() if lines else ""
