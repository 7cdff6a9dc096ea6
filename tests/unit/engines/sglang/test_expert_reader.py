"""Read single experts through a model's own loader.

The models have several habits, and the checkpoint is real.
"""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang import expert_reader
from moe_placement_plugin.engines.sglang.state import STATE

LAYERS, EXPERTS, WIDTH, HIDDEN = (1, 2), 6, 4, 8


class Layer(torch.nn.Module):
    """Stand in for SGLang's ``FusedMoE``, as much as loading needs.

    Which slot holds what is ``held``, logical expert by slot.
    """

    def __init__(self, layer_id: int, held: list[int]):
        super().__init__()
        self.layer_id, self.held = layer_id, held
        self.w13_weight = torch.nn.Parameter(
            torch.zeros(len(held), 2 * WIDTH, HIDDEN), requires_grad=False
        )
        self.w2_weight = torch.nn.Parameter(
            torch.zeros(len(held), HIDDEN, WIDTH), requires_grad=False
        )
        self.w13_weight.packing = "of this parameter"

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id):
        if expert_reader.intercepted(self, param, loaded_weight, weight_name, shard_id, expert_id):
            return
        for slot, expert in enumerate(self.held):
            if expert == expert_id:
                self._weight_loader_impl(param, loaded_weight, weight_name, shard_id, slot)

    def _weight_loader_impl(self, param, loaded_weight, weight_name, shard_id, expert_id):
        assert shard_id == "w2" or param.packing == "of this parameter"
        part = {"w1": slice(0, WIDTH), "w3": slice(WIDTH, None), "w2": slice(None)}[shard_id]
        param.data[expert_id][part] = loaded_weight

    def weight_loader_fused(self, param, loaded_weight, weight_name, shard_id):
        def original(layer, param, loaded_weight, weight_name, shard_id):
            param.data.copy_(loaded_weight)

        if not expert_reader.intercepted(
            self, param, loaded_weight, weight_name, shard_id, None, original
        ):
            original(self, param, loaded_weight[self.held], weight_name, shard_id)


class Model(torch.nn.Module):
    def __init__(self, held):
        super().__init__()
        self.experts = torch.nn.ModuleList([Layer(layer, held) for layer in LAYERS])
        self.dense = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        self.routed_experts_weights_of_layer = {
            layer.layer_id: [layer.w13_weight.data, layer.w2_weight.data] for layer in self.experts
        }

    def load_weights(self, weights):
        self.routed_experts_weights_of_layer = "listed anew"
        calls = []
        for name, tensor in weights:
            calls += self.calls_of(name, tensor)
        self.go(calls)

    def calls_of(self, name, tensor):
        if name == "dense":
            self.dense.data.copy_(tensor)
            return []
        _, layer, expert, part = name.split(".")
        layer = self.experts[LAYERS.index(int(layer))]
        shard = {"gate": "w1", "up": "w3", "down": "w2"}[part]
        param = layer.w2_weight if shard == "w2" else layer.w13_weight
        return [
            (
                layer.weight_loader,
                (
                    param,
                    tensor,
                    "experts.w2_weight" if shard == "w2" else "experts.w13_weight",
                    shard,
                    int(expert),
                ),
            )
        ]

    def go(self, calls):
        for call, arguments in calls:
            call(*arguments)


class Threaded(Model):
    """Load in threads, in another order than the checkpoint's, as DeepSeek does."""

    def go(self, calls):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda c: c[0](*c[1]), reversed(calls)))


class Fused(Model):
    """Load one tensor per layer for all experts, gate and up in one."""

    def calls_of(self, name, tensor):
        if name == "dense":
            return super().calls_of(name, tensor)
        _, layer, part = name.split(".")
        layer = self.experts[LAYERS.index(int(layer))]
        if part == "gate_up":
            return [
                (layer.weight_loader_fused, (layer.w13_weight, tensor, "experts.w13_weight", "w13"))
            ]
        return [(layer.weight_loader_fused, (layer.w2_weight, tensor, "experts.w2_weight", "w2"))]


def tensors(fused: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"dense": torch.ones(3)}
    for layer in LAYERS:
        gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
        down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
        if fused:
            found |= {f"layers.{layer}.gate_up": gate_up, f"layers.{layer}.down": down}
        else:
            for e in range(EXPERTS):
                parts = {"gate": gate_up[e, :WIDTH], "up": gate_up[e, WIDTH:], "down": down[e]}
                found |= {
                    f"layers.{layer}.{e}.{name}": part.contiguous() for name, part in parts.items()
                }
    return found


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(STATE.names, "known", None)


def loaded(kind, folder, prefix: str = ""):
    """Load a model of experts 0, 2 and 4 from a checkpoint while names are noted."""
    content = tensors(kind is Fused)
    save_file(content, folder / "model.safetensors")
    model = kind([0, 2, 4])
    source = types.SimpleNamespace(
        model_or_path=str(folder), revision=None, fall_back_to_pt=False, prefix=prefix
    )
    loader = types.SimpleNamespace(
        _prepare_weights=lambda path, revision, fall_back: (path, ["model.safetensors"], True)
    )
    with expert_reader.learning(True):
        found = expert_reader.weights(
            lambda self, source: iter((prefix + n, t.clone()) for n, t in content.items()),
            loader,
            source,
        )
        model.load_weights((name.removeprefix(prefix), tensor) for name, tensor in found)
    model.routed_experts_weights_of_layer = {
        layer.layer_id: [layer.w13_weight.data, layer.w2_weight.data] for layer in model.experts
    }
    return model, content


def expected(content, layer: int, expert: int) -> list[torch.Tensor]:
    if f"layers.{layer}.gate_up" in content:
        return [content[f"layers.{layer}.gate_up"][expert], content[f"layers.{layer}.down"][expert]]
    gate, up, down = (content[f"layers.{layer}.{expert}.{part}"] for part in ("gate", "up", "down"))
    return [torch.cat([gate, up]), down]


@pytest.mark.parametrize("kind", [Model, Threaded, Fused])
def test_experts_are_read_through_the_models_loader(kind, tmp_path):
    model, content = loaded(kind, tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    listed = model.routed_experts_weights_of_layer
    reader = expert_reader.EngineReader(model, listed)
    wanted = [
        (
            layer,
            expert,
            [torch.full((2 * WIDTH, HIDDEN), torch.nan), torch.full((HIDDEN, WIDTH), torch.nan)],
        )
        for layer, expert in ((1, 3), (2, 5), (1, 0), (1, 3))
    ]
    amount = reader.read_all(wanted)
    for layer, expert, out in wanted:
        for tensor, right in zip(out, expected(content, layer, expert)):
            assert tensor.equal(right), (layer, expert)
    size = 3 * WIDTH * HIDDEN * 4
    assert amount == (2 * EXPERTS * size if kind is Fused else 3 * size), (
        "more was read than what is wanted"
    )
    assert all(before[name].equal(p) for name, p in model.named_parameters()), (
        "the model itself was written to"
    )
    assert model.routed_experts_weights_of_layer is listed


def test_names_with_a_prefix(tmp_path):
    model, content = loaded(Model, tmp_path, prefix="target.")
    out = [torch.empty(2 * WIDTH, HIDDEN), torch.empty(HIDDEN, WIDTH)]
    names = STATE.names.known
    for key in list(names.of):
        assert all(name.startswith("target.") for name in names.of[key])
    load = model.load_weights
    model.load_weights = lambda found: load(
        (name.removeprefix("target."), tensor) for name, tensor in found
    )
    expert_reader.EngineReader(model, model.routed_experts_weights_of_layer).read(2, 4, out)
    assert out[1].equal(expected(content, 2, 4)[1])


def test_what_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(PlacementError, match="did not come from a safetensors checkpoint"):
        expert_reader.EngineReader(None, {}).read(1, 0, [])
    model, _ = loaded(Model, tmp_path)
    reader = expert_reader.EngineReader(model, model.routed_experts_weights_of_layer)
    with pytest.raises(PlacementError, match="layer 1, expert 9: no tensor of the checkpoint"):
        reader.read(1, 9, [])
    calls = model.calls_of
    model.calls_of = lambda name, tensor: [] if name.endswith("up") else calls(name, tensor)
    with pytest.raises(
        PlacementError, match=r"loader did not bring \[\('experts.w13_weight', 'w3'\)\]"
    ):
        reader.read(1, 3, [torch.empty(2 * WIDTH, HIDDEN), torch.empty(HIDDEN, WIDTH)])


def test_memory_that_is_used_again_names_the_tensor_that_came_last():
    names = expert_reader.Names()
    memory = torch.zeros(100)
    names.comes("a", memory[:40])
    names.comes("b", memory[40:60])
    names.comes("c", memory[30:50])  # both are gone
    names.goes(0, 1, "w", "w1", memory[45:50])
    names.goes(0, 2, "w", "w1", torch.zeros(3))  # a copy: it was the last to come
    assert dict(names.of) == {(0, 1): {"c": None}, (0, 2): {"c": None}}
    names.comes("d", memory[60:])
    names.goes(0, 3, "w", "w1", memory[32:40])
    assert names.of[0, 3] == {"c": None}
