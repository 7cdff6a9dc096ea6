"""What a vLLM is started with, as far as this plugin cares: what the rules of `support` look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kernels import ALL2ALL_WITH_TABLES, BATCHED_BACKENDS, MOE_BACKENDS_REFUSED


@dataclass(frozen=True)
class Combination:
    """Say what an engine is started with, as far as this plugin cares.

    Attributes:
        model: path or name of the model.
        architecture: name of its class.
        is_moe: whether vLLM takes it for a Mixture-of-Experts model.
        expert_parallel: ``--enable-expert-parallel``.
        ep_size: EP ranks.
        eplb: ``--enable-eplb``.
        elastic: ``--enable-elastic-ep``.
        load_format: value of ``--load-format``.
        transfer: back end of ``--weight-transfer-config``, empty for none.
        moe_backend: value of ``--moe-backend``.
        all2all: value of ``--all2all-backend`` where vLLM uses one, else empty.
        even: whether every rank of the placement has the same number of slots.
        options: other options that are switched on, as they are typed.
    """

    model: str = ""
    architecture: str = ""
    is_moe: bool = True
    expert_parallel: bool = True
    ep_size: int = 2
    eplb: bool = False
    elastic: bool = False
    load_format: str = "auto"
    transfer: str = ""
    moe_backend: str = "auto"
    all2all: str = ""
    even: bool = True
    options: frozenset[str] = frozenset()

    @property
    def kernel_ignores_map(self) -> bool:
        """Whether the MoE back end that was named computes with contiguous, even blocks."""
        batched = self.all2all in ALL2ALL_WITH_TABLES and self.moe_backend in BATCHED_BACKENDS
        return self.moe_backend in MOE_BACKENDS_REFUSED and not batched


def combination_of(vllm_config: Any) -> Combination:
    """Read off a fresh ``VllmConfig`` what the engine is started with."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    load_format = vllm_config.load_config.load_format
    transfer = getattr(getattr(vllm_config, "weight_transfer_config", None), "backend", None)
    kernels = getattr(vllm_config, "kernel_config", None)
    used = uses_all2all(parallel) or parallel.all2all_backend == "passthrough"
    given = {
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1)
        > 1,
        "--enable-dbo": getattr(parallel, "use_ubatching", False),
        "--enable-return-routed-experts": getattr(model, "enable_return_routed_experts", False),
    }
    return Combination(
        model=str(model.model),
        architecture=str(model.architecture),
        is_moe=bool(model.is_moe),
        expert_parallel=bool(parallel.enable_expert_parallel),
        ep_size=ep_size_of(parallel),
        eplb=bool(parallel.enable_eplb),
        elastic=bool(getattr(parallel, "enable_elastic_ep", False)),
        load_format=str(getattr(load_format, "value", load_format)),
        transfer=str(transfer or ""),
        moe_backend=str(getattr(kernels, "moe_backend", "auto")),
        all2all=str(parallel.all2all_backend) if used else "",
        options=frozenset(name for name, switched_on in given.items() if switched_on),
    )


def ep_size_of(parallel: Any) -> int:
    """Return the EP ranks of a ``ParallelConfig``: all of TP, DP and prefill context parallelism."""
    return (
        parallel.tensor_parallel_size
        * parallel.data_parallel_size
        * getattr(parallel, "prefill_context_parallel_size", 1)
    )


def uses_all2all(parallel: Any) -> bool:
    """Decide whether an engine sends tokens between ranks before its experts."""
    return (
        parallel.data_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        or bool(getattr(parallel, "use_sequence_parallel_moe", False))
    )
