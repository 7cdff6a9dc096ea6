"""The digest: what it must tell apart, and that every form of it gives the same."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_placement_plugin import PlacementError
from moe_placement_plugin.verification import definition, digests_cpu

torch = pytest.importorskip("torch", reason="torch comes with an engine")
from moe_placement_plugin.verification.digests import (  # noqa: E402
    layer_digests,
    slot_bytes,
    tensor_digests,
    torch_digests,
)
from tests.support.paths import ROOT  # noqa: E402

SIZES = (
    0,
    1,
    3,
    4,
    5,
    63,
    4 * definition.BLOCK - 1,
    4 * definition.BLOCK,
    4 * definition.BLOCK + 4,
    5_000_001,
)


def test_keys_are_odd_and_all_different():
    assert (
        definition.KEYS.size == definition.BLOCK == np.unique(definition.KEYS).size
        and (definition.KEYS % 2 == 1).all()
    )
    assert (definition.multipliers(1000) % np.uint64(2) == 1).all() and np.unique(
        definition.multipliers(1000)
    ).size == 1000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_form_gives_the_reference(size, threads):
    data = np.random.default_rng(size).integers(0, 256, (3, size), dtype=np.uint8)
    expected = [definition.reference(row) for row in data]
    assert digests_cpu.digests(data, threads).tolist() == expected
    assert torch_digests(torch.from_numpy(data)).numpy().view(np.uint64).tolist() == expected


def test_the_reference_by_hand():
    words = np.array([7, 0, 2**32 - 1], dtype="<u4")
    keys, factor = definition.KEYS.astype(object), int(definition.multipliers(1)[0])
    assert (
        definition.reference(words.tobytes())
        == (7 * keys[0] + (2**32 - 1) * keys[2]) * factor % 2**64
    )
    two_blocks = np.zeros(definition.BLOCK + 1, dtype="<u4")
    two_blocks[-1] = 1
    assert (
        definition.reference(two_blocks.tobytes())
        == int(keys[0]) * int(definition.multipliers(2)[1]) % 2**64
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40_000), st.integers(0, 2**32 - 1), st.data())
def test_any_changed_byte_and_any_two_exchanged_words_change_it(size, seed, data):
    row = np.random.default_rng(seed).integers(0, 256, (1, size), dtype=np.uint8)
    before = digests_cpu.digests(row)[0]
    other = row.copy()
    other[0, data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    assert digests_cpu.digests(other)[0] != before
    words = row[:, : size // 4 * 4].copy().view("<u4")
    if words.shape[1] > 1:
        first, second = (
            data.draw(st.integers(0, words.shape[1] - 1)),
            data.draw(st.integers(0, words.shape[1] - 1)),
        )
        swapped = words.copy()
        swapped[0, [first, second]] = swapped[0, [second, first]]
        same = words[0, first] == words[0, second]
        assert (
            digests_cpu.digests(swapped.view(np.uint8))[0]
            == digests_cpu.digests(words.view(np.uint8))[0]
        ) == same


def test_bits_count_not_numbers():
    values = torch.tensor([[0.0, float("nan")], [-0.0, float("nan")]])
    values.view(torch.int32)[1, 1] += 1
    first, second = tensor_digests(values)
    assert first != second
    values[1] = values[0]
    values.view(torch.int32)[1, 1] = values.view(torch.int32)[0, 1]
    assert len(set(tensor_digests(values).tolist())) == 1


def test_a_transposed_weight_is_read_where_it_lies_and_one_with_gaps_in_order():
    whole = torch.randn(4, 6, 10)
    transposed = whole.transpose(1, 2)
    assert slot_bytes(transposed).data_ptr() == whole.data_ptr()
    assert tensor_digests(transposed).tolist() == tensor_digests(whole).tolist()
    assert (
        tensor_digests(whole[:, :, ::2]).tolist()
        == tensor_digests(whole[:, :, ::2].contiguous()).tolist()
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.float8_e4m3fn],
)
def test_every_type_is_read_as_bytes(dtype):
    tensor = torch.arange(3 * 37, dtype=torch.int64).remainder(100).reshape(3, 37).to(dtype)
    assert tensor_digests(tensor).tolist() == [
        definition.reference(row.numpy()) for row in tensor.view(torch.uint8).view(3, -1)
    ]


def test_a_layers_digests_depend_on_name_shape_and_type():
    data = torch.arange(64, dtype=torch.int32).view(2, 32)
    names, base = layer_digests({"w": data, "a": data + 1})
    assert names == ("a", "w") and base.shape == (2, 2)
    for other in ({"v": data}, {"w": data.view(2, 4, 8)}, {"w": data.view(torch.float32)}):
        assert layer_digests(other)[1][0, 0] != base[0, 1]
    with pytest.raises(PlacementError, match="different numbers of slots"):
        layer_digests({"w": data, "s": data[:1]})


INTERPRETED = """
import numpy as np, torch
from moe_placement_plugin.verification import definition, digests_gpu
for size in (1, 4, 5, 4 * definition.BLOCK * 3 + 8, 4 * definition.BLOCK * 17):
    data = np.random.default_rng(size).integers(0, 256, (2, size), dtype=np.uint8)
    found = digests_gpu.digests(torch.from_numpy(data)).numpy().view(np.uint64).tolist()
    assert found == [definition.reference(row) for row in data], size
# A sleeping engine discards what lies on its device: as if all that was kept there were zeros now.
import gc
for kept in gc.get_objects():
    if torch.is_tensor(kept):
        kept.zero_()
found = digests_gpu.digests(torch.from_numpy(data)).numpy().view(np.uint64).tolist()
assert found == [definition.reference(row) for row in data], "after sleep"
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("triton"),
    reason="triton is not installed beside this engine",
)
def test_the_triton_kernel_gives_the_reference_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.uint8, torch.int64]
)
def test_a_gpu_gives_the_same_digests_as_the_cpu(dtype):
    for shape in [
        (3, 1),
        (2, 37),
        (5, 64, 96),
        (3, definition.BLOCK * 16 + 3),
        (2, 129, 2 * definition.BLOCK),
    ]:
        tensor = torch.randint(0, 100, shape, dtype=torch.int64).to(dtype)
        expected = tensor_digests(tensor).tolist()
        assert tensor_digests(tensor.cuda()).tolist() == expected, shape
        if tensor.dim() == 3:
            assert tensor_digests(tensor.cuda().transpose(1, 2)).tolist() == expected, shape
