"""Ask vLLM's workers: each function is called in every one of them."""

from __future__ import annotations

import os


def probe(worker) -> dict:
    """Run in every worker: return what the plugin did there."""
    import numpy as np

    try:
        from moe_placement_plugin.engines.vllm.layers import logical_of_physical, routed_layers
        from moe_placement_plugin.engines.vllm.patches import load_set, patch_set
    except ImportError:
        return {}
    model = worker.model_runner.model
    maps = {}
    for name, layer in routed_layers(model).items():
        expert_map = layer.expert_map_manager.expert_map
        maps[name] = None if expert_map is None else np.asarray(expert_map.cpu()).tolist()
    tables = [logical_of_physical(layer).tolist() for layer in routed_layers(model).values()]
    return {
        "pid": os.getpid(),
        "hits": patch_set().hits() | load_set().hits(),
        "maps": maps,
        "tables": tables,
    }


def start_profile(worker) -> None:
    """Run in every worker: count operators from now on."""
    import torch

    worker._test_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    worker._test_profile.__enter__()


def stop_profile(worker) -> dict:
    """Run in every worker: return the number of calls by operator since `start_profile`."""
    worker._test_profile.__exit__(None, None, None)
    return {row.key: row.count for row in worker._test_profile.key_averages()}


def sabotage(worker) -> None:
    """Run in every worker: point every expert at its neighbour's weights.

    So would a wrong expert map.
    """
    from moe_placement_plugin.engines.vllm.layers import routed_layers

    for layer in routed_layers(worker.model_runner.model).values():
        here = layer._expert_map >= 0
        layer._expert_map[here] = layer._expert_map[here].roll(1)


def try_fault(worker, name: str) -> dict:
    """Run in every worker: corrupt one rank's weights, check, put them back, check again.

    Returns:
        {"message": what the check said, None when it saw nothing; "after": the same once all is put
        back}.
    """
    import torch

    from moe_placement_plugin.engines.vllm import verification
    from moe_placement_plugin.engines.vllm.layers import routed_layers
    from tests.support import faults

    layers = list(routed_layers(worker.model_runner.model).values())

    def check() -> str | None:
        try:
            verification.recheck(worker)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    if name == "prepare":
        for layer in layers:
            faults.attach(layer, layer.local_num_experts)
        faults.prepare(dict(layers[2].named_parameters()), 3)
        from moe_placement_plugin.engines.vllm.state import STATE

        verification.verify_loaded(worker.model_runner.model, None, STATE.settings)
        return {"message": check()}
    layer, other = (
        {**dict(one.named_parameters()), **dict(one.named_buffers())}
        for one in (layers[2], layers[1])
    )
    maps = layer["_expert_map"], layers[2].expert_map_manager
    tensors = {n: t for n, t in layer.items() if n.startswith("w")}
    kept = {n: t.detach().clone() for n, t in tensors.items()}
    kept_map = maps[0].clone()
    first = worker.model_runner.model is not None and maps[1].ep_rank == 1
    if first:
        with torch.no_grad():
            if name == "map changed without moving weights":
                here = maps[0] >= 0
                maps[1].expert_map[here] = maps[1].expert_map[here].roll(1)
            elif name == "two ranks claim one expert":
                maps[1].expert_map.copy_(kept_map.roll(1))
            elif name == "tensor as long as the model has experts":
                layers[2].register_buffer("w13_input_scale", torch.arange(30.0), persistent=False)
            elif name == "tensor lost":
                del layers[2]._buffers["w2_bias"]
            else:
                faults.WEIGHT_FAULTS[name](tensors, other, 3, 7)
    message = check()
    if first:
        layers[2]._buffers.pop("w13_input_scale", None)
        layers[2]._buffers["w2_bias"] = tensors["w2_bias"]
        with torch.no_grad():
            maps[1].expert_map.copy_(kept_map)
            for n, tensor in tensors.items():
                tensor.copy_(kept[n])
    return {"message": message, "after": check()}


def slot_digests(worker) -> dict:
    """Run in every worker: return [expert, digests of its weights] of every slot, by layer.

    Read where they are; and whether they are verified.
    """
    from moe_placement_plugin.engines.vllm import verification

    model = worker.model_runner.model
    found = verification.digest_model(model).layers
    return {
        "verified": verification.is_verified(model),
        "layers": {
            str(number): [[int(e), v] for e, v in zip(layer.experts, layer.values.tolist())]
            for number, layer in found.items()
        },
    }


def transfer_from(worker, in_place: bool) -> None:
    """Run in every worker: let a trainer's engine read checkpoints.

    It loads them as vLLM's NCCL engine does or, in place, in a way that nobody knows.
    """
    from safetensors.torch import load_file
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class FromFile(NCCLWeightTransferEngine):
        def update_weights(self, update_info):
            tensors = load_file(update_info["path"])
            names = sorted(tensors)[update_info["part"] :: 2]
            self.model.load_weights((name, tensors[name]) for name in names)

    class InPlace:
        def start_weight_update(self):
            raise AssertionError("an engine of which nobody knows how it writes was started")

        def reset_weight_update_target(self):
            pass

    config = WeightTransferConfig(backend="nccl")
    made = object.__new__(InPlace if in_place else FromFile)
    made.config, made.model_config = config, worker.vllm_config.model_config
    made.model = made._default_model = worker.model_runner.get_model()
    made._default_model_config = made.model_config
    # vLLM hands out a wrapper, which passes on what is read and keeps what is set.
    getattr(worker, "worker", worker).weight_transfer_engine = made
