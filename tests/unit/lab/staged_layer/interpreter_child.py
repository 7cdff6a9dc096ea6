"""Compare an engine's own kernel on CPU with torch, under TRITON_INTERPRET=1.

Prints one JSON object.

python -m tests.unit.lab.staged_layer.interpreter_child vllm|sglang
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

import numpy as np
import torch

from moe_placement_plugin import PlacementError
from moe_placement_plugin.lab.gpu.staged_layer.overhead import sglang_fused_call
from moe_placement_plugin.lab.staged_layer import (
    EpGroup,
    PlacedExperts,
    find_matmuls,
    gmm_down,
    gmm_up,
)
from moe_placement_plugin.lab.staged_layer.dispatching import keep_local
from moe_placement_plugin.lab.staged_layer.matmuls.align import align_blocks
from moe_placement_plugin.lab.staged_layer.matmuls.base import Matmuls, sum_choices
from moe_placement_plugin.lab.staged_layer.reference import reference_moe
from moe_placement_plugin.lab.staged_layer.stages import select
from moe_placement_plugin.lab.staged_layer.weights import swiglu

from . import cases


def main(engine: str) -> None:
    """Compare an engine's kernels with the reference, in all that the tests ask for."""
    torch.set_num_threads(1)
    # The interpreter's tl.dot. With the BLAS kernels of some processors a row's bits depend on
    # where in the tile it stands, which a GPU's do not.
    np.matmul = lambda a, b, dtype=None: np.einsum("mk,kn->mn", a, b, dtype=dtype)
    matmuls = find_matmuls(engine)
    launches, launch = [], matmuls.launch
    matmuls.launch = lambda *arguments: (launches.append(arguments[5:]), launch(*arguments))
    result = {"name": matmuls.name, "errors": {}, "chunked": {}}
    whole = cases.Case(
        ep=1, tokens=(21,), experts=6, shared="plain", routing=(("top_k", 3),), matmuls=engine
    )
    on_one_rank(whole, matmuls, result)
    on_four_ranks(matmuls, result)
    try:
        bfloat16 = cases.make(whole.but(dtype="bfloat16"))
        cases.layer(whole, bfloat16, EpGroup.single())(bfloat16.xs[0], bfloat16.logits[0])
        result["bfloat16"] = "computed"
    except PlacementError as error:
        result["bfloat16"] = str(error)
    result["launches"] = len(launches)
    result["as on CUDA"] = as_on_cuda(engine)
    print(json.dumps(result))


def on_one_rank(whole: cases.Case, matmuls: Matmuls, result: dict) -> None:
    """Compute a layer whole and in chunks; no choice lies elsewhere."""
    made = cases.make(whole)
    wanted = reference_moe(made.xs[0], made.logits[0], made.routing, made.experts, made.shared)
    layer = cases.layer(whole, made, EpGroup.single())
    layer.matmuls = matmuls
    outputs = {
        f"{t} x {e}": layer(made.xs[0], made.logits[0], t, e) for t, e in ((1, 1), (3, 1), (1, 3))
    }
    for name, output in outputs.items():
        result["errors"][f"one rank, {name} chunks"] = float(
            (output.double() - wanted).abs().max() / wanted.abs().max()
        )
    result["chunked"]["tokens, bit for bit"] = torch.equal(outputs["1 x 1"], outputs["3 x 1"])


def on_four_ranks(matmuls: Matmuls, result: dict) -> None:
    """Compute the ranks of an uneven placement one after the other, and add their partial sums."""
    case = cases.Case(
        ep=4,
        tokens=(12, 0, 7, 1),
        experts=9,
        slots_per_rank=(3, 0, 7, 2),
        redundant=3,
        dead=(2,),
        routing=(("top_k", 3),),
    )
    made, plain = cases.make(case), find_matmuls("torch")
    x, logits = torch.cat(made.xs), torch.cat(made.logits)
    total = torch.zeros_like(x)
    for rank in range(case.ep):
        placed = PlacedExperts.of(made.placement, 0, rank)
        chosen = select(logits, made.routing, placed)
        output = keep_local(
            placed.local_slot[chosen.slots], chosen.weights, placed.num_local, False
        )
        weights = made.experts.shard(made.placement, 0, rank)
        partial = gmm_down(gmm_up(x, output, weights, matmuls), output, weights, matmuls)
        expected = gmm_down(gmm_up(x, output, weights, plain), output, weights, plain)
        result["errors"][f"rank {rank} against torch"] = float((partial - expected).abs().max())
        total += partial
    wanted = reference_moe(x, logits, made.routing, made.experts)
    result["errors"]["four ranks"] = float(
        (total.double() - wanted).abs().max() / wanted.abs().max()
    )


def as_on_cuda(engine: str) -> dict[str, float]:
    """Run the branch for CUDA, with torch for the engine's kernels that CPU builds lack.

    Its own tiles and align step, and its own fused call, which must give the same bits. SGLang's
    knows no float32: float16.
    """
    matmuls = (vllm_without_cuda if engine == "vllm" else sglang_without_cuda)()
    dtype = "float32" if engine == "vllm" else "float16"
    plain, apart = find_matmuls("torch"), {}
    # One choice in all is a block of its own to vLLM; with top-1 SGLang's call returns
    # uninitialised memory off CUDA.
    few = 1 if engine == "vllm" else 2
    for name, tokens, top_k, slots in (
        ("all", 21, 3, (6,)),
        ("tiny", 1, few, (6,)),
        ("share", 21, 3, (4, 2)),
        ("tiny share", 1, few, (3, 3)),
    ):
        case = cases.Case(
            ep=len(slots),
            tokens=(tokens,) * len(slots),
            experts=6,
            slots_per_rank=slots,
            routing=(("top_k", top_k),),
        )
        made = cases.make(case.but(dtype=dtype))
        x = made.xs[0]
        for rank in range(case.ep):
            placed = PlacedExperts.of(made.placement, 0, rank)
            chosen = select(made.logits[0], made.routing, placed)
            output = keep_local(
                placed.local_slot[chosen.slots], chosen.weights, placed.num_local, case.ep == 1
            )
            weights = made.experts.shard(made.placement, 0, rank)
            hidden = gmm_up(x, output, weights, matmuls)
            found = gmm_down(hidden, output, weights, matmuls)
            wanted = gmm_down(gmm_up(x, output, weights, plain), output, weights, plain)
            if hidden.plan.sorted_ids is not None:  # no more blocks than the choices need
                least = align_blocks(
                    output.local_slots,
                    hidden.plan.config["BLOCK_SIZE_M"],
                    placed.num_local,
                    matmuls.zeroes_elsewhere,
                )
                assert int(hidden.plan.num_padded) == int(least[2])
            apart[f"{name} {rank}, torch"] = float((found - wanted).abs().max())
            if engine == "vllm":
                fused = vllm_fused(
                    x,
                    weights,
                    chosen,
                    None if output.complete else placed.local_slot[:-1].contiguous(),
                )
            else:
                call = sglang_fused_call()
                fused = call(
                    x,
                    weights.w13,
                    weights.w2,
                    output.weights,
                    output.local_slots,
                    filter_expert=not output.complete,
                )
            apart[f"{name} {rank}, fused"] = float((found - fused).abs().max())
    return apart


def vllm_fused(x, weights, chosen, expert_map) -> torch.Tensor:
    call = import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts_impl
    return call(
        x,
        weights.w13,
        weights.w2,
        chosen.weights,
        chosen.slots.int(),
        global_num_experts=6,
        expert_map=expert_map,
    )


def fill_aligned(
    topk_ids, block_size, num_slots, keep_elsewhere, sorted_ids, expert_ids, num_padded
) -> None:
    """Write what the engines' align kernels write into their caller's tensors."""
    ids, experts, padded = align_blocks(topk_ids, block_size, num_slots, keep_elsewhere)
    sorted_ids.fill_(topk_ids.numel())
    sorted_ids[: ids.numel()], expert_ids[: experts.numel()] = ids, experts
    num_padded.copy_(padded)


def vllm_without_cuda():
    import vllm._custom_ops as ops

    from moe_placement_plugin.lab.staged_layer.matmuls.vllm_matmuls import VllmMatmuls

    def align(
        topk_ids,
        num_experts,
        block_size,
        sorted_ids,
        expert_ids,
        num_padded,
        expert_map=None,
        *rest,
    ):
        local = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        fill_aligned(local, block_size, num_experts, False, sorted_ids, expert_ids, num_padded)

    def moe_sum(input, output):
        output.copy_(sum_choices(input))

    ops.moe_align_block_size, ops.moe_sum = align, moe_sum
    return VllmMatmuls(interpreted=False)


def sglang_without_cuda():
    from moe_placement_plugin.lab.staged_layer.matmuls.sglang_matmuls import SglangMatmuls

    def align(topk_ids, num_buckets, block_size, sorted_ids, expert_ids, num_padded, *rest):
        fill_aligned(
            topk_ids, block_size, num_buckets - 1, True, sorted_ids, expert_ids, num_padded
        )

    # The package has functions of the same names as its modules.
    utils = "sglang.srt.layers.moe.moe_runner.triton_utils"
    import_module(f"{utils}.moe_align_block_size").sgl_moe_align_block_size = align
    import_module(f"{utils}.fused_moe").silu_and_mul = lambda values, result: result.copy_(
        swiglu(values)
    )
    import_module(f"{utils}.fused_moe_triton_config").get_device_name = lambda: "no device"
    return SglangMatmuls(interpreted=False)


if __name__ == "__main__":
    main(sys.argv[1])
