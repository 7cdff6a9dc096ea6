"""Run one rank of vLLM without an engine: its config, its loader, its MoE layers."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from tests.zoo.checkpoint import HIDDEN
from tests.zoo.vllm.recipe import OWN_CHECKPOINT

TOKENS = 24
"""Tokens that each layer is asked for."""

ROUNDED = "_zoo_rounded"
"""Attribute of a ``RoutedExperts``: names of its parameters that round what is loaded."""

PARTS_LOADED = "_zoo_loaded"
"""Attribute of a ``RoutedExperts``: parameter -> copy, as the loader left it."""


def routed(model: Any) -> dict[str, Any]:
    """Name -> ``RoutedExperts`` of a model."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {m.layer_name: m for m in model.modules() if isinstance(m, RoutedExperts)}


def note_loaded(model: Any) -> None:
    """Remember what the loader has left in the slots."""
    for layer in routed(model).values():
        object.__setattr__(layer, PARTS_LOADED, _slots(layer))
        object.__setattr__(layer, ROUNDED, _of_few_bits(layer))


def _of_few_bits(layer: Any) -> set[str]:
    """Return the names of the parameters that hold values of 16 bits."""
    import torch

    few = (torch.bfloat16, torch.float16)
    return {name for name, held in layer.named_parameters(recurse=False) if held.dtype in few}


def _slots(layer: Any) -> dict[str, np.ndarray]:
    import torch

    held = {}
    for name, parameter in layer.named_parameters(recurse=False):
        data = parameter.detach()
        if data.element_size() == 1:
            data = data.view(torch.uint8)
        elif data.dtype in (torch.bfloat16, torch.float16):
            data = data.float()
        held[name] = data.clone().numpy()
    return held


def rounded(values: dict[str, np.ndarray], names: set[str]) -> dict[str, np.ndarray]:
    """Return a slot's expected values, those of these parameters as bfloat16 holds them."""
    import torch

    return {
        name: torch.from_numpy(v).bfloat16().float().numpy() if name in names else v
        for name, v in values.items()
    }


def fill_rest(model: Any) -> None:
    """Give what is no expert the same values on every rank, however it is cut.

    By name where ranks hold the whole (gates, correction biases) or known rows (embeddings); else a
    constant.
    """
    import torch
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    experts = {
        id(parameter)
        for layer in routed(model).values()
        for name, parameter in layer.named_parameters()
        if name.startswith("w")
    }
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in experts or not parameter.is_floating_point():
                    continue
                if parameter.element_size() == 1:
                    continue
                full = f"{prefix}.{name}"
                if "correction" in name or isinstance(module, ReplicatedLinear):
                    parameter.copy_(_named(full, tuple(parameter.shape)))
                elif isinstance(module, VocabParallelEmbedding) and parameter.dim() == 2:
                    at = module.shard_indices
                    rows = at.org_vocab_end_index - at.org_vocab_start_index
                    every = _named(full, (module.org_vocab_size, parameter.shape[1]))
                    parameter.zero_()
                    parameter[:rows] = every[at.org_vocab_start_index : at.org_vocab_end_index]
                else:
                    parameter.fill_(1.0 if "norm" in full else 0.03)


def _named(name: str, shape: tuple[int, ...]) -> Any:
    """Draw random values that the end of a name, from its layer on, decides."""
    import torch

    rng = np.random.default_rng(crc32(name.rpartition(".layers.")[2].encode()))
    values = rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1)
    return torch.from_numpy(values.astype(np.float32))


def engine_config(path: Path, ranks: int, engine: dict[str, Any]) -> Any:
    """Return the ``VllmConfig`` as a worker receives it."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = dict(
        model=str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        tensor_parallel_size=ranks,
        enable_expert_parallel=ranks > 1,
        distributed_executor_backend="mp" if ranks > 1 else None,
        disable_log_stats=True,
        seed=0,
    )
    arguments |= engine
    if speculative := arguments.get("speculative_config"):
        arguments["speculative_config"] = {
            key: str(path) if value == OWN_CHECKPOINT else value
            for key, value in speculative.items()
        }
    made = EngineArgs(**arguments).create_engine_config()
    return pickle.loads(pickle.dumps(made))


@contextmanager
def rank_of(config: Any, rank: int, ranks: int, store: str) -> Iterator[None]:
    """Make groups as a worker has them, those of the first config for all that follow."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    config.parallel_config.rank = rank
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            parallel_state.set_custom_all_reduce(False)
            parallel_state.init_distributed_environment(
                ranks, rank, f"file://{store}", local_rank=rank, backend="gloo"
            )
        moe = config.model_config.is_moe
        if parallel_state.model_parallel_is_initialized() and moe and parallel_state._EP is None:
            parallel_state.destroy_model_parallel()
        if config.parallel_config.enable_eplb and getattr(parallel_state, "_EPLB", 0) is None:
            parallel_state.destroy_model_parallel()
        parallel_state.ensure_model_parallel_initialized(ranks, 1)
        yield


def load(config: Any, draft: bool = False) -> tuple[Any, Any]:
    """Return (model, EPLB's state or None), as a worker's runner has them after loading.

    Args:
        draft: load the draft that the config names, and not the model itself.
    """
    import torch
    from vllm.model_executor.model_loader import get_model

    chosen = config.speculative_config.draft_model_config if draft else config.model_config
    model = get_model(vllm_config=config, model_config=chosen)
    if not config.parallel_config.enable_eplb:
        return model, None
    from vllm.distributed.eplb.eplb_state import EplbState

    from moe_placement_plugin.engines.vllm.layers import mixture_of_experts

    moe = mixture_of_experts(model)
    state = EplbState(config.parallel_config, torch.device("cpu"))
    state.add_model(moe, chosen)
    return model, next(iter(state.model_states.values()))


def outputs(model: Any, config: Any) -> dict[str, np.ndarray]:
    """Return what each MoE layer answers, summed over ranks, float32 ``[tokens, hidden]``."""
    import torch
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found = {}
    with torch.inference_mode(), set_forward_context(None, config, num_tokens=TOKENS):
        for runner in model.modules():
            if not isinstance(runner, MoERunner):
                continue
            name = runner.routed_experts.layer_name
            rng = np.random.default_rng(crc32(name.encode()))
            logits = _logits(runner, rng)
            width = _input_width(runner)
            hidden = torch.from_numpy(rng.standard_normal((TOKENS, width)).astype(np.float32))
            hidden = hidden.to(config.model_config.dtype)
            if runner.gate is not None:
                runner.gate = _FixedGate(logits)
            ids = torch.arange(TOKENS) % 64
            if "topk_ids" in inspect.signature(runner.forward).parameters:  # chosen by transformers
                weights, ids = logits.softmax(-1).topk(2, dim=-1)
                found[name] = runner(hidden, ids, weights)
            else:
                found[name] = runner(hidden_states=hidden, router_logits=logits, input_ids=ids)
            found[name] = found[name].float().numpy()
    return found


def _input_width(runner: Any) -> int:
    transform = runner.routed_input_transform
    if transform is not None:
        return getattr(transform, "input_size", HIDDEN)
    return runner.moe_config.hidden_dim_unpadded or runner.moe_config.hidden_dim


def _logits(runner: Any, rng: np.random.Generator) -> Any:
    import torch

    columns = runner.moe_config.num_logical_experts + _zero_experts(runner)
    return torch.from_numpy(rng.standard_normal((TOKENS, columns)).astype(np.float32) * 2)


def _zero_experts(runner: Any) -> int:
    bias = getattr(runner.router, "e_score_correction_bias", None)
    return 0 if bias is None else max(0, bias.numel() - runner.moe_config.num_logical_experts)


class _FixedGate:
    """Stand in a gate's place: the same logits on every rank."""

    def __new__(cls, logits):
        import torch

        class Gate(torch.nn.Module):
            def forward(self, hidden_states):
                return logits, None

        return Gate()
