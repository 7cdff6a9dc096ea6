"""List the models, checkpoints and back ends of SGLang that a placement is right for.

Each says how that is known.
"""

from __future__ import annotations

from ..common.support import Right

RIGHT: tuple[Right, ...] = (
    Right(
        "Qwen3-MoE, no all-to-all back end, 0.5.16 to 0.5.22",
        "the TopK layer is given the placement that the model leaves out (stock output is wrong)",
        "served on the CPU engine: 32 and 30 experts, logprobs equal one rank's",
    ),
    Right(
        "Qwen3-MoE, no all-to-all back end, 0.5.23",
        "SGLang's own remapping",
        "served on the CPU engine",
    ),
    Right(
        "GLM-4-MoE, no all-to-all back end, 0.5.16 to 0.5.22",
        "routing is remapped; with grouped top-k",
        "served on the CPU engine",
    ),
    Right(
        "redundant experts on 0.5.16, no all-to-all back end",
        "all replicas stay in the map and are picked by token row, alike on all ranks (as 0.5.17 "
        "does)",
        "served on the CPU engine",
    ),
    Right(
        "GLM-4-MoE with redundant experts (padding included), every version",
        "the layer is built with the slots that the model leaves out",
        "served on the CPU engine",
    ),
    Right(
        "`--enable-eplb`",
        "experts move by this package's exchange, SGLang updates its own maps in place; what has "
        "moved is verified before the next forward pass",
        "served on the CPU engine, redundant experts, no all-to-all back end: logprobs equal one "
        "rank's over 4 and more rebalances (Qwen3-MoE; GLM-4-MoE by hand)",
    ),
    Right(
        "`--elastic-ep-backend mooncake` with `--enable-eplb`",
        "dead ranks get no expert and no token; experts come from live ranks, and what none of "
        "them holds from the checkpoint, through the model's own loader",
        "SGLang's EPLBManager, ExpertLocationUpdater and Qwen3-MoE on four gloo processes of "
        "which some are killed; mooncake itself was not run",
    ),
    Right(
        "fused (3D) unquantized checkpoints, as gpt-oss in bf16",
        "each rank takes the rows of its slots by the map in force, also in an update after "
        "rebalances",
        "served on the CPU engine with an attention back end that the tests lend it: zigzag, a "
        "shuffled plan, and EPLB with redundant experts and new weights from disk; logprobs equal "
        "one rank's",
    ),
    Right(
        "gpt-oss in MXFP4, where its kernel takes routed slots (not `triton_kernel`, not "
        "`flashinfer_mxfp4`)",
        "tensors of all experts are put into the order of the slots before the model cuts them",
        "the model's own loader, slot by slot on every rank; served by 0.5.23 on two H200, zigzag "
        "and a shuffled plan: log probabilities are stock EP's to the bit",
    ),
    Right(
        "Qwen2-MoE, Qwen3-Next, Qwen3.5, Qwen3-VL-MoE, MiniMax-M2, DeepSeek-V2 and V3, Kimi, "
        "GLM-4-MoE-Lite, MiMo, Step 3.5, EXAONE, SDAR, Sarvam and others with "
        "`get_model_config_for_expert_location`",
        "as Qwen3-MoE; the loader checks that every expert of every MoE layer went through the "
        "map, and refuses to serve if not",
        "read, not served",
    ),
    Right(
        "deepep, mooncake, nixl, mori, flashinfer all-to-all",
        "SGLang's own remapping, with an evenly spread dispatch table",
        "read; the table is compared with SGLang's in a test",
    ),
    Right(
        "drafts and MTP layers (speculative decoding), every version",
        "each of their layers has a row of its own, by which its weights come in and its tokens "
        "go out",
        "SGLang's own loader, slot by slot on two ranks: MTP layers of DeepSeek-V3, GLM-4-MoE and "
        "Qwen3-MoE, a Qwen2-MoE draft; served on the CPU engine with an attention back end and "
        "kernels that the tests lend it (`STANDALONE`): tokens and accepted drafts are stock's",
    ),
    Right(
        "fused shared experts",
        "fusion is switched off (`disable_shared_experts_fusion`): the shared expert's id lies "
        "outside the map before 0.5.23, and in a draft with redundant experts",
        "read",
    ),
)
