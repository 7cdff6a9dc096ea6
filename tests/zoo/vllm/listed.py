"""List registered classes that reach experts and have no recipe, and faults that are known.

Each stands with the reason.
"""

from __future__ import annotations


def _same(other: str) -> str:
    return f"the same class as {other}, which is in the zoo"


def _wraps(other: str) -> str:
    return (
        f"no recipe yet; its experts are built and loaded by the code of {other}, "
        "which is in the zoo"
    )


def _dense(why: str) -> str:
    return f"dense: {why}"


_EAGLE3 = "vLLM builds every layer of this draft with a plain MLP"
_GPU_ONLY = "its experts have no gate, which vLLM builds on CUDA, ROCm and XPU only"
_INKLING = "its MoE layers make CUDA events, which a CPU build of PyTorch cannot"
_NO_RECIPE = "no recipe yet"

NOT_IN_THE_ZOO = {
    "Cosmos3EdgeForConditionalGeneration": _dense(
        "its class refuses every layer that is neither attention nor MLP; the code is shared with "
        "Nemotron-H's"
    ),
    "DSparkV41DraftModel": "vLLM has DeepSeek-V4.1 for CUDA and ROCm only",
    "DeepseekV41ForCausalLM": "vLLM has DeepSeek-V4.1 for CUDA and ROCm only",
    "Eagle3DeepseekV2ForCausalLM": _dense(_EAGLE3),
    "Eagle3DeepseekV3ForCausalLM": _dense(_EAGLE3),
    "EagleLlama4ForCausalLM": _dense("vLLM refuses a draft of Llama 4 that has MoE layers"),
    "EmbeddingGemma2Model": _dense(
        "its layers build no experts; the code of its MLP and of its tower is shared with Gemma 4's"
    ),
    "Exaone4_5_MTP": _dense("EXAONE 4.5 has no experts, its draft shares code with EXAONE-MoE's"),
    "ExaoneMoeMTP": _dense("the draft of EXAONE-MoE has no experts"),
    "ExaoneMoEForCausalLM": _same("ExaoneMoeForCausalLM"),
    "GlmOcrMTPModel": _dense("GLM-OCR has no experts, its draft shares code with GLM-4-MoE's"),
    "InklingMTPModel": _INKLING,
    "LongCatFlashMTPModel": _dense("the draft of LongCat-Flash has no experts"),
    "MiniCPMV": _dense(
        "MiniCPM-V 2.0 has MiniCPM's text model without its experts, the others have Llama's or "
        "Qwen's"
    ),
    "NemotronH_Nano_Omni_Reasoning_V3": _GPU_ONLY,
    "NemotronH_Nano_VL_V2": _GPU_ONLY,
    "NemotronH_Omni_Reasoning_V3": _GPU_ONLY,
    "NemotronH_Super_Omni_Reasoning_V3": _GPU_ONLY,
    "PanguEmbeddedForCausalLM": _dense(
        "openPangu Embedded; the code is shared with the MoE models'"
    ),
    "Qwen3_5ForCausalLM": _dense("Qwen3.5; the code is shared with Qwen3_5MoeForCausalLM"),
    "Qwen3_5ForConditionalGeneration": _dense("Qwen3.5; the code is shared with the MoE model's"),
    "Qwen3_5MTP": _dense("Qwen3.5; the code is shared with Qwen3_5MoeMTP"),
}
"""Class -> why it has no recipe."""

FAULTS: dict[tuple[str, str], str] = {}
"""(recipe, strategy) -> a fault that is known and being mended.

The test is expected to fail, and fails when it does not.
"""
