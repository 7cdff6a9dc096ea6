"""Run under TRITON_INTERPRET=1: an engine's own kernel on CPU, compared with torch. Prints one JSON object.

python -m tests.moe.interpreter_child vllm|sglang
"""

from __future__ import annotations

import json
import sys

import torch

from moe_placement_plugin import PlacementError
from moe_placement_plugin.moe import EpGroup, PlacedExperts, find_matmuls, gmm_down, gmm_up
from moe_placement_plugin.moe.reference import reference_moe
from moe_placement_plugin.moe.stages import _keep_local, select

from . import cases


def main(engine: str) -> None:
    torch.set_num_threads(1)
    matmuls, plain = find_matmuls(engine), find_matmuls("torch")
    launches, launch = [], matmuls.launch
    matmuls.launch = lambda *arguments: (launches.append(arguments[5:]), launch(*arguments))
    result = {"name": matmuls.name, "errors": {}, "chunked": {}}

    # One rank: no choice lies elsewhere.
    whole = cases.Case(ep=1, tokens=(21,), experts=6, shared="plain", routing=(("top_k", 3),), matmuls=engine)
    made = cases.make(whole)
    wanted = reference_moe(made.xs[0], made.logits[0], made.routing, made.experts, made.shared)
    layer = cases.layer(whole, made, EpGroup.single())
    layer.matmuls = matmuls
    outputs = {f"{t} x {e}": layer(made.xs[0], made.logits[0], t, e) for t, e in ((1, 1), (3, 1), (1, 3))}
    for name, output in outputs.items():
        result["errors"][f"one rank, {name} chunks"] = float((output.double() - wanted).abs().max() / wanted.abs().max())
    result["chunked"]["tokens, bit for bit"] = torch.equal(outputs["1 x 1"], outputs["3 x 1"])

    # The ranks of an uneven placement one after the other, their partial sums added here.
    case = cases.Case(ep=4, tokens=(12, 0, 7, 1), experts=9, slots_per_rank=(3, 0, 7, 2), redundant=3, dead=(2,), routing=(("top_k", 3),))
    made = cases.make(case)
    x, logits = torch.cat(made.xs), torch.cat(made.logits)
    total = torch.zeros_like(x)
    for rank in range(case.ep):
        placed = PlacedExperts.of(made.placement, 0, rank)
        chosen = select(logits, made.routing, placed)
        output = _keep_local(placed.local_slot[chosen.slots], chosen.weights, placed.num_local, False)
        weights = made.experts.shard(made.placement, 0, rank)
        partial = gmm_down(gmm_up(x, output, weights, matmuls), output, weights, matmuls)
        expected = gmm_down(gmm_up(x, output, weights, plain), output, weights, plain)
        result["errors"][f"rank {rank} against torch"] = float((partial - expected).abs().max())
        total += partial
    wanted = reference_moe(x, logits, made.routing, made.experts)
    result["errors"]["four ranks"] = float((total.double() - wanted).abs().max() / wanted.abs().max())

    try:
        bfloat16 = cases.make(whole.but(dtype="bfloat16"))
        cases.layer(whole, bfloat16, EpGroup.single())(bfloat16.xs[0], bfloat16.logits[0])
        result["bfloat16"] = "computed"
    except PlacementError as error:
        result["bfloat16"] = str(error)
    print(json.dumps(result | {"launches": len(launches)}))


if __name__ == "__main__":
    main(sys.argv[1])
