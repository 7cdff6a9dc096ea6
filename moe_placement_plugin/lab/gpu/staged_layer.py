"""What the staged MoE layer costs and what its chunking hides.

    python -m moe_placement_plugin.lab.gpu.staged_layer check                      right on this device? exits 1 if not
    python -m moe_placement_plugin.lab.gpu.staged_layer overhead --shape r1        staged, in one piece, against the engine's own fused call
    torchrun --nproc-per-node 2 -m moe_placement_plugin.lab.gpu.staged_layer overlap --shape qwen3-235b-a22b

On a machine without a GPU everything runs in torch over gloo at ``--shape tiny``: it shows that the script works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from ... import Placement
from ...core.placement import even_slots
from ..bench.layer.shapes import SHAPES, LayerShape, draw_step, synthetic_load
from ..bench.timing import Stopwatch, device_facts, in_turn, ratio
from ..staged_layer import (
    EpGroup,
    ExpertWeights,
    PlacedExperts,
    RouteOutput,
    Routing,
    StagedMoE,
    dispatch,
    find_matmuls,
    gmm_down,
    gmm_up,
    plan_dispatch,
)
from ..staged_layer.matmuls.align import align_blocks
from ..staged_layer.matmuls.base import Matmuls
from ..staged_layer.reference import reference_moe
from ..staged_layer.stages import keep_local, select

ROUNDING = 2.0**-6
"""Chunked and whole may differ by this share of the largest value in bfloat16, twice what either may differ from the reference: tiles
depend on the batch, and the kernels round gate and up before the activation only if they have multiplied all columns at once."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=["check", "overhead", "overlap"])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens per rank")
    parser.add_argument(
        "--ep", type=int, default=1, help="overhead: the share of one of so many ranks"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="overlap: in CUDA graphs, which hide the launches; the ring only",
    )
    parser.add_argument(
        "--ctas",
        type=int,
        help="overlap: most thread blocks of an NCCL kernel; its choice when left out",
    )
    parser.add_argument("--matmuls", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with torch.no_grad():
        bench = Bench(arguments)
        results = {what: getattr(bench, what)() for what in arguments.what}
    if bench.group.rank == 0 and arguments.json:
        arguments.json.write_text(json.dumps({"facts": bench.facts, **results}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if results.get("check", True) else 1


class Bench:
    """One process of the benchmark."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.shape = arguments, SHAPES[arguments.shape]
        cuda = arguments.device == "cuda"
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if cuda
            else torch.device("cpu")
        )
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        if "RANK" in os.environ:
            options = None
            if cuda:  # an exchange must not wait until a matmul's last block has begun
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                if arguments.ctas:
                    options.config.max_ctas = arguments.ctas
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                device_id=self.device if cuda else None,
                pg_options=options,
            )
        self.group = EpGroup() if dist.is_initialized() else EpGroup.single()
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.matmuls = find_matmuls(arguments.matmuls, self.device)
        self.facts = {
            **device_facts(self.device),
            "kernel": self.matmuls.name,
            "ranks": self.group.size,
            "shape": arguments.shape,
        }
        self.facts["NCCL's most thread blocks"] = arguments.ctas
        self.say("; ".join(f"{k} {v}" for k, v in self.facts.items()))

    def say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    def weights(self, slots: int, shape: LayerShape) -> ExpertWeights:
        def random(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, dtype=self.dtype, device=self.device).normal_(
                0, sizes[-1] ** -0.5
            )

        return ExpertWeights(
            random(slots, 2 * shape.intermediate, shape.hidden),
            random(slots, shape.hidden, shape.intermediate),
        )

    def tokens(self, defaults: list[int]) -> list[int]:
        return self.arguments.tokens or (defaults if self.device.type == "cuda" else [24])

    # --- check

    def check(self) -> bool:
        """Both exchanges, whole and chunked, against the float64 reference; the align step against the engine's."""
        torch.manual_seed(0)  # the same weights on every rank
        shape = LayerShape(256, 128, 16, 4, 1, 1)
        experts = self.weights(shape.experts, shape)
        redundant = 2 * self.group.size if self.group.size > 1 else 0
        sizes = [
            size + (rank % 2)
            for rank, size in enumerate(even_slots(shape.experts + redundant, self.group.size))
        ]
        placement = _shuffled_placement(sizes, shape.experts)
        routing = Routing(
            shape.experts, shape.top_k, "sigmoid", num_groups=4, top_groups=2, scaling_factor=2.5
        )
        counts = [37 * r % 100 for r in range(1, self.group.size + 1)]
        torch.manual_seed(1 + self.group.rank)
        x = torch.randn(counts[self.group.rank], shape.hidden, device=self.device).to(self.dtype)
        logits = torch.randn(len(x), shape.experts, device=self.device)
        wanted = reference_moe(x, logits, routing, experts).to(self.device)
        bound = 0.03 if self.dtype == torch.bfloat16 else 1e-5
        fine = True
        for use_ring in (True, False):
            layer = StagedMoE(
                routing, PlacedExperts.of(placement, 0, self.group.rank, self.device), experts.shard(placement, 0, self.group.rank),
                self.matmuls, self.group, None, use_ring,
            )  # fmt: skip
            whole = layer(x, logits)
            ways = {
                "whole": (1, 1),
                "3 token chunks": (3, 1),
                "2 embedding chunks": (1, 2),
                "own tokens first": (1, 1, None, True),
            }
            for name, chunks in ways.items():
                if not use_ring and "embedding" in name:
                    continue
                output = layer(x, logits, *chunks)
                error = float((output.double() - wanted).abs().max() / wanted.abs().max())
                apart = float((output.double() - whole.double()).abs().max() / wanted.abs().max())
                good = self._all(
                    error <= bound and apart <= (ROUNDING if self.device.type == "cuda" else 0)
                )
                fine &= good
                way = f"{'ring' if use_ring else 'all-to-all'}, {name}"
                self.say(
                    f"{way}: error {error:.1e} of the largest value, {apart:.1e} from whole: {'ok' if good else 'WRONG'}"
                )
        if self.device.type == "cuda" and hasattr(self.matmuls, "align"):
            fine &= self._check_align()
        return fine

    def _all(self, good: bool) -> bool:
        return all(row[0] for row in self.group.all_gather_ints([int(good)], self.device))

    def _check_align(self) -> bool:
        """The engine's align step and the one written in torch, up to the order within an expert, which CUDA leaves open."""
        slots = torch.randint(-1, 9, (77, 3), device=self.device, dtype=torch.int32)
        output = keep_local(slots, torch.rand(77, 3, device=self.device), 9, False)
        ids, experts, padded = self.matmuls.align(output, {"BLOCK_SIZE_M": 16})
        length = int(padded)
        ours = align_blocks(slots, 16, 9, self.matmuls.zeroes_elsewhere)
        same = length == int(ours[2]) and experts[: length // 16].tolist() == ours[1].tolist()
        same = same and _by_expert(ids[:length], experts) == _by_expert(ours[0], ours[1])
        self.say(f"align step: {'ok' if same else 'DIFFERS from the engine'}")
        return same

    # --- overhead

    def overhead(self) -> list[dict]:
        """gmm_up and gmm_down against one fused call, on the same rows, weights and choices."""
        shape, rows = self.shape, []
        plan = Placement(
            np.arange(shape.experts)[None],
            shape.experts,
            even_slots(shape.experts, self.arguments.ep),
        )
        weights = self.weights(plan.slots_per_rank[0], shape)
        placed = PlacedExperts.of(plan, 0, 0, self.device)
        share = synthetic_load(shape, 0.7).counts[0, 0].astype(float)
        watch = Stopwatch(self.device, graphs=not self.matmuls.name.startswith("torch"))
        self.say(
            f"overhead: staged against {'the fused call' if self.device.type == 'cuda' else 'a loop over experts'}, EP {self.arguments.ep}"
        )
        for tokens in self.tokens([1, 16, 64, 256, 1024, 4096, 16384]):
            x = torch.randn(tokens, shape.hidden, device=self.device).to(self.dtype)
            slots = torch.from_numpy(
                draw_step(share, tokens, shape.top_k, np.random.default_rng(tokens))
            ).to(self.device)
            router = torch.rand(slots.shape, device=self.device).softmax(dim=-1)
            output = keep_local(
                placed.local_slot[slots], router, placed.num_local, self.arguments.ep == 1
            )
            fused = self._fused(x, slots, router, weights, placed, output)

            def staged(x=x, output=output) -> torch.Tensor:
                return gmm_down(
                    gmm_up(x, output, weights, self.matmuls), output, weights, self.matmuls
                )

            apart = float(
                (staged().float() - fused().float()).abs().max() / fused().float().abs().max()
            )
            runs = {
                "fused": watch.prepare(fused),
                "staged": watch.prepare(staged),
                "fused again": watch.prepare(fused),
            }
            times = in_turn(runs, self.arguments.rounds)
            row = {
                "tokens": tokens,
                "fused_us": float(np.median(times["fused"])),
                "staged_over_fused": ratio(times, "staged", "fused"),
                "fused_over_itself": ratio(times, "fused again", "fused"),
                "apart": apart,
            }
            rows.append(row)
            self.say(
                f"  {tokens:6d} tokens: fused {row['fused_us']:9.1f} us, staged / fused {row['staged_over_fused']:.3f} (fused / fused "
                f"{row['fused_over_itself']:.3f}), outputs {apart:.1e} apart"
            )
        return rows

    def _fused(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        router: torch.Tensor,
        weights: ExpertWeights,
        placed: PlacedExperts,
        output: RouteOutput,
    ) -> Callable[[], torch.Tensor]:
        """The engine's own call; on CPU a loop over the experts in torch."""
        if self.matmuls.name.startswith("vLLM"):
            call = import_module(
                "vllm.model_executor.layers.fused_moe.fused_moe"
            ).fused_experts_impl
            ids, expert_map = (
                slots.int(),
                None if output.complete else placed.local_slot[:-1].contiguous(),
            )
            return lambda: call(
                x,
                weights.w13,
                weights.w2,
                router,
                ids,
                global_num_experts=placed.num_slots,
                expert_map=expert_map,
            )
        if self.matmuls.name.startswith("SGLang"):
            call = sglang_fused_call()
            local = output.local_slots
            return lambda: call(
                x, weights.w13, weights.w2, router, local, filter_expert=not output.complete
            )
        return lambda: _loop_over_experts(x, output, weights, self.matmuls)

    # --- overlap

    def overlap(self) -> list[dict]:
        """Time of the whole layer in 1, 2, 4, ... chunks, and of its computation alone; each the slowest rank's."""
        shape, rows = self.shape, []
        plan = Placement(
            np.arange(shape.experts)[None],
            shape.experts,
            even_slots(shape.experts, self.group.size),
        )
        placed = PlacedExperts.of(plan, 0, self.group.rank, self.device)
        torch.manual_seed(self.group.rank)
        weights = self.weights(placed.num_local, shape)
        routing = Routing(shape.experts, shape.top_k)
        watch = Stopwatch(self.device, graphs=self.arguments.graphs)
        for tokens in self.tokens([4096, 8192, 16384]):
            x = torch.randn(tokens, shape.hidden, device=self.device).to(self.dtype)
            logits = torch.randn(tokens, shape.experts, device=self.device)
            # The all-to-all waits for the device to know how much to send, which no graph can hold.
            for use_ring in (True,) if self.arguments.graphs else (True, False):
                layer = StagedMoE(
                    routing, placed, weights, self.matmuls, self.group, None, use_ring
                )
                known = [tokens] * self.group.size if use_ring else None
                rows.append(self._overlap_of(layer, x, logits, known, watch))
        return rows

    def _overlap_of(
        self,
        layer: StagedMoE,
        x: torch.Tensor,
        logits: torch.Tensor,
        known: list[int] | None,
        watch: Stopwatch,
    ) -> dict:
        selection = select(logits, layer.routing, layer.placed)
        (plan,) = plan_dispatch([selection], layer.placed, self.group, layer.use_ring)
        here, output, _ = dispatch(x, selection, plan, layer.placed, self.group)

        def computing() -> torch.Tensor:
            chosen = select(logits, layer.routing, layer.placed)
            return gmm_down(
                gmm_up(here, output, layer.weights, self.matmuls),
                output,
                layer.weights,
                self.matmuls,
            ), chosen

        calls: dict[str, Callable] = {
            "computation": computing,
            "whole": lambda: layer(x, logits, 1, 1, known),
            "own tokens first": lambda: layer(x, logits, 1, 1, known, True),
        }
        for chunks in self.arguments.chunks:
            calls[f"{chunks} token chunks"] = lambda c=chunks: layer(x, logits, c, 1, known)
            if layer.use_ring and chunks * 64 <= self.shape.hidden:
                calls[f"{chunks} embedding chunks"] = lambda c=chunks: layer(x, logits, 1, c, known)

        def together(run: Callable[[], float]) -> Callable[[], float]:
            def timed() -> float:
                self._all(True)  # begin at the same time
                return run()

            return timed

        mine = in_turn(
            {name: together(watch.prepare(call)) for name, call in calls.items()},
            self.arguments.rounds,
        )
        times = {name: self._slowest(values) for name, values in mine.items()}
        exposed = np.median(times["whole"] - times["computation"])
        row = {"tokens": len(x), "exchange": "ring" if layer.use_ring else "all-to-all", "graphs": self.arguments.graphs,
               "whole_us": float(np.median(times["whole"])), "computation_us": float(np.median(times["computation"])),
               "exposed_us": float(exposed), "chunked": {}}  # fmt: skip
        self.say(
            f"overlap: {row['exchange']}, {len(x)} tokens per rank: whole {np.median(times['whole']):.1f} us, computation "
            f"{np.median(times['computation']):.1f} us, exchange exposed {exposed:.1f} us"
        )
        for name in [n for n in times if n not in ("computation", "whole")]:
            hidden = np.median(times["whole"] - times[name]) / exposed
            row["chunked"][name] = {"us": float(np.median(times[name])), "hidden": float(hidden)}
            self.say(
                f"  {name:20s} {np.median(times[name]):9.1f} us, {hidden:6.1%} of the exposed exchange hidden"
            )
        return row

    def _slowest(self, values: np.ndarray) -> np.ndarray:
        nanoseconds = self.group.all_gather_ints([int(v * 1000) for v in values], self.device)
        return np.max(nanoseconds, axis=0) / 1000


def _shuffled_placement(sizes: list[int], experts: int) -> Placement:
    """Experts in no order dealt to ranks of the given sizes, none twice on a rank, each at least once."""
    generator = np.random.default_rng(0)
    left = np.concatenate([generator.permutation(experts) for _ in range(3)]).tolist()
    slots: list[int] = []
    for size in sizes:
        mine: list[int] = []
        while len(mine) < size:
            mine.append(left.pop(next(i for i, e in enumerate(left) if e not in mine)))
        slots += mine
    return Placement([slots], experts, tuple(sizes))


def _by_expert(ids: torch.Tensor, experts: torch.Tensor) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for block, expert in zip(ids.view(-1, 16).tolist(), experts.tolist()):
        found.setdefault(expert, []).extend(block)
    return {expert: sorted(values) for expert, values in found.items()}


def sglang_fused_call() -> Callable[..., torch.Tensor]:
    """SGLang's fused call outside a server: its output is allocated as on one rank, without asking for the tensor parallel group."""
    module = import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
    module.use_symmetric_memory = lambda *arguments, **options: nullcontext()
    module.is_allocation_symmetric = lambda: False
    module.get_tp_group = lambda: None
    module.get_parallel = lambda: SimpleNamespace(tp_group=None)
    return module.fused_experts_impl


def _loop_over_experts(
    x: torch.Tensor, output: RouteOutput, weights: ExpertWeights, matmuls: Matmuls
) -> torch.Tensor:
    result = torch.zeros_like(x)
    for slot in range(output.num_slots):
        rows, choice = (output.local_slots == slot).nonzero(as_tuple=True)
        hidden = matmuls.activate(x[rows] @ weights.w13[slot].T, x.dtype)
        result.index_add_(
            0, rows, output.weights[rows, choice, None].to(x.dtype) * (hidden @ weights.w2[slot].T)
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
