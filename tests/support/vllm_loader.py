"""Load models with vLLM's own loader on two ranks, and write what lies in every slot.

Two processes are two EP ranks; nothing is computed.

    python -m tests.support.vllm_loader CASES.json FOLDER

A case is {"name", "engine": {EngineArgs' arguments}} and, at will, "switch": names of `SWITCHES`.
What was loaded is in the checkpoint's form: the processing for the kernel is left out, so that
models load whose kernels a CPU has not. FOLDER/NAME.RANK.safetensors holds ``layer/parameter``
tensors and ``layer/experts``; FOLDER/NAME.RANK.error the message where loading was refused.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path


def _without_splitting() -> None:
    """Make it a vLLM whose gpt-oss takes no expert at a time: up to 0.31."""
    from moe_placement_plugin.engines.vllm import stacked

    stacked._splits = lambda model: frozenset()


def _as_stock() -> None:
    """Have models pick rows, and nobody permute them."""
    _without_splitting()
    from moe_placement_plugin.engines.vllm import stacked

    stacked._picks = lambda model: {}


def _half_w13() -> None:
    """Have the loader lose the up projection of every expert."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    original = RoutedExperts.weight_loader

    def weight_loader(
        self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
    ):
        if shard_id == "w3":
            return kwargs.get("return_success", False) or None
        return original(
            self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
        )

    RoutedExperts.weight_loader = weight_loader


def _bias_by_position() -> None:
    """Have a model fill a scale of every slot by itself, past the loader."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from moe_placement_plugin.engines.vllm.layers import routed_layers

    original = DefaultModelLoader.load_weights

    def load_weights(self, model, model_config):
        load = model.load_weights.__func__

        def with_bias(self, weights):
            found = load(self, weights)
            for layer in routed_layers(model).values():
                layer.w2_bias.data[:] = layer.w2_bias.data.roll(1, 0)
            return found

        type(model).load_weights = with_bias
        return original(self, model, model_config)

    DefaultModelLoader.load_weights = load_weights


def _mxfp4_method() -> None:
    """Choose an MXFP4 method without a kernel: vLLM has none for CPUs."""
    from vllm.model_executor.layers.quantization import mxfp4

    backend = mxfp4.Mxfp4MoeBackend.TRITON_UNFUSED
    for name in dir(mxfp4):
        if name.startswith("select_") and "backend" in name:
            setattr(mxfp4, name, lambda *args, **kwargs: (backend, None))


SWITCHES = {
    "without splitting": _without_splitting,
    "as stock": _as_stock,
    "half of w13": _half_w13,
    "bias moved": _bias_by_position,
    "mxfp4 method": _mxfp4_method,
}


def work(rank: int, port: int, cases: list[dict], folder: str) -> None:
    """Load case after case as one EP rank."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_DIST_IDENT=str(port))
    import moe_placement_plugin

    moe_placement_plugin.enable()
    import torch
    from safetensors.torch import save_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model_loader

    from moe_placement_plugin.engines.vllm.layers import routed_layers, slot_experts

    torch.set_num_threads(1)
    base_loader.process_weights_after_loading = lambda *args: None
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker has it
    started = False
    for case in cases:
        at = Path(folder) / f"{case['name']}.{rank}"
        try:
            config = EngineArgs(
                tensor_parallel_size=2,
                enable_expert_parallel=True,
                max_model_len=256,
                enforce_eager=True,
                **{"dtype": "float32", **case["engine"]},
            ).create_engine_config()
            with set_current_vllm_config(config):
                if not started:
                    init_distributed_environment(2, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
                    initialize_model_parallel(2)
                    started = True
                undo = _switch(case.get("switch", ()))
                try:
                    loader = get_model_loader(config.load_config)
                    model = loader.load_model(vllm_config=config, model_config=config.model_config)
                finally:
                    undo()
            tensors = {}
            for name, layer in routed_layers(model).items():
                tensors[f"{name}/experts"] = torch.tensor(slot_experts(layer).tolist())
                for key, param in layer.named_parameters():
                    tensors[f"{name}/{key}"] = param.data.contiguous()
            save_file(tensors, f"{at}.safetensors")
        except BaseException as error:
            Path(f"{at}.error").write_text(
                f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            )


def _switch(names: list[str]):
    """Throw switches; return what undoes all that they have changed."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization import mxfp4
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

    from moe_placement_plugin.engines.vllm import stacked

    touched = (stacked, RoutedExperts, mxfp4, DefaultModelLoader, Qwen3MoeForCausalLM)
    kept = [(owner, dict(vars(owner))) for owner in touched]
    for name in names:
        SWITCHES[name]()

    def undo() -> None:
        for owner, before in kept:
            for key, value in before.items():
                if vars(owner).get(key) is not value:
                    setattr(owner, key, value)

    return undo


def main() -> None:
    import multiprocessing

    cases, folder = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, port, cases, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
