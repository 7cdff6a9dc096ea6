"""Compute the routing of a tiny model with Hugging Face's implementation.

Recordings are held against it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


class Reference:
    """Compute the expected counts of a recording.

    Args:
        model: a Qwen3-MoE checkpoint.
    """

    def __init__(self, model: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """Return the answer of so many tokens to a prompt of token ids."""
        ids = self._torch.tensor([prompt])
        found = self.network.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return found[0, len(prompt) :].tolist()

    def expected(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Count what greedy answers to prompts of token ids route.

        Returns counts per phase ``[layers, experts]`` and pairs ``[layers, experts, experts]``.
        """
        config = self.network.config
        layers, experts = config.num_hidden_layers, config.num_experts
        counts = {phase: np.zeros((layers, experts), int) for phase in ("prefill", "decode")}
        pairs = np.zeros((layers, experts, experts), int)
        for prompt, answer in zip(prompts, answers):
            # The last token of an answer is never computed on.
            tokens = self._torch.tensor([prompt + answer[:-1]])
            with self._torch.no_grad():
                logits = self.network(tokens, output_router_logits=True).router_logits
            for layer, scores in enumerate(logits):
                chosen = (
                    scores.reshape(tokens.shape[1], -1)
                    .topk(config.num_experts_per_tok)
                    .indices.numpy()
                )
                for position, ids in enumerate(chosen):
                    counts["prefill" if position < len(prompt) else "decode"][layer, ids] += 1
                    pairs[layer][np.ix_(ids, ids)] += 1
        return counts, pairs * ~np.eye(experts, dtype=bool)


def check(load, counts: dict[str, np.ndarray], pairs: np.ndarray | None) -> None:
    """Assert that a recording holds these counts: once per token and layer, without a warm-up.

    Padding is not counted either.
    """
    for phase, expected in counts.items():
        got = sum(window for window, p in zip(load.counts, load.phases) if p == phase)
        assert got.sum(axis=1).tolist() == expected.sum(axis=1).tolist(), phase
        # Two computations of one router may differ where experts tie.
        assert np.abs(got - expected).sum() <= 0.02 * expected.sum(), (
            phase,
            np.abs(got - expected).sum(),
            expected.sum(),
        )
    if pairs is None:
        assert load.coactivation is None
    else:
        assert np.abs(load.coactivation - pairs).sum() <= 0.04 * pairs.sum()
