"""List models, checkpoints and back ends of SGLang with which no placement goes, and why."""

from __future__ import annotations

from collections.abc import Callable

from packaging.version import Version

from ..common.support import Rule
from .combination import Combination


def _any_of(names: str) -> Callable[[str], bool]:
    allowed = set(names.split())
    return lambda value: value in allowed


# Quantization -> class of its MoE method, by which it is also known where it is chosen while the
# model is built.
_OWN_LOADERS = {
    "moe_wna16": "MoeWNA16Method",
    "quark_int4fp8_moe": "QuarkInt4Fp8MoEMethod",
    "humming": "HummingMoEMethod",
}


def unmapped_quantizations(version: str) -> dict[str, str]:
    """Map quantizations whose loaders go round the map of experts to their MoE method's class."""
    mended = {"moe_wna16"} if Version(version).release >= (0, 5, 23) else set()
    return {name: method for name, method in _OWN_LOADERS.items() if name not in mended}


_no_redundancy = _any_of(
    "BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM "
    "BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BailingMoeV3VLForConditionalGeneration "
    "LLaDA2MoeModelLM SarvamMoEForCausalLM"
)
_own_refusal = _any_of("XllmForCausalLM K2HorizonForCausalLM")
_zero_experts = _any_of("LongcatFlashForCausalLM")
_own_routing = _any_of(
    "TransformersMoEForCausalLM TransformersMoEEmbeddingModel "
    "TransformersMoEForSequenceClassification TransformersMultiModalMoEForCausalLM "
    "TransformersMultiModalMoEEmbeddingModel TransformersMultiModalMoEForSequenceClassification "
    "MindSporeForCausalLM DeepseekV4ForCausalLM"
)
_kernel_routes = _any_of("triton_kernel flashinfer_trtllm flashinfer_mxfp4 experimental_sgl_trtllm")
_mapped_a2a = _any_of("none deepep mooncake nixl mori flashinfer")

_gpt_oss = _any_of("GptOssForCausalLM")
_nvfp4 = _any_of("modelopt_fp4 petit_nvfp4 nvfp4 nvfp4_online modelopt_mixed minimax_m3_nvfp4")
_by_position = _any_of("sharded_state presharded remote remote_instance rdma ipc_cache")

PLACEMENT_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        "model",
        "no `get_model_config_for_expert_location` (Mixtral, OLMoE, Llama 4, Grok, DBRX, Hunyuan, "
        "...)",
        "SGLang keeps no map of experts for it",
        "serve it without the placement flags",
        lambda c: not c.has_location,
    ),
    Rule(
        "model",
        "Bailing MoE, Sarvam MoE and LLaDA 2 with redundant experts (padding included)",
        "the model asserts that there are none",
        "use an --ep-size that divides the number of experts, and no --ep-num-redundant-experts",
        lambda c: _no_redundancy(c.architecture) and c.redundant > 0,
    ),
    Rule(
        "model",
        "LongCat-Flash",
        "its zero-computation experts have ids beyond the map",
        "serve it without the placement flags",
        lambda c: _zero_experts(c.architecture),
    ),
    Rule(
        "model",
        "xLLM and K2 Horizon",
        "SGLang's own model refuses every placement but the trivial one",
        "serve it without the placement flags",
        lambda c: _own_refusal(c.architecture),
    ),
    Rule(
        "model",
        "Transformers back end, MindSpore, DeepSeek-V4",
        "they route outside SGLang's TopK layer (DeepSeek-V4 by token hashes)",
        "use SGLang's own implementation of the model, or no placement flags",
        lambda c: _own_routing(c.architecture),
    ),
    Rule(
        "quantization",
        "MXFP4 checkpoints other than gpt-oss's, and gpt-oss quantized by Quark",
        "they are loaded for all experts at once, by position, past the map",
        "use the bf16 checkpoint, or no placement flags",
        lambda c: (
            c.quantization == "quark_mxfp4"
            or (c.quantization == "mxfp4" and not _gpt_oss(c.architecture))
            or (c.quantization.startswith("quark") and _gpt_oss(c.architecture))
        ),
    ),
    Rule(
        "quantization",
        "NVFP4 (modelopt_fp4, modelopt_mixed, nvfp4_online)",
        "its input scales are kept for all experts and follow the trivial map only",
        "use an FP8 or bf16 checkpoint, or no placement flags",
        lambda c: _nvfp4(c.quantization),
    ),
    Rule(
        "quantization",
        "moe_wna16 before 0.5.23 (AWQ and GPTQ where Marlin does not fit), Quark INT4-FP8, Humming",
        "loaders of their own, which put zero points or scales where the trivial map has them",
        "use an FP8, Marlin or bf16 checkpoint, or no placement flags",
        lambda c: c.quantization in unmapped_quantizations(c.version),
    ),
    Rule(
        "back end",
        "`--moe-runner-backend` triton_kernel, flashinfer_trtllm, flashinfer_mxfp4",
        "the kernel routes by itself and never sees the map",
        "use --moe-runner-backend triton, deep_gemm or flashinfer_trtllm_routed (or, unless the "
        "checkpoint is FP8, cutlass)",
        lambda c: _kernel_routes(c.runner_backend),
    ),
    Rule(
        "back end",
        "`--moe-a2a-backend` other than none, deepep, mooncake, nixl, mori, flashinfer",
        "not known to send tokens by physical expert",
        "use one of those",
        lambda c: not _mapped_a2a(c.a2a_backend),
    ),
    Rule(
        "back end",
        "devices other than CUDA, ROCm and CPU",
        "their TopK layers have code of their own for routing",
        "serve without the placement flags there",
        lambda c: c.device not in ("cuda", "cpu"),
    ),
    Rule(
        "back end",
        "SGLang's compiled AMX kernels on the CPU",
        "they are not known to skip slots of other ranks",
        "use an sgl_kernel without them, or one rank",
        lambda c: c.device == "cpu" and "cpu_amx" in c.options,
    ),
    Rule(
        "back end",
        "whole-step kernels (`--enable-nvidia-megakernel`, `--enable-amd-monokernel`)",
        "they refuse `--enable-eplb` only, and take experts to lie where the trivial map has them",
        "leave one of the two out",
        lambda c: bool(c.options & {"enable_nvidia_megakernel", "enable_amd_monokernel"}),
    ),
    Rule(
        "load format",
        "`--load-format` sharded_state, presharded, remote, remote_instance, rdma, ipc_cache",
        "they put what another server has saved or holds into the same slots, by whatever "
        "placement that server had",
        "use --load-format auto with the model's original checkpoint, or leave the placement "
        "flags out",
        lambda c: _by_position(c.load_format),
    ),
    Rule(
        "load format",
        "`--weight-cache-mode` other than off",
        "the cache holds slots as another server has filled them, by whatever placement that "
        "server had",
        "leave one of the two out",
        lambda c: "weight_cache_mode" in c.options,
    ),
    Rule(
        "load format",
        "GGUF files",
        "experts are kept in containers in the order of the file, past the map",
        "use a safetensors checkpoint, or leave the placement flags out",
        lambda c: c.load_format == "gguf" or c.quantization == "gguf",
    ),
    Rule(
        "option",
        "Ray (`--use-ray`, `sglang.srt.ray`)",
        "SGLang loads no plugins in Ray's actors: they would never learn of the placement",
        "start the server without Ray, or leave the placement flags out",
        lambda c: "use_ray" in c.options,
    ),
    Rule(
        "option",
        "`--enforce-shared-experts-fusion`",
        "shared experts' ids then lie beyond the routed slots, and a draft or redundant experts "
        "shift them",
        "leave one of the two out",
        lambda c: "enforce_shared_experts_fusion" in c.options,
    ),
    Rule(
        "option",
        "`--remote-instance-weight-loader-start-seed-via-transfer-engine`",
        "weights would be written into or read from this server's memory by position, past the map",
        "leave one of the two out",
        lambda c: "remote_instance_weight_loader_start_seed_via_transfer_engine" in c.options,
    ),
    Rule(
        "option",
        "`--ep-dispatch-algorithm` static or lp with redundant experts and no all-to-all back end",
        "each rank picks another replica, all ranks' outputs are added, so a replicated expert "
        "counts several times",
        "leave --ep-dispatch-algorithm out, or use dynamic",
        lambda c: c.a2a_backend == "none" and c.redundant > 0 and c.dispatch in ("static", "lp"),
    ),
    Rule(
        "option",
        "`--ep-dispatch-algorithm` fake",
        "it replaces the routing by random numbers",
        "leave it out",
        lambda c: c.dispatch == "fake",
    ),
    Rule(
        "option",
        "`--elastic-ep-backend` without `--enable-eplb`",
        "only EPLB places the experts of a rank that has died anew",
        "add --enable-eplb, or leave --elastic-ep-backend out",
        lambda c: "elastic_ep_backend" in c.options and "enable_eplb" not in c.options,
    ),
    Rule(
        "option",
        "ranks that join an elastic EP server (`--elastic-ep-join-mode`, `--elastic-ep-rejoin`, "
        "`--max-ep-size`)",
        "they change the number of slots, or hold experts that no check has seen",
        "leave them out: ranks may die, the server goes on with the others until it is restarted",
        lambda c: bool(c.options & {"elastic_ep_rejoin", "ep_join_mode", "max_ep_size"}),
    ),
    Rule(
        "option",
        "`--enable-elastic-expert-backup`",
        "experts that no live rank holds are read from the checkpoint, one by one, and the backup "
        "would never be asked",
        "leave it out",
        lambda c: "enable_elastic_expert_backup" in c.options,
    ),
    Rule(
        "option",
        "`--elastic-ep-backend` with quantized checkpoints other than FP8",
        "a kernel that packs its weights anew after loading cannot take a single expert as the "
        "loader makes it",
        "use an FP8 or bf16 checkpoint, or leave --elastic-ep-backend out",
        lambda c: "elastic_ep_backend" in c.options and c.quantization not in ("", "fp8"),
    ),
    Rule(
        "option",
        "`--enable-waterfill`, `--enable-lora`, `--lora-paths`, KTransformers (`--kt-weight-path`)",
        "they keep or send experts in a way of their own",
        "leave one of the two out",
        lambda c: bool(
            c.options & {"enable_waterfill", "enable_lora", "lora_paths", "kt_weight_path"}
        ),
    ),
)
