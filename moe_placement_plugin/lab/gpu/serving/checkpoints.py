"""Make checkpoints on the machine, with routers whose load follows a recorded one.

Nothing is downloaded. Dimension 0 of the residual stream is the same for every token and no layer
writes to it, so that the gate's first column is a bias per expert in any architecture; it is fitted
until the experts that the embeddings choose follow the wanted shares. Attention and experts add a
little context to it, so what is really served is recorded and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .... import ExpertLoad
from ...staged_layer import Routing, select_experts
from .models import Model, wanted_shares

Tensors = dict[str, torch.Tensor]

CONSTANT = 2.0
"""Dimension 0 of every embedding; the others have variance 1."""


def fit_bias(
    noise: torch.Tensor, shares: torch.Tensor, routing: Routing, steps: int = 150
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a bias per expert that makes the choices follow ``shares``.

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
"""The routers' file, the only one in which a model and its even twin differ."""

WRITERS = 4
"""Layers that are written at once.

A layer takes longer to copy from the GPU and to write than to draw.
"""

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
    """Write a checkpoint, a file per layer and one for all routers.

    The very same one that is there from before is kept.

    Returns:
        {"shares": wanted, "reached": by the embeddings}, float ``[MoE layers, experts]`` each, as
        lists.
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
    gates: Tensors = {}
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
    """Write what a perfect balance would make of a model that `write` wrote.

    All its files but the routers', which load all experts alike.

    Args:
        path: of the twin; the other files are links to those of ``of``, since a model may be tens
            of gigabytes.
        of: the model.
        model: its shape.
        device: where the routers are fitted.
    """
    path.mkdir(parents=True, exist_ok=True)
    for file in of.iterdir():
        if file.name not in (GATES, MADE):
            (path / file.name).unlink(missing_ok=True)
            (path / file.name).symlink_to(file.resolve())
    first = load_file(of / "model-00000.safetensors", device)
    normal = _normal(first["model.embed_tokens.weight"].float())
    even = torch.from_numpy(wanted_shares(None, model)).float().to(device)
    gates = load_file(of / GATES, device)
    in_order = sorted(gates.items(), key=lambda item: int(item[0].split(".")[2]))
    for (key, gate), row in zip(in_order, even):
        without_bias = gate.float() * (torch.arange(gate.shape[1], device=device) > 0)
        fitted, _ = _fitted(without_bias, normal, row, model.routing(device))
        gates[key] = fitted.to(gate.dtype)
    _save(gates, next(iter(gates.values())).dtype, path / GATES)


def _save(tensors: Tensors, dtype: torch.dtype, path: Path) -> None:
    found = {
        k: t.to(dtype).cpu().clone(memory_format=torch.contiguous_format)
        for k, t in tensors.items()
    }
    save_file(found, path, metadata={"format": "pt"})


def _normal(embedding: torch.Tensor) -> torch.Tensor:
    """Return what RMSNorm makes of the embeddings."""
    return embedding / embedding.square().mean(dim=1, keepdim=True).sqrt()


def _fitted(
    gate: torch.Tensor, normal: torch.Tensor, shares: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gate ``[experts, hidden]`` with a bias in column 0, and each expert's share.

    The column was zero.
    """
    bias, found = fit_bias(normal @ gate.T, shares, routing)
    gate[:, 0] = bias.to(gate) / float(normal[:, 0].mean())
    return gate, found


class _Drawing:
    """Draw a model's tensors, layer by layer.

    Dimension 0 of the residual stream carries the routers' bias. What else read it would write
    something that all tokens share, which shifts the next routers; what wrote it would change the
    bias.

    Args:
        model: its shape.
        device: where they are drawn.
        seed: of the random weights.
    """

    def __init__(self, model: Model, device: str, seed: int):
        self.model, self.size, self.device = model, model.size, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def random(self, rows: int, columns: int) -> torch.Tensor:
        """Draw a matrix of variance 1."""
        return torch.randn(rows, columns, generator=self.generator, device=self.device)

    def reads(self, rows: int, gain: float) -> torch.Tensor:
        """Draw what reads all dimensions of the residual stream but the first."""
        tensor = self.random(rows, self.size.hidden) * gain / self.size.hidden**0.5
        tensor[:, 0] = 0
        return tensor

    def writes(self, columns: int, gain: float) -> torch.Tensor:
        """Draw what writes to all dimensions of the residual stream but the first."""
        tensor = self.random(self.size.hidden, columns) * gain / columns**0.5
        tensor[0] = 0
        return tensor

    def mlp(self, prefix: str, width: int, gain: float) -> Tensors:
        """Draw a dense MLP, or one expert."""
        return {
            f"{prefix}.gate_proj.weight": self.reads(width, 1.0),
            f"{prefix}.up_proj.weight": self.reads(width, 1.0),
            f"{prefix}.down_proj.weight": self.writes(width, gain),
        }

    def embedding(self) -> torch.Tensor:
        """Draw the embedding, which puts the same into the first dimension for every token."""
        embedding = self.random(self.size.vocab, self.size.hidden)
        embedding[:, 0] = CONSTANT
        return embedding

    def attention(self, prefix: str) -> Tensors:
        """Draw a layer's attention and norms."""
        size, ones = self.size, torch.ones(self.size.hidden)
        heads, kv_heads = size.heads * size.head_dim, size.kv_heads * size.head_dim
        return {
            f"{prefix}.self_attn.q_proj.weight": self.reads(heads, 1.0),
            f"{prefix}.self_attn.k_proj.weight": self.reads(kv_heads, 1.0),
            f"{prefix}.self_attn.v_proj.weight": self.reads(kv_heads, 1.0),
            f"{prefix}.self_attn.o_proj.weight": self.writes(heads, 0.3),
            f"{prefix}.self_attn.q_norm.weight": torch.ones(size.head_dim),
            f"{prefix}.self_attn.k_norm.weight": torch.ones(size.head_dim),
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.post_attention_layernorm.weight": ones,
        }

    def experts(self, prefix: str) -> Tensors:
        """Draw a layer's experts, shared ones too."""
        model, tensors = self.model, {}
        if model.groups:
            tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = torch.zeros(model.experts)
            tensors |= self.mlp(f"{prefix}.mlp.shared_experts", self.size.expert, 0.3)
        for expert in range(model.experts):
            tensors |= self.mlp(f"{prefix}.mlp.experts.{expert}", self.size.expert, 0.5)
        return tensors


def _files(
    model: Model, shares: np.ndarray, device: str, seed: int
) -> Iterator[tuple[Tensors, torch.Tensor | None]]:
    """Draw the tensors of each file, and for a MoE layer the share that each expert reaches."""
    drawing, size = _Drawing(model, device, seed), model.size
    embedding = drawing.embedding()
    first = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(size.hidden),
        "lm_head.weight": drawing.reads(size.vocab, 4.0),
    }
    yield first, None
    normal = _normal(embedding)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        tensors = drawing.attention(prefix)
        if layer not in model.moe_layers:
            yield tensors | drawing.mlp(f"{prefix}.mlp", 2 * size.expert, 0.3), None
            continue
        gate = drawing.reads(model.experts, 1.0)
        row = torch.from_numpy(shares[layer - model.moe_layers.start]).float().to(device)
        tensors[prefix + GATE], found = _fitted(gate, normal, row, model.routing(device))
        yield tensors | drawing.experts(prefix), found


SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")


def _write_tokenizer(path: Path, vocab: int) -> None:
    """Write a tokenizer to which a word is a token: ``w17`` is token 17.

    The first four are special ones, which must not be the beginning of a word.
    """
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
