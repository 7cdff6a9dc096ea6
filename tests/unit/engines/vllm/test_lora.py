"""LoRA adapters of experts, cut by the installed vLLM's own classes on emulated EP ranks, without an engine."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import Placement, PlacementError  # noqa: E402
from moe_placement_plugin.engines.vllm import lora  # noqa: E402
from moe_placement_plugin.engines.vllm.state import STATE  # noqa: E402
from tests.support.vllm_settings import make_settings  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]  # imports vLLM, starts no engine

EXPERTS, RANK, HIDDEN, WIDTH, LAYERS = 8, 2, 4, 3, 2
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")
NAME = "model.layers.{}.mlp.experts"

PLANS = {
    "linear": Placement([range(8)] * 2, 8, (4, 4)),
    "zigzag": Placement([[0, 2, 4, 6, 1, 3, 5, 7]] * 2, 8, (4, 4)),
    "shuffled, another in each layer": Placement(
        [[7, 2, 0, 5, 1, 6, 4, 3], [3, 1, 6, 0, 2, 7, 5, 4]], 8, (4, 4)
    ),
    "uneven": Placement([[7, 2, 0, 5, 1, 6, 4, 3], [3, 1, 6, 0, 2, 7, 5, 4]], 8, (5, 3)),
}


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    monkeypatch.setattr(STATE, "settings", None)
    patches = lora.lora_patches()
    patches.apply()
    yield patches
    patches.undo()


def value(layer: int, expert: int, projection: str, side: str) -> int:
    """A number of its own for each matrix of an adapter; small enough to be exact in float32."""
    return 1 + side_of(side) + 2 * (PROJECTIONS.index(projection) + 3 * (expert + EXPERTS * layer))


def side_of(side: str) -> int:
    return "AB".index(side)


def shape(projection: str, side: str) -> tuple[int, int]:
    into, out = (WIDTH, HIDDEN) if projection == "down_proj" else (HIDDEN, WIDTH)
    return (RANK, into) if side == "A" else (out, RANK)


def matrix(layer: int, expert: int, projection: str, side: str) -> torch.Tensor:
    return torch.full(shape(projection, side), float(value(layer, expert, projection, side)))


class Layer(torch.nn.Module):
    """What the adapter's code reads of a ``MoERunner`` and its ``RoutedExperts`` on one rank."""

    def __init__(self, plan: Placement, number: int, rank: int):
        super().__init__()
        parallel = SimpleNamespace(
            use_ep=True, ep_rank=rank, tp_size=1, tp_rank=0, all2all_backend="allgather_reducescatter"
        )  # fmt: skip
        local = plan.slots_per_rank[rank]
        self.moe_config = SimpleNamespace(
            moe_parallel_config=parallel, num_experts=EXPERTS, num_logical_experts=EXPERTS,
            num_local_experts=local, hidden_dim=HIDDEN, intermediate_size_per_partition=WIDTH,
            intermediate_size_per_partition_unpadded=WIDTH, is_act_and_mul=True,
        )  # fmt: skip
        expert_map = torch.from_numpy(plan.expert_map(number, rank).copy())
        manager = SimpleNamespace(expert_map=expert_map, global_num_experts=EXPERTS, ep_rank=rank)
        self.routed_experts = SimpleNamespace(
            layer_name=NAME.format(number), local_num_experts=local, moe_config=self.moe_config,
            expert_map_manager=manager,
        )  # fmt: skip


def lora_layer(kind, plan, number, rank, shared):
    from vllm.lora.layers import fused_moe

    module = getattr(fused_moe, kind).__new__(getattr(fused_moe, kind))
    torch.nn.Module.__init__(module)
    module.base_layer = Layer(plan, number, rank)
    module.moe_config = module.base_layer.moe_config
    module.tp_size, module.tp_rank, module.device = 1, 0, torch.device("cpu")
    module._w13_slices = 1 if "3D" in kind else 2
    module.enable_moe_shared_loras = shared
    config = SimpleNamespace(
        max_loras=1, max_lora_rank=RANK, fully_sharded_loras=False, lora_dtype=torch.float32,
        enable_moe_shared_loras=shared,
    )  # fmt: skip
    module.create_lora_weights(1, config, SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]))
    return module


def manager_of(kind: str, plan: Placement, rank: int, mixed: bool = False, shared: bool = False):
    """vLLM's manager of adapters on one EP rank, for a model of two MoE layers."""
    from vllm.lora.model_manager import LoRAModelManager

    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.modules = {
        NAME.format(n): lora_layer(kind, plan, n, rank, shared) for n in range(LAYERS)
    }
    manager.is_pooling_model = manager._is_non_gated_moe = manager.supports_mm = False
    manager._is_moe = manager._use_ep = True
    manager._is_3d_moe_model = "3D" in kind
    manager._enable_mixed_moe_lora_format, manager._enable_moe_shared_loras = mixed, shared
    manager.model = SimpleNamespace(config=SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]))
    names = (
        [f"w{i}" for i in (1, 2, 3)]
        if shared
        else [f"{e}.{p}" for e in range(EXPERTS) for p in PROJECTIONS]
    )
    manager.packed_modules = (
        {} if "3D" in kind else {m: [f"{m}.{name}" for name in names] for m in manager.modules}
    )
    manager.moe_ep_load_spec = manager._build_moe_ep_load_spec()
    return manager


def weights(name: str, a: torch.Tensor, b: torch.Tensor):
    from vllm.lora.lora_weights import LoRALayerWeights

    return LoRALayerWeights(name, RANK, RANK, a.clone(), b.clone())


def adapter(entries: dict, fused: bool = False):
    from vllm.lora.lora_model import LoRAModel

    loras = {name: weights(name, a, b) for name, (a, b) in entries.items()}
    return LoRAModel(1, RANK, loras, is_3d_lora_weight=fused)


def per_expert() -> dict:
    return {
        f"{NAME.format(layer)}.{expert}.{p}": tuple(matrix(layer, expert, p, s) for s in "AB")
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for p in PROJECTIONS
    }


def every(layer: int, projection: str, side: str) -> torch.Tensor:
    """``[experts, ...]``: a projection's matrices of all experts."""
    return torch.stack([matrix(layer, e, projection, side) for e in range(EXPERTS)])


def fused_pair(a: torch.Tensor, b: torch.Tensor):
    """PEFT's form of matrices ``[experts, ...]``: a's experts one after another, b's experts interleaved."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def fused() -> dict:
    found = {}
    for layer in range(LAYERS):
        gate_up_b = torch.cat([every(layer, p, "B") for p in ("gate_proj", "up_proj")], dim=1)
        found[NAME.format(layer) + ".base_layer"] = fused_pair(
            every(layer, "gate_proj", "A"), gate_up_b
        )
        found[NAME.format(layer)] = fused_pair(
            every(layer, "down_proj", "A"), every(layer, "down_proj", "B")
        )
    return found


def shared_outer() -> dict:
    """Gate's and up's A and down's B are one for all experts."""
    found = {}
    for layer in range(LAYERS):
        for i, p in ((1, "gate_proj"), (2, "down_proj"), (3, "up_proj")):
            a, b = every(layer, p, "A"), every(layer, p, "B")
            found[f"{NAME.format(layer)}.w{i}"] = (a, b[:1]) if i == 2 else (a[:1], b)
    return found


VARIANTS = {
    "a tensor per expert": ("FusedMoEWithLoRA", {}, per_expert, False),
    "all experts in one tensor": ("FusedMoE3DWithLoRA", {}, fused, True),
    "all experts in one tensor, other wrapper": ("FusedMoEWithLoRA", {"mixed": True}, fused, True),
    "outer factors shared by all experts": (
        "FusedMoEWithLoRA",
        {"shared": True},
        shared_outer,
        False,
    ),
}


def wrong_slots(variant: str, plan: Placement, rank: int) -> list[tuple[int, int]]:
    """(layer, slot) of this rank whose adapter is not the one of the expert that the plan puts there."""
    kind, how, make, is_fused = VARIANTS[variant]
    manager = manager_of(kind, plan, rank, **how)
    model = adapter(make(), is_fused)
    manager._create_merged_loras_inplace(model)
    wrong = []
    for layer in range(LAYERS):
        name = NAME.format(layer)
        module, packed = manager.modules[name], model.loras[name]
        module.set_lora(0, packed.lora_a, packed.lora_b)
        for slot, expert in enumerate(plan.local_experts(layer, rank).tolist()):
            if not all(
                holds(module, variant, layer, slot, expert, p, s) for p in PROJECTIONS for s in "AB"
            ):
                wrong.append((layer, slot))
    return wrong


def holds(module, variant, layer, slot, expert, projection, side) -> bool:
    kind, how, _, is_fused = VARIANTS[variant]
    part = "w2" if projection == "down_proj" else "w13"
    stacks = getattr(module, f"{part}_lora_{side.lower()}_stacked")
    if kind == "FusedMoEWithLoRA":
        stack = stacks[1 if projection == "up_proj" else 0][0]
        if "shared" in how and (part, side) in (("w13", "A"), ("w2", "B")):
            slot, expert = 0, 0
        found = stack[slot]
    else:
        found = stacks[0][0][slot]
        if part == "w13" and side == "B":
            found = found[WIDTH:] if projection == "up_proj" else found[:WIDTH]
    if is_fused and part == "w13" and side == "A":
        projection = "gate_proj"  # gate and up have one A
    return torch.equal(found, matrix(layer, expert, projection, side).expand_as(found))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_slot_has_its_experts_adapter(variant, plan):
    STATE.settings = make_settings("eplb", plan, 2, lora=True)
    assert [wrong_slots(variant, plan, rank) for rank in range(2)] == [[], []]


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_the_patches_slots_have_other_experts_adapters(variant, patched):
    """The fault that the patches are for; linear has it not."""
    patched.undo()
    STATE.settings = make_settings("zigzag", PLANS["zigzag"], 2, lora=True)
    assert wrong_slots(variant, PLANS["linear"], 1) == []
    # Expert 0 is in slot 0 of both, expert 7 in the last.
    assert wrong_slots(variant, PLANS["zigzag"], 0) == [(n, s) for n in range(2) for s in (1, 2, 3)]
    assert wrong_slots(variant, PLANS["zigzag"], 1) == [(n, s) for n in range(2) for s in (0, 1, 2)]


def test_one_lost_patch_is_seen(patched):
    """A fault in each of the four cuts alone."""
    STATE.settings = make_settings("zigzag", PLANS["zigzag"], 2, lora=True)
    cuts = dict(zip(("lora-per-expert", "lora-stacked", "lora-3d-to-2d", "lora-shared"), VARIANTS))
    for name, variant in cuts.items():
        patch = next(p for p in patched if p.name == name)
        patch.undo()
        assert wrong_slots(variant, PLANS["zigzag"], 0), name
        patch.apply()
        assert not wrong_slots(variant, PLANS["zigzag"], 0)


def test_without_a_placement_vllms_own_cut_stands():
    for variant in VARIANTS:
        assert not wrong_slots(variant, PLANS["linear"], 1)
        assert wrong_slots(variant, PLANS["zigzag"], 1)


def write_adapter(folder, entries: dict):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {
            f"base_model.model.{name}.lora_{side}.weight": tensor.contiguous()
            for name, pair in entries.items()
            for side, tensor in zip("AB", pair)
        },
        folder / "adapter_model.safetensors",
    )
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": [*PROJECTIONS, "q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_each_rank_reads_the_adapters_of_its_experts_and_no_others(tmp_path):
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    path = write_adapter(tmp_path / "adapter", per_expert())
    plan = PLANS["shuffled, another in each layer"]
    STATE.settings = make_settings("eplb", plan, 2, lora=True)
    expected = {"experts", *(f"experts.{e}.{p}" for e in range(EXPERTS) for p in PROJECTIONS)}
    for rank in range(2):
        manager = manager_of("FusedMoEWithLoRA", plan, rank)
        model = LoRAModel.from_local_checkpoint(
            str(path), expected, PEFTHelper.from_local_dir(str(path), None), lora_model_id=1,
            device="cpu", dtype=torch.float32, moe_ep_spec=manager.moe_ep_load_spec,
        )  # fmt: skip
        read = {
            (layer, int(name.split(".experts.")[1].split(".")[0]))
            for layer in range(LAYERS)
            for name in model.loras
            if f"layers.{layer}." in name
        }
        assert read == {(n, e) for n in range(LAYERS) for e in plan.local_experts(n, rank).tolist()}
        manager._create_merged_loras_inplace(model)
        module, packed = manager.modules[NAME.format(1)], model.loras[NAME.format(1)]
        module.set_lora(0, packed.lora_a, packed.lora_b)
        found = module.w2_lora_a_stacked[0][0][:, 0, 0].tolist()
        assert found == [value(1, e, "down_proj", "A") for e in plan.local_experts(1, rank)]


def test_what_cannot_be_told_to_be_remote_is_read():
    from vllm.lora import lora_model

    spec = lora.ExpertsByLayer({0: frozenset({1, 2})})
    remote = lora_model._is_remote_expert_key
    key = "base_model.model.model.layers.{}.mlp.experts.{}.up_proj.lora_A.weight"
    assert [remote(key.format(0, e), spec) for e in range(4)] == [True, False, False, True]
    assert not remote(key.format(1, 0), spec)  # a layer that is not known
    assert not remote("model.layers.0.mlp.experts.w1.lora_A.weight", spec)
    assert not remote("model.layers.0.self_attn.q_proj.lora_A.weight", spec)
    assert not remote("mtp.layers.0.mlp.experts.0.up_proj.lora_A.weight", spec)


def test_the_empty_adapters_of_the_warm_up_fit():
    """Up to 0.32 they have rows for local experts only, which do not divide by all where ranks are uneven."""
    plan = PLANS["uneven"]
    STATE.settings = make_settings("eplb", plan, 2, lora=True)
    for rank, local in enumerate(plan.slots_per_rank):
        manager = manager_of("FusedMoE3DWithLoRA", plan, rank)
        for rows in (local, EXPERTS):
            empty = {
                name: (torch.zeros(rows * RANK, a.shape[-1]), torch.zeros(b.shape[0], rows * RANK))
                for name, (a, b) in fused().items()
            }
            model = adapter(empty, True)
            manager._create_merged_loras_inplace(model)
            for name, module in manager.modules.items():
                module.set_lora(0, model.loras[name].lora_a, model.loras[name].lora_b)


def test_an_adapter_that_does_not_divide_is_refused():
    STATE.settings = make_settings("zigzag", PLANS["zigzag"], 2, lora=True)
    manager = manager_of("FusedMoE3DWithLoRA", PLANS["zigzag"], 0)
    entries = {name: (a[:-1], b) for name, (a, b) in fused().items()}
    with pytest.raises(PlacementError, match="15 rows for 8 experts"):
        manager._create_merged_loras_inplace(adapter(entries, True))


def test_a_slot_without_a_routed_expert_is_refused():
    STATE.settings = make_settings("zigzag", PLANS["zigzag"], 2, lora=True)
    module = lora_layer("FusedMoEWithLoRA", PLANS["zigzag"], 0, 1, False)
    assert lora.experts_of_slots(module) == [1, 3, 5, 7]
    module.base_layer.routed_experts.expert_map_manager.expert_map[3] = -1
    with pytest.raises(PlacementError, match="slot 1 of EP rank 1 holds no routed expert"):
        lora.experts_of_slots(module)


@pytest.mark.parametrize("with_experts", [True, False])
def test_under_eplb_an_adapter_with_experts_is_refused_before_anything_is_overwritten(
    tmp_path, with_experts
):
    """By vLLM's own worker, whose cache of adapters must be what it was."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    attention = {
        f"model.layers.{n}.self_attn.q_proj": (torch.ones(RANK, 4), torch.ones(4, RANK))
        for n in range(LAYERS)
    }
    path = write_adapter(tmp_path / "adapter", attention | (per_expert() if with_experts else {}))
    STATE.settings = make_settings("eplb", None, 2, eplb=True, lora=True)
    done = []

    class Manager:
        """Records what would be overwritten."""

        supported_lora_modules = ["q_proj", "experts"]
        packed_modules_mapping = {
            "experts": [f"experts.{e}.{p}" for e in range(EXPERTS) for p in PROJECTIONS]
        }
        model, moe_ep_load_spec, capacity = SimpleNamespace(), None, 1

        def __getattr__(self, name):
            if name.startswith("_validate"):
                return lambda *args: None
            return lambda *args: done.append(name) or {}

        def __len__(self):
            return 0

    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker._adapter_manager, worker.vocab_size = Manager(), 320
    worker.max_position_embeddings, worker._lora_model_cls = None, lora_model_class()
    worker.lora_config = SimpleNamespace(
        lora_dtype=torch.float32, max_lora_rank=8, bias_enabled=False
    )
    request = LoRARequest("mine", 1, str(path))
    if with_experts:
        with pytest.raises(
            PlacementError, match="adapter mine has weights for experts.*--enable-eplb"
        ):
            worker.add_adapter(request)
        assert done == ["list_adapters"]
    else:
        worker.add_adapter(request)
        assert "add_adapter" in done and "activate_adapter" in done


def lora_model_class():
    from vllm.lora.lora_model import LoRAModel

    return LoRAModel


def test_values_tell_all_matrices_apart():
    """The tests above compare numbers; two matrices with the same one would hide a fault."""
    numbers = [
        value(layer, e, p, s)
        for layer in range(LAYERS)
        for e in range(EXPERTS)
        for p in PROJECTIONS
        for s in "AB"
    ]
    assert len(set(numbers)) == len(numbers)
    assert np.float32(max(numbers)) == max(numbers)
