"""Checkpoints made on the machine, with routers whose load follows a recorded one.

Nothing is downloaded. Dimension 0 of the residual stream is the same for every token and no layer writes to it, so that the gate's first
column is a bias per expert in any architecture; it is fitted until the experts that the embeddings choose follow the wanted
shares. Attention and experts add a little context to it, so what is really served is recorded and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .... import ExpertLoad, PlacementError
from ...demo.tiny_models import Size, glm4_moe_config, qwen3_moe_config
from ...staged_layer import Routing, select_experts

CONSTANT = 2.0
"""Dimension 0 of every embedding; the others have variance 1."""


@dataclass(frozen=True)
class Model:
    """A model's shape.

    Attributes:
        size: widths and number of layers; for grouped models layer 0 is dense.
        experts: routed experts per layer.
        top_k: experts per token.
        groups: expert groups, half of which a token may use; 0 for a model without.
    """

    size: Size
    experts: int
    top_k: int
    groups: int = 0

    @property
    def moe_layers(self) -> range:
        """Ids of the MoE layers."""
        return range(1 if self.groups else 0, self.size.layers)

    def cut(self, layers: int | None) -> Model:
        """The same model with fewer layers.

        Raises:
            PlacementError: when it has no MoE layer then.
        """
        if layers is None:
            return self
        made = replace(self, size=replace(self.size, layers=layers))
        if not made.moe_layers:
            raise PlacementError(
                f"--layers {layers}: no MoE layer is left; give at least {self.moe_layers.start + 1}"
            )
        return made

    def cache_bytes(self, tokens: int, ranks: int, itemsize: int) -> int:
        """Keys and values of ``tokens`` tokens on each of ``ranks`` GPUs, in bytes.

        With data-parallel attention a rank has a share of the tokens and all heads of each: as many bytes, while heads divide.
        """
        return (
            tokens
            * self.size.layers
            * 2
            * max(1, self.size.kv_heads // ranks)
            * self.size.head_dim
            * itemsize
        )

    def routing(self, device: str = "cpu") -> Routing:
        """The model's rule, without a correction bias: the gate has one."""
        if self.groups:
            zero = torch.zeros(self.experts, device=device)
            return Routing(
                self.experts,
                self.top_k,
                "sigmoid",
                True,
                self.groups,
                self.groups // 2,
                correction_bias=zero,
            )
        return Routing(self.experts, self.top_k)

    def config(self) -> dict:
        """config.json."""
        if self.groups:
            return glm4_moe_config(self.size, self.experts, self.groups, self.top_k)
        return qwen3_moe_config(self.size, self.experts, self.top_k)


MODELS = {
    # DeepSeek-V2-Lite's MoE layer with eight groups of experts, in GLM-4-MoE's architecture, which both engines serve with any attention kernel.
    "v2-lite": Model(Size(2048, 1408, 16, 16, 4, 128, 8192), 64, 6, 8),
    "qwen3-30b-a3b": Model(Size(2048, 768, 16, 32, 4, 128, 8192), 128, 8),
    "tiny-grouped": Model(Size(64, 64, 3, 4, 2, 32, 512), 32, 4, 4),
    "tiny": Model(Size(64, 64, 3, 4, 2, 32, 512), 32, 4),
}
"""``tiny`` ones are for machines without a GPU."""


def wanted_shares(load: ExpertLoad | None, model: Model) -> np.ndarray:
    """Share of the choices that each expert shall get, float64 ``[MoE layers, experts]``, from layers and experts of a recorded load in order.

    No expert gets more than nine tenths of what one can: a token chooses it once. None for an even load.

    Raises:
        PlacementError: when the load has fewer layers or experts than the model.
    """
    layers = len(model.moe_layers)
    if load is None:
        return np.full((layers, model.experts), 1 / model.experts)
    load = load.moe_layers()
    if load.num_layers < layers or load.num_experts < model.experts:
        raise PlacementError(
            f"a load of {load.num_layers} layers x {load.num_experts} experts for {layers} x {model.experts}: record a model at least as large"
        )
    rows = np.linspace(0, load.num_layers - 1, layers).astype(int)
    shares = load.total[rows, : model.experts] + 1.0
    for _ in range(20):
        shares = np.minimum(shares / shares.sum(axis=1, keepdims=True), 0.9 / model.top_k)
    return shares / shares.sum(axis=1, keepdims=True)


def fit_bias(
    noise: torch.Tensor, shares: torch.Tensor, routing: Routing, steps: int = 150
) -> tuple[torch.Tensor, torch.Tensor]:
    """A bias per expert that makes the choices follow ``shares``.

    Args:
        noise: logits without bias, ``[tokens, experts]``.
        shares: wanted, ``[experts]``.
        routing: the model's rule.
        steps: of the iteration.

    Returns:
        (bias, share reached), each ``[experts]``.
    """
    bias, best = torch.log(shares / shares.mean()), (torch.inf, None, None)
    floor = 1 / noise.shape[0]
    for step in range(steps):
        chosen, _ = select_experts(noise + bias, routing)
        reached = (
            torch.bincount(chosen.flatten(), minlength=len(shares)).to(shares) / chosen.numel()
        )
        apart = float((reached - shares).abs().sum())
        if apart < best[0]:
            best = apart, bias.clone(), reached
        if apart < 0.005:
            break
        rate = 0.5 / (1 + step / 30)
        bias = bias + rate * torch.log((shares + floor) / (reached + floor))
        bias = bias - bias.mean()
    return best[1], best[2]


GATE = ".mlp.gate.weight"
GATES = "gates.safetensors"
"""The routers are in a file of their own, the only one in which a model and its even twin differ."""

WRITERS = 4
"""Layers that are written at once: a layer takes longer to copy from the GPU and to write than to draw."""

MADE = "made.json"
"""What a checkpoint was made of."""


def write(
    path: Path,
    model: Model,
    load: ExpertLoad | None,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> dict:
    """Write a checkpoint, a file per layer and one for all routers; the very same one that is there from before is kept.

    Returns:
        {"shares": wanted, "reached": by the embeddings}, float ``[MoE layers, experts]`` each, as lists.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = model.config() | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    shares = wanted_shares(load, model)
    made = path / MADE
    what = {"config": config, "device": device, "seed": seed, "shares": shares.tolist()}
    if made.exists():
        before = json.loads(made.read_text())
        if {key: before.get(key) for key in what} == what:
            return {"shares": before["shares"], "reached": before["reached"]}
        made.unlink()
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    _write_tokenizer(path, model.size.vocab)
    index: dict[str, str] = {}
    gates: dict[str, torch.Tensor] = {}
    reached = []
    with ThreadPoolExecutor(WRITERS) as pool:
        writing: list[Future] = []
        for number, (tensors, found) in enumerate(_files(model, shares, device, seed)):
            gates |= {key: tensors.pop(key) for key in list(tensors) if key.endswith(GATE)}
            name = f"model-{number:05d}.safetensors"
            writing.append(pool.submit(_save, tensors, dtype, path / name))
            index |= dict.fromkeys(tensors, name)
            if found is not None:
                reached.append(found.tolist())
            if number >= WRITERS:  # no more layers than that wait in memory
                writing[number - WRITERS].result()
        for one in writing:
            one.result()
    _save(gates, dtype, path / GATES)
    index |= dict.fromkeys(gates, GATES)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    made.write_text(json.dumps(what | {"reached": reached}))  # last: half a checkpoint is made anew
    return {"shares": shares.tolist(), "reached": reached}


def write_even_twin(path: Path, of: Path, model: Model, device: str) -> None:
    """What a perfect balance would make of a model that `write` wrote: all its files but the routers', which load all experts alike.

    Args:
        path: of the twin; the other files are links to those of ``of``, since a model may be tens of gigabytes.
        of: the model.
        model: its shape.
        device: where the routers are fitted.
    """
    path.mkdir(parents=True, exist_ok=True)
    for file in of.iterdir():
        if file.name not in (GATES, MADE):
            (path / file.name).unlink(missing_ok=True)
            (path / file.name).symlink_to(file.resolve())
    normal = _normal(
        load_file(of / "model-00000.safetensors", device)["model.embed_tokens.weight"].float()
    )
    even = torch.from_numpy(wanted_shares(None, model)).float().to(device)
    gates = load_file(of / GATES, device)
    for (key, gate), row in zip(
        sorted(gates.items(), key=lambda item: int(item[0].split(".")[2])), even
    ):
        gates[key] = _fitted(
            gate.float() * (torch.arange(gate.shape[1], device=device) > 0),
            normal,
            row,
            model.routing(device),
        )[0].to(gate.dtype)
    _save(gates, next(iter(gates.values())).dtype, path / GATES)


def _save(tensors: dict[str, torch.Tensor], dtype: torch.dtype, path: Path) -> None:
    found = {
        k: t.to(dtype).cpu().clone(memory_format=torch.contiguous_format)
        for k, t in tensors.items()
    }
    save_file(found, path, metadata={"format": "pt"})


def _normal(embedding: torch.Tensor) -> torch.Tensor:
    """What RMSNorm makes of the embeddings."""
    return embedding / embedding.square().mean(dim=1, keepdim=True).sqrt()


def _fitted(
    gate: torch.Tensor, normal: torch.Tensor, shares: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the gate ``[experts, hidden]`` with a bias in column 0, which was zero; the share of each expert)."""
    bias, found = fit_bias(normal @ gate.T, shares, routing)
    gate[:, 0] = bias.to(gate) / float(normal[:, 0].mean())
    return gate, found


def _files(
    model: Model, shares: np.ndarray, device: str, seed: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor | None]]:
    size = model.size
    generator = torch.Generator(device).manual_seed(seed)

    # Dimension 0 of the residual stream carries the routers' bias. What else read it would write something that all tokens share,
    # which shifts the next routers; what wrote it would change the bias.
    def reads(rows: int, gain: float) -> torch.Tensor:
        tensor = (
            torch.randn(rows, size.hidden, generator=generator, device=device)
            * gain
            / size.hidden**0.5
        )
        tensor[:, 0] = 0
        return tensor

    def writes(columns: int, gain: float) -> torch.Tensor:
        tensor = (
            torch.randn(size.hidden, columns, generator=generator, device=device)
            * gain
            / columns**0.5
        )
        tensor[0] = 0
        return tensor

    def dense(prefix: str, width: int, gain: float) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": reads(width, 1.0),
            f"{prefix}.up_proj.weight": reads(width, 1.0),
            f"{prefix}.down_proj.weight": writes(width, gain),
        }

    embedding = torch.randn(size.vocab, size.hidden, generator=generator, device=device)
    embedding[:, 0] = CONSTANT
    ones = torch.ones(size.hidden)
    yield (
        {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": ones,
            "lm_head.weight": reads(size.vocab, 4.0),
        },
        None,
    )
    normal = _normal(embedding)
    heads, kv_heads = size.heads * size.head_dim, size.kv_heads * size.head_dim
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.self_attn.q_proj.weight": reads(heads, 1.0),
            f"{prefix}.self_attn.k_proj.weight": reads(kv_heads, 1.0),
            f"{prefix}.self_attn.v_proj.weight": reads(kv_heads, 1.0),
            f"{prefix}.self_attn.o_proj.weight": writes(heads, 0.3),
            f"{prefix}.self_attn.q_norm.weight": torch.ones(size.head_dim),
            f"{prefix}.self_attn.k_norm.weight": torch.ones(size.head_dim),
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.post_attention_layernorm.weight": ones,
        }
        if layer not in model.moe_layers:
            yield tensors | dense(f"{prefix}.mlp", 2 * size.expert, 0.3), None
            continue
        gate = reads(model.experts, 1.0)
        row = torch.from_numpy(shares[layer - model.moe_layers.start]).float().to(device)
        tensors[prefix + GATE], found = _fitted(gate, normal, row, model.routing(device))
        if model.groups:
            tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = torch.zeros(model.experts)
            tensors |= dense(f"{prefix}.mlp.shared_experts", size.expert, 0.3)
        for expert in range(model.experts):
            tensors |= dense(f"{prefix}.mlp.experts.{expert}", size.expert, 0.5)
        yield tensors, found


SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")


def _write_tokenizer(path: Path, vocab: int) -> None:
    """A word is a token: ``w17`` is token 17. The first four are special ones, which must not be the beginning of a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[3])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    special = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768, **special}
        )
    )
