"""Compare vLLM's real quantized CPU kernels on two emulated ranks with one rank.

    python -m tests.support.cpu_kernels_child int8|fp8

vLLM serves them only on machines with AMX (elsewhere they die on an illegal instruction at larger
batches); a handful of tokens takes the AVX-512 path, which runs here too.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch

NEEDED = {
    "int8": ("convert_weight_packed", "fused_experts_cpu"),
    "fp8": ("convert_weight_packed", "fused_experts_cpu"),
}
"""Operators that each kind calls.

vLLM has libraries with and without them, and chooses by processor.
"""

EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 6, 128, 128, 3, 2
MAPS = ([0, -1, 1, -1, 2, -1], [-1, 0, -1, 1, -1, 2])


def int8_experts(w13: torch.Tensor, w2: torch.Tensor):
    """Return (kernel class, its state, weights) for float weights ``[experts, out, in]``."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    def quantize(w):
        scale = w.abs().amax(dim=2, keepdim=True) / 127
        return torch.ops._C.convert_weight_packed((w / scale).round().to(torch.int8)), scale

    (q13, s13), (q2, s2) = quantize(w13), quantize(w2)
    return CPUExpertsInt8, SimpleNamespace(w1_scale=s13, w2_scale=s2), q13, q2


def fp8_experts(w13: torch.Tensor, w2: torch.Tensor):
    """Return the same for 128 x 128 blocks of float8."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUExpertsFp8,
        prepare_fp8_moe_layer_for_cpu,
    )

    def quantize(w):
        e, rows, columns = w.shape
        blocks = w.reshape(e, rows // 128, 128, columns // 128, 128)
        scale = blocks.abs().amax(dim=(2, 4)) / 448
        return (blocks / scale[:, :, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn), scale

    (q13, s13), (q2, s2) = quantize(w13), quantize(w2)
    q13, q2 = prepare_fp8_moe_layer_for_cpu(q13, q2)
    state = SimpleNamespace(
        w1_scale=s13,
        w2_scale=s2,
        quant_config=SimpleNamespace(block_shape=[128, 128], w1_bias=None, w2_bias=None),
    )
    return CPUExpertsFp8, state, q13, q2


def main() -> None:
    import vllm.platforms  # noqa: F401
    from vllm import _custom_ops  # noqa: F401
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from moe_placement_plugin.engines.common.patching import PatchSet
    from moe_placement_plugin.engines.vllm.cpu import cpu_patches

    missing = [name for name in NEEDED[sys.argv[1]] if not hasattr(torch.ops._C, name)]
    if missing:
        print("LACKS " + " ".join(missing))
        return
    PatchSet(cpu_patches()).apply()
    torch.manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 0], [1, 3], [2, 4]], dtype=torch.int32)
    weights = torch.rand(TOKENS, TOP_K)
    make = {"int8": int8_experts, "fp8": fp8_experts}[sys.argv[1]]

    def run(local: list[int], expert_map) -> torch.Tensor:
        experts, state, q13, q2 = make(w13[local], w2[local])
        output = torch.empty_like(x)
        experts.apply(
            state,
            output,
            x.clone(),
            q13,
            q2,
            weights.clone(),
            ids.clone(),
            MoEActivation.SILU,
            EXPERTS,
            expert_map,
            None,
            None,
            torch.empty(0),
            torch.empty(0),
            None,
            False,
        )
        return output.float()

    whole = run(list(range(EXPERTS)), None)
    parts = [
        run([e for e in range(EXPERTS) if m[e] >= 0], torch.tensor(m, dtype=torch.int32))
        for m in MAPS
    ]
    wrong = run([1, 3, 5], torch.tensor(MAPS[0], dtype=torch.int32)) + parts[1]
    answer = {
        "difference": float((sum(parts) - whole).abs().max()),
        "scale": float(whole.abs().max()),
        "wrong": float((wrong - whole).abs().max()),
    }
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main()
