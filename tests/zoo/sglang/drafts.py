"""Describe targets with a draft of speculative decoding.

It is MTP layers in their checkpoint, or a model of its own, loaded after the target.
"""

from __future__ import annotations

from dataclasses import replace

from .mla import MLA_MODELS
from .others import OTHERS
from .qwen import QWEN
from .recipe import ALL, BASE, BIAS, MLP, QWEN3, Recipe, dense, each_expert, router, single
from .values import HIDDEN, LAYERS, WIDTH

OFFSET = 70

CHAIN = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 2,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 3,
}
"""Arguments of ``ServerArgs`` for a draft; none of them matters for what is loaded."""


def _plain(recipes: tuple[Recipe, ...], architecture: str) -> Recipe:
    return next(recipe for recipe in recipes if recipe.name == architecture)


def _behind(architecture: str, recipes: tuple[Recipe, ...]) -> Recipe:
    """Return a target whose checkpoint has an MTP layer behind its layers.

    SGLang calls it ``model.decoder``.
    """
    base = _plain(recipes, architecture)
    layer = Recipe(
        f"{architecture}NextN",
        {},
        (0,),
        f"model.layers.{LAYERS}.mlp",
        (each_expert(), router(bias=BIAS), dense("shared_experts")),
        numbers=(LAYERS,),
        offset=OFFSET,
    )
    return replace(
        base, config=base.config | {"num_nextn_predict_layers": 1}, variant="mtp", draft=layer,
        engine=base.engine | CHAIN,
    )  # fmt: skip


_QWEN2 = BASE | QWEN3 | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": WIDTH}

DRAFTED: tuple[Recipe, ...] = (
    _behind("DeepseekV3ForCausalLM", MLA_MODELS),
    _behind("Glm4MoeForCausalLM", OTHERS),
    replace(
        _plain(QWEN, "Qwen3MoeForCausalLM"),
        variant="mtp",
        engine=CHAIN,
        draft=Recipe(
            "Qwen3MoeForCausalLMMTP",
            {},
            (0,),
            "mtp.layers.{layer}.mlp",
            (each_expert(), router()),
            numbers=(0,),
            offset=OFFSET,
        ),  # fmt: skip
    ),
    replace(
        _plain(QWEN, "Qwen3MoeForCausalLM"),
        variant="draft-model",
        engine=CHAIN | {"speculative_algorithm": "STANDALONE"},
        draft=Recipe(
            "Qwen2MoeForCausalLM",
            _QWEN2,
            ALL,
            MLP,
            (
                each_expert(),
                router(),
                dense("shared_expert"),
                single("shared_expert_gate.weight", 1, HIDDEN),
            ),
            numbers=ALL,
            offset=OFFSET,
        ),  # fmt: skip
    ),
)
