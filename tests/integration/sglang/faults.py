"""Spoil expert weights of SGLang: what the fingerprints must notice. Only tests load it.

`install` makes SGLang find it. Faults of a serving engine are asked for through the weight checker,
action ``fault:NAME``, and taken back by ``restore``; the variable ``MOE_PLACEMENT_FAULT`` names a
fault of the start-up.

Every fault hits layer `LAYER` of EP rank 1, and of its last MoE-TP rank where experts are cut.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.sglang import start_faults
from tests.integration.sglang.start_faults import LAYER, REPLICA
from tests.support.sglang_plugin import install_plugin

VARIABLE = "MOE_PLACEMENT_FAULT"
SLOT, OTHER = 3, 5
"""Where the faults are: this slot of rank 1, and another slot where a fault needs two."""


def install(folder: Path) -> str:
    """Have SGLang load this module; return the PYTHONPATH with which it does."""
    return install_plugin(folder, "moe_placement_faults", "tests.integration.sglang.faults")


def register() -> None:
    """Hang the fault that is asked for onto SGLang; it calls this in every process."""
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    fault = os.environ.get(VARIABLE, "")
    if fault == "hook-lost":
        start_faults.lose_a_hook(HookRegistry)
        return
    hooks = {"": SERVING} | {name: {target: hook} for name, (target, hook) in STARTING.items()}
    if fault not in hooks:
        raise ValueError(fault)
    for target, hook in hooks[fault].items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _attach(original: Callable, self: Any, layer: Any) -> None:
    """Attach what quantization methods attach, in every form in which they do.

    Among them are a zero and a NaN; they are the same for all replicas of an expert.
    """
    import torch

    original(self, layer)
    layer.w13_weight.data[:, 0, 0] = 0.0
    layer.w13_weight.data[:, 0, 1] = float("nan")
    one = layer.w13_weight.detach()[:, 1, 1].clone()
    layer.w13_scale = torch.nn.Parameter(one[:, None].repeat(1, 4), requires_grad=False)
    layer.register_buffer("w2_zero_point", (one * 1e4).to(torch.int32))
    layer.w2_bias = one[:, None].repeat(1, 8)
    self.alphas = one


def _layers(model: Any) -> dict[int, Any]:
    from moe_placement_plugin.engines.sglang.layers import expert_layers

    return {layer.layer_id: layer for layer in expert_layers(model).values()}


_saved: list[tuple[Any, Any]] = []
_lost: dict[str, Any] = {}


def _check_weights(original: Callable, self: Any, action: str, *args: Any, **kwargs: Any) -> Any:
    if action == "restore":
        for tensor, value in _saved:
            tensor.copy_(value)
        _saved.clear()
        parameters = _layers(self.model)[LAYER]._parameters
        parameters.pop("w2_global_scale", None)
        parameters.update(_lost)
        _lost.clear()
    elif action.startswith("fault:"):
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        layers, metadata = _layers(self.model), get_global_expert_location_metadata()
        layer = layers[LAYER]
        here = layer.moe_ep_rank == 1 and layer.moe_tp_rank == layer.moe_tp_size - 1
        tables = [getattr(metadata, name) for name in vars(metadata) if "map" in name]
        tensors = [
            layer.w13_weight.data,
            layer.w2_weight.data,
            layer.w13_scale.data,
            layer.w2_zero_point,
            layer.w2_bias,
        ]
        for tensor in [
            *tensors,
            layer.quant_method.alphas,
            *filter(lambda t: t is not None, tables),
        ]:
            _saved.append((tensor, tensor.clone()))
        fault = action.partition(":")[2]
        if fault in EVERYWHERE:
            EVERYWHERE[fault](self, metadata)
        elif here:
            FAULTS[fault](layer, layers)
    else:
        return original(self, action, *args, **kwargs)
    return None


def _word(name: str, change: Callable[[int], int]) -> Callable[[Any, Any], None]:
    import torch

    def spoil(layer: Any, layers: Any) -> None:
        words = getattr(layer, name).data[SLOT].view(torch.int32).view(-1)
        words[-1] = change(int(words[-1]))

    return spoil


def _slots(change: Callable[..., None]) -> Callable[[Any, Any], None]:
    def spoil(layer: Any, layers: Any) -> None:
        for tensor in (layer.w13_weight.data, layer.w2_weight.data):
            change(tensor)

    return spoil


def _garbage(tensor: Any) -> None:
    import torch

    tensor[SLOT] = torch.randn(tensor[SLOT].shape, generator=torch.Generator().manual_seed(1))
    tensor[SLOT].view(-1)[:3] = float("nan")


def _set(tensor: Any, value: Any) -> None:
    tensor.copy_(value.clone())


def _halves(layer: Any, layers: Any) -> None:
    _set(
        layer.w13_weight.data[SLOT],
        layer.w13_weight.data[SLOT].roll(layer.w13_weight.shape[1] // 2, 0),
    )


def _rows(layer: Any, layers: Any) -> None:
    weights = layer.w2_weight.data[SLOT]
    weights[1], weights[2] = weights[2].clone(), weights[1].clone()


def _swap(tensor: Any) -> None:
    tensor[SLOT], tensor[OTHER] = tensor[OTHER].clone(), tensor[SLOT].clone()


def _negative_zero(layer: Any, layers: Any) -> None:
    layer.w13_weight.data[SLOT, 0, 0] = -0.0


def _another_nan(layer: Any, layers: Any) -> None:
    import torch

    layer.w13_weight.data[SLOT, 0, 1:2].view(torch.int32).bitwise_xor_(8)


def _lose(layer: Any, layers: Any) -> None:
    _lost["w13_scale"] = layer._parameters.pop("w13_scale")


def _of_another_layer(layer: Any, layers: Any) -> None:
    for name in ("w13_weight", "w2_weight"):
        getattr(layer, name).data[SLOT] = getattr(layers[LAYER - 1], name).data[SLOT]


def _rounded(tensor: Any) -> None:
    import torch

    tensor[SLOT] = tensor[SLOT].to(torch.bfloat16).to(tensor.dtype)


def _global_scale(layer: Any, layers: Any) -> None:
    import torch

    layer.w2_global_scale = torch.nn.Parameter(torch.arange(32.0), requires_grad=False)


def _attached(name: str) -> Callable[[Any, Any], None]:
    def spoil(layer: Any, layers: Any) -> None:
        tensor = layer.quant_method.alphas if name == "alphas" else getattr(layer, name).data
        tensor[SLOT] = tensor[OTHER]

    return spoil


FAULTS: dict[str, Callable[[Any, Any], None]] = {
    "one bit of w13 flipped": _word("w13_weight", lambda word: word ^ 1),
    "one bit of w2 flipped": _word("w2_weight", lambda word: word ^ (1 << 20)),
    "sign of a zero": _negative_zero,
    "another NaN": _another_nan,
    "slot zeroed (a replica never filled)": _slots(lambda t: t[SLOT].zero_()),
    "slot of garbage with NaN": _slots(_garbage),
    "two slots exchanged": _slots(_swap),
    "another expert's weights": _slots(lambda t: _set(t[SLOT], t[OTHER])),
    "gate and up halves exchanged": _halves,
    "two rows exchanged": _rows,
    "shifted by one element": _slots(
        lambda t: _set(t[SLOT], t[SLOT].flatten().roll(1).view_as(t[SLOT]))
    ),
    "w2 transposed": lambda layer, layers: _set(
        layer.w2_weight.data[SLOT], layer.w2_weight.data[SLOT].T
    ),
    "w13 moved without w2": lambda layer, layers: _set(
        layer.w13_weight.data[SLOT], layer.w13_weight.data[OTHER]
    ),
    "the expert of another layer": _of_another_layer,
    "rounded through bfloat16": _slots(_rounded),
    "all slots of the rank moved on by one": _slots(lambda t: _set(t, t.roll(1, 0))),
    "scaled twice": _slots(lambda t: t[SLOT].mul_(2)),
    "scale of another slot": _attached("w13_scale"),
    "zero point of another slot": _attached("w2_zero_point"),
    "bias (a plain attribute) of another slot": _attached("w2_bias"),
    "what the kernel keeps beside the layer": _attached("alphas"),
    "scale lost on one rank": _lose,
    "globally sized tensor indexed locally (PR 8398)": _global_scale,
}
"""Name -> what happens to the weights of one rank."""


def _new_map(runner: Any, metadata: Any, change: Callable[[Any], None]) -> None:
    """Update all of SGLang's tables by another map of slots, as it does; no weight moves."""
    from moe_placement_plugin.engines.sglang import compat

    table = metadata.physical_to_logical_map.clone()
    change(table[LAYER])
    make = type(metadata).init_by_mapping
    more = {"server_args": runner.server_args} if compat.takes_server_args(make) else {}
    metadata.update(
        make(
            model_config=runner.model_config, physical_to_logical_map=table, moe_ep_rank=0, **more
        ),
        [LAYER],
    )


def _exchanged(row: Any) -> None:
    at = [len(row) // 2 + SLOT, len(row) // 2 + OTHER]
    row[at] = row[at[::-1]].clone()


def _one_less(row: Any) -> None:
    row[len(row) // 2 + SLOT] = row[len(row) // 2 + OTHER]


def _routing_alone(runner: Any, metadata: Any) -> None:
    for name in ("logical_to_all_physical_map", "logical_to_all_physical_map_cpu"):
        table = getattr(metadata, name)
        table[LAYER, 0, 0] = table[LAYER, 1, 0]


EVERYWHERE: dict[str, Callable[[Any, Any], None]] = {
    "map changed, weights not moved": lambda runner, metadata: _new_map(
        runner, metadata, _exchanged
    ),
    "map leaves an expert out": lambda runner, metadata: _new_map(runner, metadata, _one_less),
    "routing table alone changed": _routing_alone,
    "table of slots alone changed": lambda runner, metadata: _exchanged(
        metadata.physical_to_logical_map_cpu[LAYER]
    ),
}
"""Name -> what happens to SGLang's own tables, on every rank."""


_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"
_LOADED = (
    "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.process_weights_after_loading"
)

SERVING = {
    "sglang.srt.model_executor.model_runner.ModelRunner.check_weights": _check_weights,
    _LOADED: _attach,
}
"""Target -> hook of an engine that serves."""

STARTING = {
    "wrong-everywhere": (
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator",
        start_faults.wrong_names,
    ),
    "replica-left-out": (
        f"{_MOE}._map_global_expert_id_to_local_expert_id",
        start_faults.leave_out,
    ),
    "replica-of-another": (_LOADED, start_faults.fill_with_another),
    "past-the-loader": (f"{_MOE}._weight_loader_physical", start_faults.write_past_the_loader),
}
"""Fault of the start-up -> target and hook."""

__all__ = ["EVERYWHERE", "FAULTS", "LAYER", "OTHER", "REPLICA", "SLOT", "VARIABLE", "install"]
