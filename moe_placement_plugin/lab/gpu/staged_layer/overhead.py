"""Measure the staged layer in one piece against the engine's own fused call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import torch

from .... import Placement
from ....core.placement import even_slots
from ...bench.layer.shapes import draw_step, synthetic_load
from ...bench.timing import Stopwatch, in_turn, ratio
from ...staged_layer import ExpertWeights, PlacedExperts, RouteOutput, gmm_down, gmm_up
from ...staged_layer.dispatching import keep_local
from ...staged_layer.matmuls.base import Matmuls
from .process import Process


@dataclass(frozen=True)
class Share:
    """Hold what both sides compute: one rank's rows, and where they go.

    Attributes:
        x: ``[tokens, hidden]``.
        slots: int64 ``[tokens, top_k]``, slots of all ranks.
        router: float32 ``[tokens, top_k]``, router weights.
        output: the same, filtered to this rank.
    """

    x: torch.Tensor
    slots: torch.Tensor
    router: torch.Tensor
    output: RouteOutput


def overhead(process: Process) -> list[dict]:
    """Time gmm_up and gmm_down against one fused call, on the same rows, weights and choices."""
    shape, ranks = process.shape, process.arguments.ep
    plan = Placement(
        np.arange(shape.experts)[None], shape.experts, even_slots(shape.experts, ranks)
    )
    weights = process.weights(plan.slots_per_rank[0], shape)
    placed = PlacedExperts.of(plan, 0, 0, process.device)
    watch = Stopwatch(process.device, graphs=not process.matmuls.name.startswith("torch"))
    rival = "the fused call" if process.on_gpu else "a loop over experts"
    process.say(f"overhead: staged against {rival}, EP {ranks}")
    rows = []
    for tokens in process.tokens([1, 16, 64, 256, 1024, 4096, 16384]):
        row = _compare(process, _share(process, placed, tokens), weights, placed, watch)
        rows.append(row)
        process.say(
            f"  {tokens:6d} tokens: fused {row['fused_us']:9.1f} us, "
            f"staged / fused {row['staged_over_fused']:.3f} "
            f"(fused / fused {row['fused_over_itself']:.3f}), outputs {row['apart']:.1e} apart"
        )
    return rows


def _share(process: Process, placed: PlacedExperts, tokens: int) -> Share:
    """Draw a batch and filter its choices to this rank."""
    shape, device = process.shape, process.device
    share = synthetic_load(shape, 0.7).counts[0, 0].astype(float)
    x = torch.randn(tokens, shape.hidden, device=device).to(process.dtype)
    drawn = draw_step(share, tokens, shape.top_k, np.random.default_rng(tokens))
    slots = torch.from_numpy(drawn).to(device)
    router = torch.rand(slots.shape, device=device).softmax(dim=-1)
    complete = process.arguments.ep == 1
    output = keep_local(placed.local_slot[slots], router, placed.num_local, complete)
    return Share(x, slots, router, output)


def _compare(
    process: Process,
    share: Share,
    weights: ExpertWeights,
    placed: PlacedExperts,
    watch: Stopwatch,
) -> dict:
    """Time both sides in turn, and see how far their outputs are apart."""
    matmuls, output = process.matmuls, share.output
    fused = _fused(matmuls, share, weights, placed)

    def staged() -> torch.Tensor:
        return gmm_down(gmm_up(share.x, output, weights, matmuls), output, weights, matmuls)

    wanted = fused().float()
    apart = float((staged().float() - wanted).abs().max() / wanted.abs().max())
    runs = {
        "fused": watch.prepare(fused),
        "staged": watch.prepare(staged),
        "fused again": watch.prepare(fused),
    }
    times = in_turn(runs, process.arguments.rounds)
    return {
        "tokens": len(share.x),
        "fused_us": float(np.median(times["fused"])),
        "staged_over_fused": ratio(times, "staged", "fused"),
        "fused_over_itself": ratio(times, "fused again", "fused"),
        "apart": apart,
    }


def _fused(
    matmuls: Matmuls, share: Share, weights: ExpertWeights, placed: PlacedExperts
) -> Callable[[], torch.Tensor]:
    """Return the engine's own call; on CPU a loop over the experts in torch."""
    x, output = share.x, share.output
    if matmuls.name.startswith("vLLM"):
        call = import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts_impl
        ids = share.slots.int()
        expert_map = None if output.complete else placed.local_slot[:-1].contiguous()
        return lambda: call(
            x,
            weights.w13,
            weights.w2,
            share.router,
            ids,
            global_num_experts=placed.num_slots,
            expert_map=expert_map,
        )
    if matmuls.name.startswith("SGLang"):
        call = sglang_fused_call()
        local = output.local_slots
        return lambda: call(
            x, weights.w13, weights.w2, share.router, local, filter_expert=not output.complete
        )
    return lambda: _loop_over_experts(x, output, weights, matmuls)


def sglang_fused_call() -> Callable[..., torch.Tensor]:
    """Return SGLang's fused call so that it runs outside a server.

    Its output is allocated as on one rank, without asking for the tensor parallel group.
    """
    module = import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
    module.use_symmetric_memory = lambda *arguments, **options: nullcontext()
    module.is_allocation_symmetric = lambda: False
    module.get_tp_group = lambda: None
    module.get_parallel = lambda: SimpleNamespace(tp_group=None)
    return module.fused_experts_impl


def _loop_over_experts(
    x: torch.Tensor, output: RouteOutput, weights: ExpertWeights, matmuls: Matmuls
) -> torch.Tensor:
    """Compute a rank's share expert by expert."""
    result = torch.zeros_like(x)
    for slot in range(output.num_slots):
        rows, choice = (output.local_slots == slot).nonzero(as_tuple=True)
        hidden = matmuls.activate(x[rows] @ weights.w13[slot].T, x.dtype)
        router = output.weights[rows, choice, None].to(x.dtype)
        result.index_add_(0, rows, router * (hidden @ weights.w2[slot].T))
    return result
