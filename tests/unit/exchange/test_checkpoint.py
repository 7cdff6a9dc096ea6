"""Single experts out of safetensors checkpoints."""

from __future__ import annotations

import json
import os

import pytest

torch = pytest.importorskip("torch", reason="checkpoints are read as torch tensors")

from safetensors.torch import save_file  # noqa: E402

from moe_placement_plugin.core.errors import PlacementError  # noqa: E402
from moe_placement_plugin.exchange.checkpoint import (  # noqa: E402
    Checkpoint,
    CheckpointReader,
    Source,
    hugging_face_experts,
)

HIDDEN, WIDTH, EXPERTS = 6, 4, 3


def made_up(*shape: int, seed: int, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expert(layer: int, number: int, dtype=torch.float32):
    seed = 100 * layer + 10 * number
    return (
        made_up(WIDTH, HIDDEN, seed=seed, dtype=dtype),
        made_up(WIDTH, HIDDEN, seed=seed + 1, dtype=dtype),
        made_up(HIDDEN, WIDTH, seed=seed + 2, dtype=dtype),
    )


def check(reader: CheckpointReader, layer: int, number: int, size: int = 4) -> None:
    first, down = torch.zeros(2 * WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH)
    assert reader.read(layer, number, [first, down]) == 3 * HIDDEN * WIDTH * size
    gate, up, below = expert(layer, number)
    assert torch.equal(first, torch.cat([gate, up])) and torch.equal(down, below)


@pytest.fixture
def sharded(tmp_path):
    """One tensor per expert and projection, a file per layer, with an index."""
    weight_map = {}
    for layer in (1, 2):
        tensors = {"model.layers.0.mlp.gate_proj.weight": torch.ones(2)} if layer == 1 else {}
        for number in range(EXPERTS):
            for name, tensor in zip(("gate_proj", "up_proj", "down_proj"), expert(layer, number)):
                tensors[f"model.layers.{layer}.mlp.experts.{number}.{name}.weight"] = tensor
        save_file(tensors, tmp_path / f"model-{layer}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_only_the_expert_is_read(sharded):
    checkpoint = Checkpoint(sharded)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    check(reader, 2, 1)
    assert checkpoint.bytes_read == 3 * HIDDEN * WIDTH * 4
    assert list(checkpoint._open) == [sharded / "model-2.safetensors"]
    check(reader, 1, 2)


def advised(monkeypatch, reader: CheckpointReader, experts) -> bytes:
    """What a prefetch asks the system to read."""
    asked = b""

    def advise(fd, begin, size, advice):
        nonlocal asked
        assert advice == os.POSIX_FADV_WILLNEED
        asked += os.pread(fd, size, begin)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    reader.prefetch(experts)
    return asked


def test_prefetch_asks_for_just_the_experts(sharded, monkeypatch):
    checkpoint = Checkpoint(sharded)
    monkeypatch.setattr(
        "moe_placement_plugin.exchange.checkpoint._READ_AHEAD", 10
    )  # a tensor takes several requests
    asked = advised(
        monkeypatch,
        CheckpointReader(checkpoint, hugging_face_experts(checkpoint)),
        [(2, 1), (1, 0)],
    )
    wanted = (*expert(2, 1), *expert(1, 0))
    assert asked == b"".join(t.numpy().tobytes() for t in wanted) and checkpoint.bytes_read == 0


def test_prefetch_of_what_is_missing_is_left_to_reading(sharded, monkeypatch):
    checkpoint = Checkpoint(sharded)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    (sharded / "model-2.safetensors").unlink()
    assert advised(monkeypatch, reader, [(2, 1), (9, 9)]) == b""
    with pytest.raises(PlacementError, match="model-2.safetensors cannot be read"):
        check(reader, 2, 1)


def test_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    checkpoint = Checkpoint(sharded)
    check(CheckpointReader(checkpoint, hugging_face_experts(checkpoint)), 1, 0)
    one = Checkpoint(sharded / "model-1.safetensors")
    check(CheckpointReader(one, hugging_face_experts(one)), 1, 0)


def test_mixtral_names(tmp_path):
    gate, up, down = expert(3, 1)
    start = "model.layers.3.block_sparse_moe.experts.1."
    save_file(
        {start + "w1.weight": gate, start + "w3.weight": up, start + "w2.weight": down},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint(tmp_path)
    check(CheckpointReader(checkpoint, hugging_face_experts(checkpoint)), 3, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_all_experts_in_one_tensor(tmp_path, transposed, monkeypatch):
    gate_up = torch.stack([torch.cat(expert(0, e)[:2]) for e in range(EXPERTS)])
    down = torch.stack([expert(0, e)[2] for e in range(EXPERTS)])
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    save_file(
        {
            "model.language_model.layers.0.mlp.experts.gate_up_proj": gate_up,
            "model.language_model.layers.0.mlp.experts.down_proj": down,
        },
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint(tmp_path)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    check(reader, 0, 2)
    assert (
        advised(monkeypatch, reader, [(0, 2)])
        == gate_up[2].numpy().tobytes() + down[2].numpy().tobytes()
    )
    with pytest.raises(PlacementError, match="holds 3 experts, expert 3"):
        reader.read(0, 3, [torch.zeros(1), torch.zeros(1)])


def test_a_square_fused_tensor_is_not_guessed(tmp_path):
    save_file(
        {
            "layers.0.experts.gate_up_proj": torch.zeros(1, 8, 8),
            "layers.0.experts.down_proj": torch.zeros(1, 8, 4),
        },
        tmp_path / "a.safetensors",
    )
    checkpoint = Checkpoint(tmp_path)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    with pytest.raises(PlacementError, match="square"):
        reader.read(0, 0, [torch.zeros(8, 8), torch.zeros(8, 4)])


def test_plain_types_are_converted_and_others_refused(tmp_path):
    gate, up, down = expert(0, 0, torch.bfloat16)
    start = "model.layers.0.mlp.experts.0."
    tensors = {
        start + "gate_proj.weight": gate,
        start + "up_proj.weight": up,
        start + "down_proj.weight": down,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    first, below = torch.zeros(2 * WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH)
    reader.read(0, 0, [first, below])
    assert torch.equal(first, torch.cat([gate, up]).float())
    with pytest.raises(PlacementError, match="converts them as the engine does"):
        reader.read(0, 0, [first.to(torch.float8_e4m3fn), below])
    with pytest.raises(PlacementError, match="quantized"):
        reader.read(0, 0, [first, below, torch.zeros(1)])
    with pytest.raises(PlacementError, match=r"layer 0, expert 0 of .*another model"):
        reader.read(0, 0, [first, torch.zeros(HIDDEN, WIDTH + 1)])
    with pytest.raises(PlacementError, match="do not fit"):
        reader.read(0, 0, [torch.zeros(2 * WIDTH + 2, HIDDEN), below])


def test_what_is_missing_is_named(sharded, tmp_path_factory):
    checkpoint = Checkpoint(sharded)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    with pytest.raises(
        PlacementError, match=r"no tensor model\.layers\.9\.mlp\.experts\.0\.gate_proj\.weight"
    ):
        reader.read(9, 0, [])
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(PlacementError, match="no safetensors files"):
        Checkpoint(empty)
    save_file({"model.layers.0.mlp.gate_proj.weight": torch.ones(2)}, empty / "model.safetensors")
    with pytest.raises(PlacementError, match="names no experts"):
        hugging_face_experts(Checkpoint(empty))
    (sharded / "model-2.safetensors").write_bytes(b"cut off")
    with pytest.raises(PlacementError, match="complete checkpoint"):
        Checkpoint(sharded).read(Source("model.layers.2.mlp.experts.0.gate_proj.weight"))
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PlacementError, match="weight_map"):
        Checkpoint(sharded)
