"""Load one model after another as a rank of SGLang, and tell what its slots hold.

It also tells what its MoE layers answer.

Each model comes as pickled ``ServerArgs``, as a scheduler process gets them; from there on it is
SGLang's own way: plugins, `publish`, a whole `ModelRunner` with its loader. The process groups are
those of the first model.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pickle
import sys
import traceback
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

TOKENS = 12

IMPORTED = ("tests.zoo.sglang.standins", "sglang.srt.managers.scheduler")
"""In this order; the second as a scheduler process has it before it loads plugins."""


@dataclass
class Loaded:
    """Hold what a rank says of a model.

    Attributes:
        refused: the plugin's reason, empty when it loaded.
        error: a traceback of anything else that went wrong.
        wrong: slots that do not hold what they should, in words.
        slots: slots that were compared.
        dtype: of the weights; some models have one that they insist on.
        tensors: names of the tensors that were compared, per slot.
        outputs: layer -> output of TopK and experts for the same tokens ``[tokens, hidden]``, this
            rank's part of the sum.
        blocks: layer -> output of the whole MoE block, where it takes hidden states alone.
        patches: the plugin's hooks that this process has used.
        outline: see `skeleton.outline`, where that was asked for.
        rebalanced: the same after EPLB has moved experts, where it is on.
        draft: the same of the draft, where the recipe has one.
    """

    refused: str = ""
    error: str = ""
    wrong: list[str] = field(default_factory=list)
    slots: int = 0
    dtype: str = ""
    tensors: list[str] = field(default_factory=list)
    outputs: dict[int, Any] = field(default_factory=dict)
    blocks: dict[int, Any] = field(default_factory=dict)
    patches: list[str] = field(default_factory=list)
    outline: list[Any] = field(default_factory=list)
    rebalanced: Loaded | None = None
    draft: Loaded | None = None


def main(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    """Answer each (pickled ``ServerArgs``, recipe, placement) with a `Loaded` as a dictionary."""
    for module in IMPORTED:
        importlib.import_module(module)
    from transformers.dynamic_module_utils import init_hf_modules

    # Where config classes are that checkpoints bring; a spawned process has the launcher's path
    init_hf_modules()

    while True:
        job = pipe.recv()
        if job is None:
            return
        try:
            result = _load(rank, ranks, port, *job)
        except BaseException as error:  # noqa: BLE001  # the launcher decides
            result = Loaded(error=traceback.format_exc())
            if type(error).__name__ == "PlacementError":
                result = Loaded(refused=str(error))
        pipe.send(asdict(result))


def _load(
    rank: int, ranks: int, port: int, arguments: bytes, recipe_name: str, placement: str
) -> Loaded:
    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.runtime_context import publish, reset_context

    from . import skeleton, slots
    from .cases import BY_NAME

    reset_context()
    _forget_the_last_model()
    server_args = pickle.loads(arguments)
    _plugins()
    publish(server_args, role="scheduler")
    config = ModelConfig.from_server_args(server_args)
    initialize_moe_config()
    initialize_fp8_gemm_config()
    initialize_fp4_gemm_config()
    parallel = ParallelState.trivial(
        tp_rank=rank,
        tp_size=ranks,
        attn_tp_rank=rank,
        attn_tp_size=ranks,
        moe_ep_rank=rank,
        moe_ep_size=ranks,
        gpu_id=rank,
    )
    _keep_process_groups()
    recipe = BY_NAME[recipe_name]
    own = _postprocess()
    DefaultModelLoader.postprocess_weights = staticmethod(_leave_alone if recipe.raw else own)
    runner = ModelRunner(
        model_config=config,
        mem_fraction_static=0.3,
        gpu_id=rank,
        ps=parallel,
        nccl_port=port,
        server_args=server_args,
    )
    if placement == "outline":
        return Loaded(outline=skeleton.outline(runner.model))
    with torch.no_grad():
        found = slots.examine(runner.model, recipe, placement, rank, ranks)
        if placement == "replicas" and not found.wrong:
            _rebalance(runner, recipe, rank)
            found.rebalanced = slots.examine(runner.model, recipe, "rebalanced", rank, ranks)
        if recipe.draft is not None:
            found.draft = _load_draft(server_args, recipe.draft, placement, parallel, port)
    if plugin := sys.modules.get("moe_placement_plugin.engines.sglang.patches"):
        found.patches = [name for name, hits in plugin.placement_set().hits().items() if hits]
    return found


def _load_draft(server_args: Any, recipe: Any, placement: str, parallel: Any, port: int) -> Loaded:
    """Load the draft as SGLang's draft worker does, and examine it.

    Under EPLB it stays in SGLang's own order.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_spec

    from . import slots

    config = ModelConfig.from_server_args(
        server_args, model_path=get_spec().speculative_draft_model_path, is_draft_model=True
    )
    with draft_model_build_scope():
        runner = ModelRunner(
            model_config=config,
            mem_fraction_static=0.3,
            gpu_id=parallel.gpu_id,
            ps=parallel,
            nccl_port=port,
            server_args=server_args,
            is_draft_worker=True,
        )
    where = "own order" if placement == "replicas" else placement
    return slots.examine(runner.model, recipe, where, parallel.moe_ep_rank, parallel.moe_ep_size)


_exchanges = itertools.count()


def _rebalance(runner: Any, recipe: Any, rank: int) -> None:
    """Move the experts to where ``rebalanced`` has them, as SGLang's EPLB does.

    They move between two forward passes.
    """
    import torch
    from sglang.srt.eplb.expert_location import (
        ExpertLocationMetadata,
        get_global_expert_location_metadata,
    )

    from moe_placement_plugin.engines.sglang import eplb_exchange

    from . import checkpoints

    in_force = get_global_expert_location_metadata()
    table = in_force.physical_to_logical_map_cpu.clone()
    for layer, row in checkpoints.slots(recipe, "rebalanced").items():
        table[layer] = torch.tensor(row)
    goal = ExpertLocationMetadata.init_by_mapping(
        runner.model_config, physical_to_logical_map=table, moe_ep_rank=rank
    )
    weights = runner.model.routed_experts_weights_of_layer
    # A process of SGLang has one model for life; here the next model's exchanges are numbered on.
    exchanger = eplb_exchange.exchanger_of(eplb_exchange.loaded(), weights, in_force)
    exchanger._epoch = next(_exchanges)
    runner.expert_location_updater.update(weights, goal, list(weights.keys()), nnodes=1, rank=rank)


def _plugins() -> None:
    """Do what a scheduler process does first.

    It is done again for what the next model's settings ask of the plugin.
    """
    import os

    from sglang.srt.plugins import load_plugins

    load_plugins()
    if os.environ.get("SGLANG_PLUGINS") == "none":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    from moe_placement_plugin.engines.sglang import register

    register()
    HookRegistry.apply_hooks()


@functools.lru_cache(maxsize=1)
def _postprocess() -> Any:
    """Return SGLang's own, found before it is exchanged for the first time."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    return DefaultModelLoader.postprocess_weights


def _leave_alone(model: Any, target_device: Any) -> None:
    """Leave the tensors as they were loaded."""


def _keep_process_groups() -> None:
    """Make the groups once; every model is told its own sizes."""
    from sglang.srt.distributed import bootstrap

    make = bootstrap._init_parallel_groups
    if hasattr(make, "made"):
        return

    def once(**arguments: Any) -> None:
        if once.made:
            bootstrap.initialize_dp_attention(
                server_args=arguments["server_args"], model_config=arguments["model_config"]
            )
            bootstrap.initialize_layernorm_sp(model_config=arguments["model_config"])
        else:
            make(**arguments)
            once.made = True

    once.made = False
    bootstrap._init_parallel_groups = once


def _forget_the_last_model() -> None:
    """Forget what SGLang keeps for the process's one model."""
    import gc

    from sglang.srt.eplb.expert_location import set_global_expert_location_metadata

    set_global_expert_location_metadata(None, allow_overwrite=True)
    gc.collect()
    gc.freeze()  # what is left are modules: looking through them takes most of a tiny model's time
