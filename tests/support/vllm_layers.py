"""Make MoE layers of vLLM with parameters and an expert map: no engine, no group."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from moe_placement_plugin.engines.vllm import layers, reload

EXPERTS, WIDTH = 6, 4


class Manager:
    """Give one rank's experts as ``ExpertMapManager`` gives them."""

    num_fused_shared_experts = 0

    def __init__(self, mine: list[int], rank: int = 0, physical: int = EXPERTS):
        self.ep_rank, self.ep_size, self.global_num_experts = rank, 2, physical
        self.expert_map = torch.full((physical,), -1, dtype=torch.int32)
        self.expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)

    def map_global_to_local(self, expert: int) -> int:
        return int(self.expert_map[expert])


def layer_of(mine: list[int], rank: int = 0, physical: int = EXPERTS, bias: bool = False):
    """Make a ``RoutedExperts`` with parameters and nothing else."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    slots = len(mine)
    layer.layer_name, layer.local_num_experts = "model.layers.0.mlp.experts", slots
    layer.expert_map_manager = Manager(mine, rank, physical)
    layer.quant_method, layer.quant_config = SimpleNamespace(), None
    layer._fused_shared_expert_quantizer, layer._loaded_expert_biases = None, set()
    layer.moe_config = SimpleNamespace(
        num_logical_experts=EXPERTS,
        is_act_and_mul=True,
        tp_rank=0,
        tp_shard_with_padding=False,
        moe_parallel_config=SimpleNamespace(tp_size=1, tp_rank=0),
    )
    shapes = {"w13_weight": (2 * WIDTH, WIDTH), "w2_weight": (WIDTH, WIDTH)}
    shapes |= {"w2_bias": (WIDTH,)} if bias else {}
    for name, shape in shapes.items():
        layer.register_parameter(name, torch.nn.Parameter(torch.zeros(slots, *shape), False))
    return layer


def weights(seed: int = 0) -> dict[tuple[int, str], torch.Tensor]:
    torch.manual_seed(seed)
    return {(e, s): torch.randn(WIDTH, WIDTH) for e in range(EXPERTS) for s in ("w1", "w2", "w3")}


def load(layer, checkpoint, experts=range(EXPERTS), shards=("w1", "w2", "w3")) -> None:
    for expert in experts:
        for shard in shards:
            name = "w2_weight" if shard == "w2" else "w13_weight"
            layer.weight_loader(
                getattr(layer, name), checkpoint[expert, shard], f"x.{name}", shard, expert
            )


def eplb_layer(table: list[int], rank: int):
    """Make a layer of which EPLB has moved experts: 6 experts, 8 slots, 4 a rank."""
    layer = layer_of(list(range(4 * rank, 4 * rank + 4)), rank, physical=8)
    state = SimpleNamespace(physical_to_logical_map=torch.tensor([table]))
    object.__setattr__(layer, layers.EPLB_ROW, (state, 0))
    return layer


class Model(torch.nn.Module):
    """Hold one MoE layer, as far as updates look at a model."""

    def __init__(self, layer):
        super().__init__()
        self.experts = layer


def served(layer):
    model = Model(layer)
    object.__setattr__(model, reload._UPDATES, reload.Updates())
    return model
