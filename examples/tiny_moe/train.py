"""Train a tiny MoE model on the problems of `problems.py`, and write the checkpoint.

The model is rounded to bfloat16 and examined before.

    python train.py qwen3-moe   # softmax router, 32 experts, top-4; a few minutes on two cores
    python train.py glm4-moe    # sigmoid router, 32 experts in 4 groups of which a token uses 2,
                                # a shared expert

Needs this package, torch and transformers 5. Nothing is downloaded: the model starts from random
weights. There is no load-balancing loss, so that the routing becomes as skewed as the problems make
it. What is examined and written is the model after rounding its weights to bfloat16; engines serve
it in float32 (or in bfloat16) from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from problems import DOMAINS, Problem, examination, problems
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.demo.tiny_models import Size, write_glm4_moe, write_qwen3_moe

HERE = Path(__file__).parent
SIZES = {
    "qwen3-moe": Size(hidden=64, expert=32, layers=3, heads=4),
    "glm4-moe": Size(hidden=64, expert=32, layers=4, heads=4),
}
WRITERS = {"qwen3-moe": write_qwen3_moe, "glm4-moe": write_glm4_moe}
SHARES = {"sum": 4, "sort": 2, "brackets": 2, "reverse": 2, "copy": 1}
"""Problems of a domain in a batch, relative to each other: more where more is to be learnt."""

IGNORED = -100
EXAMINED, EXAMINATION_SEED = 400, 1


class Encoder:
    """Turn problems into token ids.

    Args:
        tokenizer: the checkpoint's.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, batch: list[Problem]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids ``[problems, tokens]``, the ids wanted next, and where tokens are real.

        Ids are padded at the right; wanted ones are `IGNORED` inside the prompt.
        """
        rows, wanted = [], []
        for problem in batch:
            prompt, answer = self._ids(problem.prompt), self._ids(problem.answer)
            rows.append(prompt + answer)
            wanted.append([IGNORED] * (len(prompt) - 1) + answer + [self.tokenizer.eos_token_id])
        width = max(map(len, rows))
        ids = torch.tensor(
            [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        )
        targets = torch.tensor([row + [IGNORED] * (width - len(row)) for row in wanted])
        return ids, targets, ids != self.tokenizer.pad_token_id

    def _ids(self, text: str) -> list[int]:
        # One token per character, so characters can be looked up.
        for character in set(text) - self.known.keys():
            (self.known[character],) = self.tokenizer.encode(character, add_special_tokens=False)
        return [self.known[character] for character in text]


def batches(size: int, seed: int) -> Iterator[list[Problem]]:
    """Draw batches of training problems, every domain in each."""
    streams = {domain: problems(domain, seed, training=True) for domain in DOMAINS}
    unit = size // sum(SHARES.values())
    while True:
        yield [
            problem
            for domain, stream in streams.items()
            for problem in itertools.islice(stream, unit * SHARES[domain])
        ]


def train(model, encode: Encoder, steps: int, batch: int, rate: float, seed: int) -> None:
    """Train in place with AdamW and a cosine schedule."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    began = time.monotonic()
    for step, problem_batch in enumerate(itertools.islice(batches(batch, seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            )
        ids, targets, _ = encode(problem_batch)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step + 1 == steps:
            print(
                f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - began:5.0f} s",
                flush=True,
            )


@torch.no_grad()
def exact_match(model, encode: Encoder, batch: list[Problem]) -> float:
    """Return the share of problems whose greedy answer is right to the end.

    Every token of the right answer is the likeliest after those before it.
    """
    ids, targets, _ = encode(batch)
    chosen = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    return ((chosen == targets) | (targets == IGNORED)).all(1).float().mean().item()


@torch.no_grad()
def routing(model, encode: Encoder, batch: list[Problem]) -> torch.Tensor:
    """Count tokens per MoE layer and expert, ``[layers, experts]``, over prompts and answers."""
    ids, _, real = encode(batch)
    counts: list[torch.Tensor] = []

    def count(module, inputs, output):
        chosen = output[2].view(*ids.shape, -1)[real]
        counts.append(torch.bincount(chosen.flatten(), minlength=module.weight.shape[0]))

    routers = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(count) for router in routers]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(counts)


def examine(model, encode: Encoder) -> dict:
    """Measure exact match and routing skew of every domain on held-out problems.

    Returns:
        ``exact_match`` domain -> share; ``max_over_mean`` domain (and ``all``) -> greatest load of
        an expert over the mean load, mean over layers; ``distance`` -> least, mean and greatest
        total variation distance between two domains' loads, mean over layers.
    """
    model.eval()
    chosen = {domain: examination(domain, EXAMINED, EXAMINATION_SEED) for domain in DOMAINS}
    counts = {domain: routing(model, encode, batch).double() for domain, batch in chosen.items()}
    shares = {domain: load / load.sum(1, keepdim=True) for domain, load in counts.items()}
    distances = [
        (0.5 * (shares[a] - shares[b]).abs().sum(1)).mean().item()
        for a, b in itertools.combinations(shares, 2)
    ]
    skew = shares | {"all": torch.stack(list(shares.values())).mean(0)}
    return {
        "exact_match": {
            domain: exact_match(model, encode, batch) for domain, batch in chosen.items()
        },
        "max_over_mean": {
            name: (load.amax(1) / load.mean(1)).mean().item() for name, load in skew.items()
        },
        "distance": {
            "least": min(distances),
            "mean": sum(distances) / len(distances),
            "greatest": max(distances),
        },
    }


def recorded_load(model, encode: Encoder) -> ExpertLoad:
    """Record the load of training problems, a window for each domain.

    It is what a server would have recorded while it answered them.
    """
    streams = [problems(domain, EXAMINATION_SEED, training=True) for domain in DOMAINS]
    counts = [
        routing(model, encode, list(itertools.islice(stream, EXAMINED))).numpy()
        for stream in streams
    ]
    layers = model.config.num_hidden_layers
    return ExpertLoad(
        counts, tuple(range(layers - len(counts[0]), layers)), metadata={"windows": list(DOMAINS)}
    )


def save(model, start: Path, path: Path) -> None:
    """Write the model in the form of the checkpoint that it started from.

    That is one tensor per expert and projection, in bfloat16.
    """
    trained = model.state_dict()
    tensors = {}
    with safe_open(start / "model.safetensors", "pt") as names:
        for name in names.keys():
            if ".experts." in name:
                prefix, _, rest = name.partition(".experts.")
                expert, projection, _ = rest.split(".")
                part = "down_proj" if projection == "down_proj" else "gate_up_proj"
                fused = trained[f"{prefix}.experts.{part}"][int(expert)]
                rows = {
                    "down_proj": slice(None),
                    "gate_proj": slice(0, len(fused) // 2),
                    "up_proj": slice(len(fused) // 2, None),
                }
                tensors[name] = fused[rows[projection]].bfloat16().contiguous()
            else:
                # Engines keep the correction bias of grouped routers in float32.
                wide = name.endswith("e_score_correction_bias")
                tensors[name] = trained[name].float() if wide else trained[name].bfloat16()
    path.mkdir(parents=True, exist_ok=True)
    for file in start.glob("*.json"):
        (path / file.name).write_text(file.read_text())
    config = json.loads((start / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors").chmod(0o644)


def load(path: Path):
    """Load the model in float32, and an encoder with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, Encoder(AutoTokenizer.from_pretrained(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=220)
    parser.add_argument("--rate", type=float, default=3e-3, help="greatest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="default: a folder beside this script, called like the model"
    )
    # Not in the checkpoint's folder: engines take every .safetensors file there for weights.
    parser.add_argument(
        "--load", type=Path, help="file for the expert load; default: loads/ beside this script"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    out = arguments.out or HERE / arguments.model
    with tempfile.TemporaryDirectory() as folder:
        start = WRITERS[arguments.model](
            Path(folder), num_experts=32, seed=arguments.seed, size=SIZES[arguments.model]
        )
        model, encode = load(start)
        began = time.monotonic()
        train(model, encode, arguments.steps, arguments.batch, arguments.rate, arguments.seed)
        seconds = time.monotonic() - began
        save(model, start, out)
    model, encode = load(out)
    recorded = arguments.load or HERE / "loads" / f"{arguments.model}.safetensors"
    recorded.parent.mkdir(exist_ok=True)
    write(recorded_load(model, encode), recorded)
    found = examine(model, encode) | {
        "training": {
            "steps": arguments.steps,
            "batch": arguments.batch,
            "rate": arguments.rate,
            "seed": arguments.seed,
            "seconds": round(seconds),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
        "examined": {"per_domain": EXAMINED, "seed": EXAMINATION_SEED},
    }
    (out / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
