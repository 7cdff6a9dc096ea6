"""List model classes that get no placement, and how the refusal is asked for.

What each is, and configs.
"""

from __future__ import annotations

from .mla import DEEPSEEK_V3
from .recipe import BASE, MLA, Recipe
from .values import EXPERTS

_MOE = BASE | {"num_experts": EXPERTS, "num_local_experts": EXPERTS}


_TRITON = {
    "attention_backend": "triton"
}  # torch_native is refused for some, before a placement is looked at
_NO_MAP = "SGLang keeps no map of experts for it"


def _known(architecture: str, model_type: str, why: str = _NO_MAP, **config) -> Recipe:
    return Recipe(architecture, _MOE | {"model_type": model_type, **config}, refused={"all": why})


def _own(
    architecture: str, why: str = _NO_MAP, engine: dict[str, str] | None = None, **config
) -> Recipe:
    return Recipe(
        architecture,
        _MOE | {"model_type": "zoo", **config},
        remote=True,
        refused={"all": why},
        engine=engine or {},
    )


REFUSED: tuple[Recipe, ...] = (
    _known("MixtralForCausalLM", "mixtral"),
    _known("OlmoeForCausalLM", "olmoe"),
    _own("Cohere2MoeForCausalLM"),
    _own("Cohere2VisionForConditionalGeneration", text_config=_MOE),
    _own("DeepseekOCRForCausalLM", text_config=DEEPSEEK_V3),
    _own("DeepseekVL2ForCausalLM", text_config=DEEPSEEK_V3),
    _own(
        "DeepseekV4ForCausalLM",
        "they route outside SGLang's TopK layer",
        sliding_window=128,
        index_head_dim=16,
        compress_ratios=[1] * 3,
        **DEEPSEEK_V3,
    ),
    _known("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", moe_num_experts=EXPERTS, moe_k=2),
    _own("Ernie4_5_VLMoeForConditionalGeneration", moe_num_experts=EXPERTS),
    _own("Gemma4ForCausalLM", engine=_TRITON),
    _own("Gemma4ForConditionalGeneration", text_config=_MOE, engine=_TRITON),
    _own("Gemma4UnifiedForConditionalGeneration", text_config=_MOE, engine=_TRITON),
    _own("Glm4vMoeForConditionalGeneration", text_config=_MOE),
    _known("GraniteMoeForCausalLM", "granitemoe"),
    _known("GraniteMoeSharedForCausalLM", "granitemoeshared"),
    _own("GraniteMoeSWAForCausalLM"),
    _own("GraniteMoeHybridForCausalLM"),
    _own("Grok1ForCausalLM"),
    _own("Grok1ModelForCausalLM"),
    _own("HunYuanMoEV1ForCausalLM"),
    _own("HYV3ForCausalLM"),
    _own("HYV4ForCausalLM", **MLA),
    _own("InternS1ForConditionalGeneration", text_config=_MOE),
    Recipe(
        "InternS2MobiusForConditionalGeneration",
        {"model_type": "zoo", "text_config": _MOE},
        remote=True,
        unbuildable="expert parallelism (--ep-size must be 1)",
    ),
    _own("InternVLChatModel", text_config=_MOE),
    _own("KimiK3ForConditionalGeneration", text_config=_MOE | MLA),
    _own("KimiK3LinearForCausalLM", **MLA),
    _own("KimiLinearForCausalLM", **MLA),
    _own("KimiVLForConditionalGeneration", text_config=DEEPSEEK_V3),
    _own("LagunaForCausalLM"),
    _own("Lfm2MoeForCausalLM"),
    _own("LightOnOCRForConditionalGeneration", text_config=_MOE),
    _own("Llama4ForCausalLM"),
    _own("Llama4ForConditionalGeneration", text_config=_MOE),
    _own(
        "LongcatFlashForCausalLM",
        "its zero-computation experts have ids beyond the map",
        n_routed_experts=EXPERTS,
    ),
    _own("NemotronHForCausalLM", n_routed_experts=EXPERTS),
    _own("NemotronHPuzzleForCausalLM", n_routed_experts=EXPERTS),
    _own("NemotronH_Nano_VL_V2", text_config=_MOE, llm_config=_MOE),
    _own("NemotronH_Nano_Omni_Reasoning_V3", text_config=_MOE, llm_config=_MOE),
    _own("NemotronH_Omni_Reasoning_V3", text_config=_MOE, llm_config=_MOE),
    _own("PhiMoEForCausalLM"),
    _own("PixtralForConditionalGeneration", text_config=_MOE),
    _known(
        "Qwen3OmniMoeForConditionalGeneration",
        "qwen3_omni_moe",
        thinker_config={"text_config": _MOE},
    ),
    _own("UnlimitedOCRForCausalLM", text_config=DEEPSEEK_V3),
    _own("ZayaForCausalLM"),
)

REFUSED_NAMES = frozenset(recipe.name for recipe in REFUSED)

DRAFTS = frozenset(
    "DeepseekV3ForCausalLMNextN DeepseekV4ForCausalLMDSpark DeepseekV4ForCausalLMNextN "
    "Dots3NoteForCausalLMNextN Ernie4_5_MoeForCausalLMMTP "
    "ExaoneMoEForCausalLMMTP Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM "
    "GlmMoeDsaForCausalLMNextN "
    "Glm4MoeLiteForCausalLMNextN Glm4MoeForCausalLMNextN Glm5NextForConditionalGenerationNextN "
    "HYV3ForCausalLMNextN HYV4ForCausalLMNextN "
    "Eagle3DeepseekV2ForCausalLM LongcatFlashForCausalLMNextN MiMoV2MTP "
    "MistralLarge3ForCausalLMEagle NemotronHForCausalLMMTP "
    "Qwen3MoeForCausalLMMTP Qwen3NextForCausalLMMTP Step3p5MTP Qwen3_5ForCausalLMMTP "
    "Qwen4ExpForCausalLMMTP".split()
)
"""Draft models: never a server's own model, see `drafts`."""

TRANSFORMERS = frozenset(
    f"Transformers{modality}{kind}{task}"
    for modality in ("", "MultiModal")
    for kind in ("", "MoE")
    for task in ("ForCausalLM", "EmbeddingModel", "ForSequenceClassification")
)
"""Classes that run transformers' own code.

What the back end is called depends on the model, no checkpoint names it.
"""

DENSE = {
    "Ernie4_5_ForCausalLM": "registered by the module of Ernie4_5_MoeForCausalLM",
    "HunYuanDenseV1ForCausalLM": "registered by the module of HunYuanMoEV1ForCausalLM",
    "PaddleOCRVLForConditionalGeneration": "its text model is Ernie4_5_ForCausalLM",
    "PixtralVisionModel": "a vision encoder",
    "Qwen3ASRForConditionalGeneration": "its text model is dense; it takes its audio encoder from "
    "a MoE model's module",
    "MiniCPMO": "its text model is dense",
    "MiniCPMV": "its text model is dense",
    "MiniCPMV4_6ForConditionalGeneration": "its text model is dense",
    "Qwen3_5ForCausalLM": "the dense models of Qwen3.5",
    "Qwen3_5ForConditionalGeneration": "the dense models of Qwen3.5",
}
"""Classes without experts that a module with MoE layers registers.

Others import something else from such a module.
"""

NOT_ON_A_CPU = {
    "BailingMoeV2_5ForCausalLM": "No module named 'vllm'",
    "BailingMoeForCausalLMNextN": "No module named 'vllm'",
    "BailingMoeV3ForCausalLM": "No module named 'vllm'",
    "InklingForConditionalGeneration": "No module named 'cutlass'",
    "InklingForConditionalGenerationMTP": "No module named 'cutlass'",
}
"""Classes whose module cannot be imported on a CPU, and what it says.

None of them is in SGLang's registry here.
"""
