"""Test the benchmark's ranks on one GPU: what engines ask of NCCL, over gloo."""

from __future__ import annotations

import json

import pytest

from moe_placement_plugin.lab.gpu import one_gpu
from moe_placement_plugin.lab.servers.server import free_port
from tests.support.children import ROOT, python, python_path, run_child

pytestmark = pytest.mark.engine


def test_unequal_shares_over_gloo():
    env = {"PYTHONPATH": python_path(one_gpu.HERE / "shared"), "OMP_NUM_THREADS": "1"}
    done = run_child(
        python("-m", "tests.integration.sglang.shares_child", str(free_port())), 200, env, ROOT
    )
    assert done.code == 0, done.output
    found = json.loads(done.output.rpartition("found ")[2].splitlines()[0])
    summed = [[3.0 * column for column in (2 * row, 2 * row + 1)] for row in range(4)]
    all_shares = [[1, 1]] * 3 + [[2, 2]]
    for rank, own in (("0", slice(0, 3)), ("1", slice(3, 4))):
        gathered, scattered, halves, *several = found[rank]
        theirs = [[value + 1 - int(rank) for value in row] for row in all_shares]
        assert gathered == all_shares and several == [all_shares] * 2 + [theirs] * 2
        assert scattered == summed[own]
        assert halves == summed[2 * int(rank) : 2 * int(rank) + 2]
