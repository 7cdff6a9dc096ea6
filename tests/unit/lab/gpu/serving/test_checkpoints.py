"""Test checkpoints whose routers follow a load, and the shapes that they are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are made with torch")

from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from moe_placement_plugin import ExpertLoad, PlacementError  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.checkpoints import (  # noqa: E402
    GATES,
    MADE,
    fit_bias,
    write,
    write_even_twin,
)
from moe_placement_plugin.lab.gpu.serving.models import MODELS, wanted_shares  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.traffic import Workload  # noqa: E402
from moe_placement_plugin.lab.staged_layer import select_experts  # noqa: E402

from .stand_ins import skewed  # noqa: E402


@pytest.mark.parametrize("name", ["tiny", "tiny-grouped"])
def test_the_router_follows_the_load_and_its_twin_is_even(name, tmp_path):
    model = MODELS[name]
    made = write(tmp_path / "model", model, skewed(4, 40), torch.float32, "cpu")
    write_even_twin(tmp_path / "even", tmp_path / "model", model, "cpu")
    wanted, reached = np.array(made["shares"]), np.array(made["reached"])
    assert (
        wanted.shape == (len(model.moe_layers), model.experts)
        and np.abs(wanted - reached).sum(axis=1).max() < 0.03
    )
    assert wanted.max() * model.experts > 2, "the load is not skewed"
    tensors = {}
    for folder in ("model", "even"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())[
            "weight_map"
        ]
        tensors[folder] = {}
        for key, file in index.items():
            with safe_open(tmp_path / folder / file, "pt") as handle:
                tensors[folder][key] = handle.get_tensor(key)
    same = {
        key for key in tensors["model"] if torch.equal(tensors["model"][key], tensors["even"][key])
    }
    assert tensors["model"].keys() - same == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in model.moe_layers
    }
    assert {file.name for file in (tmp_path / "even").iterdir() if not file.is_symlink()} == {GATES}
    even = shares_in_a_forward_pass(tmp_path / "even", model)
    assert even.max() * model.experts < 1.5 and even.min() * model.experts > 0.6, even
    tokens = Workload(3, 40, 1, 1).prompts(model.size.vocab, 0)
    words = [" ".join(f"w{token}" for token in prompt) for prompt in tokens]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(words).input_ids == tokens
    # Nothing writes to the dimension that carries the bias, and nothing but the routers reads it.
    assert all(
        not t[0].any()
        for k, t in tensors["model"].items()
        if k.endswith(("o_proj.weight", "down_proj.weight"))
    )
    readers = (
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "gate_proj.weight",
        "up_proj.weight",
        "lm_head.weight",
    )
    assert all(not t[:, 0].any() for k, t in tensors["model"].items() if k.endswith(readers))
    served = shares_in_a_forward_pass(tmp_path / "model", model)
    apart = np.abs(served - wanted).sum(axis=1) / 2
    assert apart.max() < 0.1, f"served shares are {apart} apart from the wanted ones"


def test_the_same_checkpoint_is_kept_and_any_other_made_anew(tmp_path):
    model, load = MODELS["tiny"], skewed(4, 40)
    made = write(tmp_path, model, load, torch.float32, "cpu")

    def written():
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}

    first = written()
    assert write(tmp_path, model, load, torch.float32, "cpu") == made and written() == first
    for other in (
        {"load": None},
        {"dtype": torch.bfloat16},
        {"seed": 1},
        {"model": MODELS["tiny-grouped"]},
    ):
        before = written()
        write(
            **(
                {
                    "path": tmp_path,
                    "model": model,
                    "load": load,
                    "dtype": torch.float32,
                    "device": "cpu",
                }
                | other
            )
        )
        assert all(time != before.get(name) for name, time in written().items()), other
    (tmp_path / MADE).unlink()  # as of one that was not finished
    before = written()
    write(tmp_path, model, load, torch.float32, "cpu")
    assert all(time != before.get(name) for name, time in written().items())


def shares_in_a_forward_pass(path, model) -> np.ndarray:
    """Return what routers choose when prompts run through all layers.

    Shape: ``[MoE layers, experts]``.
    """
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: dict[int, list] = {}
    for layer in model.moe_layers:
        gate = net.model.layers[layer].mlp.gate

        def look(module, inputs, layer=layer, gate=gate):
            logits = inputs[0].reshape(-1, model.size.hidden) @ gate.weight.T
            seen[layer] = torch.bincount(
                select_experts(logits, model.routing())[0].flatten(), minlength=model.experts
            ).numpy()

        gate.register_forward_pre_hook(look)
    words = np.random.default_rng(0).integers(4, model.size.vocab, (64, 64))
    with torch.no_grad():
        net(torch.from_numpy(words))
    counts = np.array([seen[layer] for layer in model.moe_layers])
    return counts / counts.sum(axis=1, keepdims=True)


def test_shares_stay_within_what_a_token_can_choose():
    model = MODELS["tiny"]
    one_hot = ExpertLoad(np.eye(1, model.experts, dtype=np.int64).repeat(3, axis=0) * 10**6)
    shares = wanted_shares(one_hot, model)
    assert shares.max() <= 0.9 / model.top_k * 1.01 and shares.sum(axis=1) == pytest.approx(1)
    noise = torch.randn(4096, model.experts)
    bias, reached = fit_bias(noise, torch.from_numpy(shares[0]).float(), model.routing())
    chosen, _ = select_experts(noise + bias, model.routing())
    assert (
        torch.bincount(chosen.flatten(), minlength=model.experts).tolist()
        == (reached * chosen.numel()).round().long().tolist()
    )
    with pytest.raises(PlacementError, match="record a model at least as large"):
        wanted_shares(skewed(2, 8), model)


def test_a_models_cache_is_what_its_heads_on_a_rank_need():
    model = MODELS["qwen3-30b-a3b"]
    assert [model.cache_bytes(81920, ranks, 2) >> 20 for ranks in (2, 4, 8)] == [1280, 640, 640]
    assert (
        model.cut(None) is model
        and list(model.cut(2).moe_layers) == [0, 1]
        and list(MODELS["v2-lite"].cut(2).moe_layers) == [1]
    )
    with pytest.raises(PlacementError, match="--layers 1: no MoE layer is left; give at least 2"):
        MODELS["v2-lite"].cut(1)
