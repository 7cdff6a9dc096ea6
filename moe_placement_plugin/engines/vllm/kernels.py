"""Which of vLLM's MoE kernels and all2all back ends honour an expert map.

Upstream does not check this: ``supports_expert_map()`` has no caller, and a kernel that ignores the
map computes with contiguous, even blocks and gives wrong tokens without a word. What is not known
to honour the map is therefore refused. The tables come from reading the ``apply`` methods of vLLM
0.25.1, 0.28.0, 0.32.0 and 0.33.0.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from ...core.errors import PlacementError

HONOURING = {
    "TritonExperts": "triton",
    "TritonWNA16Experts": "triton",
    "TritonOrDeepGemmExperts": "deep_gemm",
    "TritonOrCutlassExperts": "cutlass",
    "DeepGemmExperts": "deep_gemm",
    "DeepGemmFP4Experts": "deep_gemm",
    "CutlassExpertsFp8": "cutlass",
    "CutlassExpertsW4A8Fp8": "cutlass",
    # From 0.32 on: their apply() of 0.25 and 0.28 leaves the map, which `uses_expert_map` sees.
    "CutlassExpertsFp4": "cutlass",
    "CutlassExpertsMxfp4": "cutlass",
    "MarlinExperts": "marlin",
    "HummingIndexedExperts": "humming",
    "HummingGroupedExperts": "humming",
    "OAITritonExperts": "triton",
    "UnfusedOAITritonExperts": "triton_unfused",
    "OAITritonMxfp4ExpertsMonolithic": "triton",
    "AiterExperts": "aiter",
    "Mxfp8EmulationTritonExperts": "emulation",
    "Mxfp8NativeTritonExperts": "triton",
    "Nvfp4QuantizationEmulationTritonExperts": "emulation",
    "OCP_MXQuantizationEmulationTritonExperts": "emulation",
    "Int4EmulationTritonExperts": "emulation",
    "Rdna3WNA16Experts": "rdna3",
}
"""Class of experts -> the ``--moe-backend`` that selects it."""

BATCHED = {
    "BatchedTritonExperts",
    "BatchedDeepGemmExperts",
    "BatchedMarlinExperts",
    "BatchedHummingGroupedExperts",
    "NaiveBatchedExperts",
    "CutlassBatchedExpertsFp8",
    "FlashInferCuteDSLBatchedExperts",
}
"""Classes that get tokens already sorted by local expert from a back end with routing tables, and no
id of an expert.

Read in vLLM 0.25.1, 0.28.0, 0.32.0 and 0.33.0, all of them there. Input scales of
`FlashInferCuteDSLBatchedExperts` are one number for all experts of the model, so that it does not
matter which lie here.
"""

ALL2ALL_WITH_MAP = ("allgather_reducescatter", "naive")
"""All2all back ends that leave the choice of the expert to the kernel: every rank has all tokens."""

ALL2ALL_WITH_TABLES = ("deepep_low_latency", "nixl_ep")
"""All2all back ends that take routing tables, which need equal numbers of slots on all ranks."""

MAP_BACKENDS = tuple(dict.fromkeys(HONOURING.values()))
"""Values of ``--moe-backend`` whose kernels honour an expert map."""

MOE_BACKENDS_REFUSED = (
    "flashinfer_trtllm",
    "flashinfer_cutlass",
    "flashinfer_cutedsl",
    "flashinfer_b12x",
    "flashinfer_moe_ep_cutedsl",
    "flashinfer_moe_ep_mega_deep_gemm",
    "deep_gemm_mega_moe",
    "aiter_mega_moe",
    "b12x",
    "hpc",
    "moonep",
)
"""Values of ``--moe-backend`` whose kernels assume contiguous, even blocks."""

BATCHED_BACKENDS = ("flashinfer_cutedsl",)
"""Those of them that name a batched kernel too, which vLLM takes with routing tables."""


def uses_expert_map(experts: type) -> bool:
    """Decide whether the installed code of a class of experts reads the ``expert_map`` it is given."""
    for name in ("apply", "apply_monolithic"):
        method = getattr(experts, name, None)
        if method is None:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError, TypeError):
            continue
        if any(
            isinstance(n, ast.Name) and n.id == "expert_map" and isinstance(n.ctx, ast.Load)
            for n in ast.walk(tree)
        ):
            return True
    return False


def check_experts(quant_method: Any, use_tables: bool, layer_name: str) -> None:
    """Refuse the experts that vLLM selected for a layer if they ignore expert maps.

    Args:
        quant_method: the layer's ``FusedMoEMethodBase``.
        use_tables: whether the all2all back end sorts tokens by routing tables.
        layer_name: the layer's name.

    Raises:
        PlacementError: naming the class and the back ends that work.
    """
    experts = getattr(quant_method, "experts_cls", None)
    if experts is None:
        kernel = getattr(quant_method, "moe_kernel", None)
        fused = getattr(kernel, "fused_experts", None)
        experts = type(fused) if fused is not None else None
    if experts is None:
        # Methods without modular experts (GPTQ, AWQ, int8, ...) call a kernel from their own apply().
        if uses_layer_expert_map(quant_method):
            return
        name = type(quant_method).__name__
    else:
        name = experts.__name__
        if use_tables and name in BATCHED:
            return
        from .cpu import honours_with_patch  # lazy: heavy

        if honours_with_patch(experts) or (name in HONOURING and uses_expert_map(experts)):
            return
    raise PlacementError(
        f"{layer_name}: vLLM chose the MoE kernel {name}, which is not known to honour expert maps "
        "and would give wrong tokens with this placement: choose another one with --moe-backend "
        f"({', '.join(MAP_BACKENDS)}), or leave the placement flag out"
    )


def uses_layer_expert_map(quant_method: Any) -> bool:
    """Decide whether a method without modular experts passes ``layer.expert_map`` on."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(quant_method).apply)))
    except (OSError, SyntaxError, TypeError, AttributeError):
        return False
    return any(isinstance(n, ast.Attribute) and n.attr == "expert_map" for n in ast.walk(tree))
