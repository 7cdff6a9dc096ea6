"""Test the installed engine's own Triton kernel under the interpreter.

They also test what is asked of the engine before it is called.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from moe_placement_plugin import PlacementError
from moe_placement_plugin.lab.staged_layer import find_matmuls
from moe_placement_plugin.lab.staged_layer.matmuls.align import align_blocks
from moe_placement_plugin.lab.staged_layer.matmuls.engine import engine_function, require_parameters
from tests.support.children import python, python_path, run_child
from tests.support.paths import ROOT

pytestmark = pytest.mark.every_engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", [e for e in ("vllm", "sglang") if find_spec(e)])
def test_kernel_under_the_interpreter(engine):
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = run_child(
        python("-m", "tests.unit.lab.staged_layer.interpreter_child", engine),
        300,
        environment,
        ROOT,
    )
    assert done.code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert "fused_moe_kernel (Triton interpreter)" in result["name"]
    assert len(result["errors"]) == 8
    assert all(error < 1e-5 for error in result["errors"].values()), result
    # One rank: 2 for the whole layer, 2 for each of three chunks, 3 + 3 for three chunks of
    # columns; then 2 for each of the three ranks that have slots.
    assert result["launches"] == 2 + 6 + 6 + 6
    assert result["chunked"] == {"tokens, bit for bit": True}
    assert "use float32" in result["bfloat16"]
    on_cuda = result["as on CUDA"]
    assert len(on_cuda) == 12
    rounding = 1e-5 if engine == "vllm" else 2e-3  # float32, float16
    assert all(
        apart == 0 if name.endswith("fused") else apart < rounding
        for name, apart in on_cuda.items()
    ), on_cuda


def test_align_of_the_engines_own_example():
    # The example in both engines' docstrings, whose experts are numbered from 1.
    slots = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]) - 1
    ids, experts, padded = align_blocks(slots, 4, 4, keep_elsewhere=False)
    assert ids.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert experts.tolist() == [0, 1, 2, 3] and padded.tolist() == [16]


@pytest.mark.parametrize("keep", [False, True], ids=["vllm", "sglang"])
def test_align_with_choices_elsewhere(keep):
    slots = torch.randint(
        -1, 5, (37, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    slots[slots == 2] = 4  # a slot without tokens
    ids, experts, padded = align_blocks(slots, 8, 5, keep)
    flat, blocks = slots.flatten(), ids.view(-1, 8)
    assert ids.numel() == int(padded) == experts.numel() * 8
    assert (
        experts.tolist() == sorted(experts.tolist())
        and 2 not in experts
        and (-1 in experts) == keep
    )
    real = blocks < flat.numel()
    assert (flat[blocks[real].long()] == experts.repeat_interleave(8).view(-1, 8)[real]).all()
    assert sorted(blocks[real].tolist()) == [
        i for i, s in enumerate(flat.tolist()) if keep or s >= 0
    ]
    assert real.any(dim=1).all(), "a block of padding alone"


def test_align_of_nothing():
    ids, experts, padded = align_blocks(torch.full((4, 2), -1), 8, 3, keep_elsewhere=False)
    assert (ids.numel(), experts.numel(), padded.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: find_matmuls("cutlass"), "choose from auto, vllm"),
        (lambda: find_matmuls("vllm"), "vllm"),
        (lambda: find_matmuls("torch").up, None),
        (
            lambda: engine_function("json", "no_such", ()),
            "json.no_such is not in the installed engine",
        ),
        (
            lambda: require_parameters(lambda A, B, new: None, "engine.launch", ("A", "B")),
            "also needs new",
        ),
        (lambda: require_parameters(lambda A: None, "engine.launch", ("A", "B")), "lacks B"),
        (
            lambda: require_parameters(lambda A, B, new=1, **k: None, "engine.launch", ("A", "B")),
            None,
        ),
    ],
)
def test_what_is_asked_of_the_engine(ask, says):
    if says is None:
        ask()
        return
    with pytest.raises(PlacementError, match=says):
        ask()
