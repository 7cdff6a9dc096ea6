"""The hooks of a worker process, chosen by what the installed SGLang lacks."""

from __future__ import annotations

from functools import lru_cache

from ..common.kernel_configs import ConfigsOfFewer
from ..common.patching import PLACEMENT
from . import compat, cpu, drafts, expert_maps, loading, positional, routing
from .hook_registry import Hook, HookSet

_LOCATION = "sglang.srt.eplb.expert_location"
_FUSED_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE"


@lru_cache(maxsize=1)
def hooks() -> HookSet:
    """The hooks for the installed SGLang; the same object in every call."""
    chosen = [
        Hook(
            name="placement",
            target=f"{_LOCATION}:compute_initial_expert_location_metadata",
            hook=expert_maps.initial_metadata,
            relies_on=("model_config", "moe_ep_rank"),
            why="--init-expert-location knows neither strategies nor other engines' plans, and checks neither shape nor coverage",
            upstream="SGLang #37923, #32962",
            removable_when="SGLang reads placement plans and validates them",
        ),
        Hook(
            name="static-dispatch",
            target=f"{_LOCATION}:compute_logical_to_rank_dispatch_physical_map",
            hook=expert_maps.static_dispatch,
            relies_on=("logical_to_all_physical_map", "ep_size", "num_physical_experts", "ep_rank"),
            why="Python loops over layers, experts and ranks, and all ranks of a node share one replica",
            removable_when="SGLang vectorizes it and spreads the ranks over the replicas",
        ),
        Hook(
            name="slots",
            target=f"{_FUSED_MOE}.__init__",
            hook=loading.build,
            relies_on=("num_experts", "num_fused_shared_experts"),
            why="GLM-4-MoE builds its layers without the redundant slots",
            upstream="SGLang #18213",
            removable_when="every model adds ep_num_redundant_experts",
        ),
        Hook(
            name="loader",
            target=f"{_FUSED_MOE}.weight_loader",
            hook=loading.load,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
            why="a checkpoint that goes round the map of experts must be noticed",
            upstream="SGLang #39580",
            removable_when="SGLang checks that every slot was filled",
        ),
        Hook(
            name="slot-loader",
            target=f"{_FUSED_MOE}._weight_loader_impl",
            hook=loading.fill,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
            why="a slot that nothing fills must be noticed, also where no replica differs from it",
            upstream="vLLM #55228, SGLang #39580",
            removable_when="SGLang checks that every slot was filled",
        ),
        Hook(
            name="fused-loader",
            target=f"{_FUSED_MOE}.weight_loader_fused",
            hook=positional.load_fused,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id"),
            why="checkpoints with all experts in one tensor are loaded by position",
            removable_when="weight_loader_fused heeds the map of experts",
        ),
        Hook(
            name="gpt-oss-loader",
            target="sglang.srt.models.gpt_oss:GptOssForCausalLM._load_mxfp4_experts_weights",
            hook=positional.load_gpt_oss_mxfp4,
            relies_on=("weights",),
            why="gpt-oss's MXFP4 checkpoints are cut into equal blocks of experts, past the map of experts: wrong output",
            removable_when="the model's loader heeds the map of experts",
        ),
        Hook(
            name="draft-layers",
            target="sglang.srt.model_loader.loader:_initialize_model",
            hook=drafts.initialize,
            relies_on=("model_config", "load_config"),
            counted=False,
            why="a draft's layers are placed by rows of their own, which its weights come in by, and known by name once it was built",
            removable_when="SGLang has a map of experts for drafts too",
        ),
        Hook(
            name="model",
            target="sglang.srt.model_executor.model_runner:ModelRunner.load_model",
            hook=loading.after_load,
            relies_on=("self",),
            why="slots, weights and routing of every MoE layer are checked before the first request",
            removable_when="SGLang checks them",
        ),
        Hook(
            name="cpu-expert-parallelism",
            target="sglang.srt.layers.moe.fused_moe_native:moe_forward_native",
            hook=cpu.skip_remote_slots,
            relies_on=("layer", "x", "topk_output", "moe_runner_config"),
            why="the CPU engine's experts do not know slots of other ranks",
            removable_when="moe_forward_native handles -1",
        ),
        Hook(
            name="compiled-expert-parallelism",
            target="sglang.srt.layers.moe.fused_moe_native:fused_moe_forward_native",
            hook=cpu.weigh_remote_slots_nothing,
            relies_on=("layer", "dispatch_output"),
            counted=False,
            why="--enable-torch-compile with expert parallelism adds a slot of this rank for every choice that lies elsewhere: wrong output",
            removable_when="fused_moe_forward_native heeds -1",
        ),
        Hook(
            name="tuned-with-redundant-experts",
            target="sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config:get_moe_configs",
            hook=ConfigsOfFewer(loading.redundant_per_rank),
            relies_on=("E", "N"),
            why="the kernel's tuned configuration is looked up by experts per rank, and no file has the number with redundant ones: slow",
            removable_when="the look-up takes the nearest number of experts",
            optional=True,
        ),
        Hook(
            name="routing",
            target="sglang.srt.layers.moe.topk:select_experts",
            hook=routing.select,
            relies_on=(
                "hidden_states",
                "router_logits",
                "topk_config",
                "expert_location_dispatch_info",
            ),
            counted=False,  # traced by --enable-torch-compile
            why="several models up to 0.5.22 route to logical ids without an all-to-all back end: wrong output; and a placement costs a look-up",
            upstream="the wrong output: mended in SGLang 0.5.23",
            removable_when="0.5.22 is no longer supported, and SGLang's dispatcher takes logical ids",
        ),
    ]
    if not compat.topk_finds_the_placement():
        chosen += [
            Hook(
                name="remap",
                target="sglang.srt.layers.moe.topk:_post_process_topk_ids",
                hook=routing.post_process,
                relies_on=(
                    "topk_ids",
                    "topk_weights",
                    "topk_config",
                    "num_token_non_padded",
                    "expert_location_dispatch_info",
                ),
                counted=False,  # traced by --enable-torch-compile
                why="the CPU engine never sends logical ids to physical slots: wrong output",
                upstream="mended in SGLang 0.5.23",
                removable_when="0.5.22 is no longer supported",
            ),
        ]
    if not compat.dispatch_is_rank_invariant():
        chosen += [
            Hook(
                name="all-replicas",
                target=f"{_LOCATION}:_compute_logical_to_all_physical_map",
                hook=expert_maps.keep_all_replicas,
                relies_on=("moe_ep_rank",),
                why="each rank keeps only its own replica, and a replicated expert then counts several times",
                upstream="mended in SGLang 0.5.17",
                removable_when="0.5.16 is no longer supported",
            ),
            Hook(
                name="pick-by-row",
                target="sglang.srt.eplb.expert_location_dispatch:_topk_ids_logical_to_physical_dynamic",
                hook=routing.pick_by_row,
                relies_on=("topk_ids", "info"),
                counted=False,
                why="ranks that see the same tokens draw different replicas",
                upstream="mended in SGLang 0.5.17",
                removable_when="0.5.16 is no longer supported",
            ),
        ]
    return HookSet(chosen, PLACEMENT)
