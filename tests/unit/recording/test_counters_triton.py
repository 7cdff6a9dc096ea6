"""The kernel that counts choices on a GPU: under Triton's interpreter, and compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed beside this engine"
)

KERNELS = """
import numpy as np, torch
from moe_placement_plugin.recording.counters_triton import count
rng = np.random.default_rng(0)
for tokens in (0, 1, 3, 16, 200):
    for kind in (torch.int32, torch.int64):
        # 9 experts: some ids are of none.
        ids = torch.from_numpy(rng.integers(-1, 12, (tokens, 6))).to(kind)
        start = torch.from_numpy(rng.integers(0, 3, (tokens, 1)) * 9)
        counts, slots = torch.full((27,), 5), torch.full((2, 9), 5, dtype=torch.int32)
        count(ids, start, counts, 9)
        count(ids[:, :5], None, slots[1], 9)  # what is not contiguous
        expected, row = np.full(27, 5), np.full(9, 5)
        for token, begin in zip(ids.tolist(), start[:, 0].tolist()):
            for at, one in enumerate(token):
                if 0 <= one < 9:
                    expected[begin + one] += 1
                    row[one] += at < 5
        assert counts.tolist() == expected.tolist(), (tokens, kind)
        assert slots.tolist() == [[5] * 9, row.tolist()], (tokens, kind)
print("equal")
"""

SGLANG = """
import torch
from sglang.srt.eplb.expert_distribution import _SelectExpertsSinglePassGatherer as Gatherer
from moe_placement_plugin.engines.sglang import eplb_counting
ours, theirs = (object.__new__(Gatherer) for _ in range(2))
for one in (ours, theirs):
    one._data = torch.zeros((3, 10), dtype=torch.int32)
original = Gatherer.on_select_experts
def refuse(*_):
    raise AssertionError("the kernel was not used")
for number in range(4):
    ids = torch.randint(-1, 10, (7 * number + 1, 4), dtype=torch.int32)
    original(theirs, number % 3, ids)
    eplb_counting.select_experts(original, ours, number % 3, ids) if number == 2 else None
    if number != 2:
        eplb_counting.DEVICES = ("cpu",)
        eplb_counting.select_experts(refuse, ours, number % 3, ids)
        eplb_counting.DEVICES = ("cuda",)
assert ours._data.equal(theirs._data) and ours._data.sum() > 0
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_placement_plugin.recording.counters_triton import _count
numbers = {"numel": "i32", "top_k": "i32", "experts": "i32", "BLOCK": "constexpr"}
of_experts = {"ids_ptr": "*i64", "start_ptr": "*i64", "counts_ptr": "*i64", **numbers}
of_slots = of_experts | {"ids_ptr": "*i32", "start_ptr": "constexpr", "counts_ptr": "*i32"}
for types, constants in ((of_slots, {"start_ptr": None}), (of_experts, {})):
    source = ASTSource(_count, types, constants | {"BLOCK": 256})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) and ".add." in made.asm["ptx"], "counts are added to atomically"
    once = [p.name for p in _count.params if p.do_not_specialize]
    assert once == ["numel"], "one kernel for all numbers of tokens"
print("equal")
"""


def run(code: str, interpret: str = "1") -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@pytest.mark.slow
def test_choices_are_counted_once_each():
    run(KERNELS)


@pytest.mark.slow
def test_both_compile_for_a_gpu_where_there_is_none():
    run(COMPILED, "0")


@pytest.mark.skipif(not importlib.util.find_spec("sglang"), reason="SGLang's recorder")
def test_sglangs_recorder_counts_the_same():
    run(SGLANG)
