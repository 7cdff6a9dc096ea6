"""Registered classes that reach experts and have no recipe, each with the reason; and faults that are known."""

from __future__ import annotations


def _same(other: str) -> str:
    return f"the same class as {other}, which is in the zoo"


def _wraps(other: str) -> str:
    return f"no recipe yet; its experts are built and loaded by the code of {other}, which is in the zoo"


def _dense(why: str) -> str:
    return f"dense: {why}"


_EAGLE3 = "vLLM builds every layer of this draft with a plain MLP"
_GPU_ONLY = "its experts have no gate, which vLLM builds on CUDA, ROCm and XPU only"
_INKLING = "its MoE layers make CUDA events, which a CPU build of PyTorch cannot"
_NO_RECIPE = "no recipe yet"

NOT_IN_THE_ZOO = {
    "BailingMoeV3VLForConditionalGeneration": _wraps("BailingMoeV3ForCausalLM"),
    "ClefOmniForJointSchema": _wraps("Qwen3_5MoeForConditionalGeneration"),
    "ColQwen3_5": _wraps("Qwen3_5MoeForConditionalGeneration"),
    "Cosmos3EdgeForConditionalGeneration": _NO_RECIPE,
    "DSparkV41DraftModel": "vLLM has DeepSeek-V4.1 for CUDA and ROCm only",
    "DeepseekV41ForCausalLM": "vLLM has DeepSeek-V4.1 for CUDA and ROCm only",
    "DiffusionGemmaForBlockDiffusion": _wraps("Gemma4ForCausalLM"),
    "Eagle3DeepseekV2ForCausalLM": _dense(_EAGLE3),
    "Eagle3DeepseekV3ForCausalLM": _dense(_EAGLE3),
    "EagleLlama4ForCausalLM": _dense("vLLM refuses a draft of Llama 4 that has MoE layers"),
    "EmbeddingGemma2Model": _wraps("Gemma4ForCausalLM"),
    "Exaone4_5_MTP": _dense("EXAONE 4.5 has no experts, its draft shares code with EXAONE-MoE's"),
    "ExaoneMoeMTP": _dense("the draft of EXAONE-MoE has no experts"),
    "ExaoneMoEForCausalLM": _same("ExaoneMoeForCausalLM"),
    "Gemma4UnifiedForConditionalGeneration": _wraps("Gemma4ForCausalLM"),
    "Glm5NextForConditionalGeneration": _wraps("Glm5NextForCausalLM"),
    "GlmOcrMTPModel": _dense("GLM-OCR has no experts, its draft shares code with GLM-4-MoE's"),
    "HfMoondream": "its experts are no RoutedExperts; no recipe yet",
    "InklingForCausalLM": _INKLING,
    "InklingForConditionalGeneration": _INKLING,
    "InklingMTPModel": _INKLING,
    "InternS2MobiusForConditionalGeneration": _NO_RECIPE,
    "InternS2PreviewForConditionalGeneration": _wraps("Qwen3_5MoeForConditionalGeneration"),
    "JambaForSequenceClassification": _wraps("JambaForCausalLM"),
    "KimiK3ForConditionalGeneration": _wraps("KimiLinearForCausalLM"),
    "LongCatFlashMTPModel": _dense("the draft of LongCat-Flash has no experts"),
    "MiMoV2OmniForCausalLM": _wraps("MiMoV2ForCausalLM"),
    "MiniCPM3ForCausalLM": _wraps("MiniCPMForCausalLM"),
    "MiniCPMV": _wraps("MiniCPMForCausalLM"),
    "MiniCPMV4_6ForConditionalGeneration": _wraps("Qwen3_5MoeForConditionalGeneration"),
    "MiniCPMV4_7ForConditionalGeneration": _wraps("Qwen3_5MoeForConditionalGeneration"),
    "Moondream3ForCausalLM": "its experts are no RoutedExperts; no recipe yet",
    "NemotronHPuzzleForCausalLM": _GPU_ONLY,
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
    "Qwen4ExpForConditionalGeneration": _wraps("Qwen4ExpForCausalLM"),
    "TransformersMoEEmbeddingModel": _wraps("TransformersMoEForCausalLM"),
    "TransformersMoEForSequenceClassification": _wraps("TransformersMoEForCausalLM"),
    "TransformersMultiModalMoEForCausalLM": _wraps("TransformersMoEForCausalLM"),
}
"""Class -> why it has no recipe."""

FAULTS: dict[tuple[str, str], str] = {}
"""(recipe, strategy) -> a fault that is known and being mended: the test is expected to fail, and fails when it does not."""
