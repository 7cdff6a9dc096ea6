"""List what is indexed like experts in both engines and is no weight of a layer.

A placement moves weights. Whatever else has a row, a column or an id per expert must move with
them, or be known to be read by logical expert, or be refused: each of these was once a wrong token
without a word in some engine. Whoever finds a new one adds a row here; a test looks up each place
that a row names, and the table of ``docs/indexed-like-experts.md`` is printed from these rows:

    python -m moe_placement_plugin.engines.common.indexed_like_experts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fate = Literal["kept logical", "follows the map", "one for all", "refused"]

FATES: dict[str, str] = {
    "kept logical": "it is read by logical expert, before ids become slots, and must not move",
    "follows the map": "its row, or id, is that of the expert that the map in force puts into the "
    "slot",
    "one for all": "all its rows hold the same value when it is read, so that it does not matter "
    "which is read",
    "refused": "the combination ends with one error",
}
"""What can become of something that is indexed like experts, and what that means."""


@dataclass(frozen=True)
class Indexed:
    """Describe one thing that is indexed like experts.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        name: what it is called, in the engine's words.
        what: how it is indexed, and by whom it is read.
        fate: one of `FATES`.
        where: what does it: ``file:name`` in ``engines/``, or ``engine: `` and what does it in the
            engine itself.
    """

    engine: Literal["vllm", "sglang"]
    name: str
    what: str
    fate: Fate
    where: str


INDEXED: tuple[Indexed, ...] = (
    Indexed(
        "vllm",
        "LoRA adapters of experts",
        "a pair of matrices per logical expert, read by local slot; vLLM cuts them into "
        "contiguous blocks",
        "follows the map",
        "vllm/lora.py:experts_of_slots",
    ),
    Indexed(
        "vllm",
        "LoRA adapters of experts with `--enable-eplb`",
        "base weights move, adapters would stay; adapters of other modules are served",
        "refused",
        "vllm/lora.py:check_adapter",
    ),
    Indexed(
        "vllm",
        "input scales (`w13_input_scale`, `w2_input_scale`)",
        "calibrated ranges of activations, a row per local slot",
        "follows the map",
        "engine: RoutedExperts.weight_loader asks the layer's map",
    ),
    Indexed(
        "vllm",
        "NVFP4 input scales of FlashInfer's kernels",
        "a row per expert of the model, on every rank; the kernel gets their maximum",
        "one for all",
        "vllm/verification.py:digest_model",
    ),
    Indexed(
        "vllm",
        "scales that are a maximum over a rank's experts (`alphas`, `weight_scale_2`)",
        "a value per slot, made from several experts; left out of the digests under EPLB",
        "follows the map",
        "vllm/verification.py:_REDUCED",
    ),
    Indexed(
        "vllm",
        "`e_score_correction_bias`",
        "a value per logical expert, added before top-k",
        "kept logical",
        "vllm/verification.py:_NO_WEIGHTS",
    ),
    Indexed(
        "vllm",
        "columns of the router's logits",
        "a column per logical expert; kernels that route by themselves take them for slots",
        "kept logical",
        "vllm/kernels.py:check_experts",
    ),
    Indexed(
        "vllm",
        "hash routing (DeepSeek-V4)",
        "a table from token ids to logical experts, read in the router",
        "kept logical",
        "engine: the router's table gives logical ids, which the map follows",
    ),
    Indexed(
        "vllm",
        "ids of fused shared experts",
        "numbered behind the routed ones, a slot on every rank behind the routed slots",
        "follows the map",
        "vllm/expert_maps.py:_map_tensors",
    ),
    Indexed(
        "vllm",
        "ids of fused shared experts with routing tables",
        "the tables have no entry for them",
        "refused",
        "vllm/expert_maps.py:_routing_tables",
    ),
    Indexed(
        "vllm",
        "routing tables of DeepEP low latency and NIXL",
        "physical slot of each logical expert and back; an entry for -1, padded tokens' id",
        "follows the map",
        "vllm/expert_maps.py:_routing_tables",
    ),
    Indexed(
        "vllm",
        "set of experts of `--enable-ep-weight-filter`",
        "which tensors of the checkpoint a rank reads; the draft has one of its own",
        "follows the map",
        "vllm/expert_maps.py:LocalExperts",
    ),
    Indexed(
        "vllm",
        "expert map on the CPU build",
        "local slot of each logical expert; ids of -1 are computed nowhere",
        "follows the map",
        "vllm/cpu.py:to_local",
    ),
    Indexed(
        "vllm",
        "routed-experts capture (`--enable-return-routed-experts`)",
        "logical ids, taken before they become slots; refused with a recording, which needs the "
        "same place",
        "kept logical",
        "vllm/support.py:RECORDING_RULES",
    ),
    Indexed(
        "vllm",
        "EPLB's counters of load",
        "a count per physical expert; vLLM adds them up by logical expert before it plans",
        "kept logical",
        "vllm/eplb_policy.py:load_by_phase",
    ),
    Indexed(
        "vllm",
        "recorded load",
        "counts per logical expert; ids outside are left out, -1 among them",
        "kept logical",
        "../recording/counters.py:LoadCounters",
    ),
    Indexed(
        "vllm",
        "`expert_substitution`",
        "a table from logical experts to those that stand in for them",
        "refused",
        "engine: it asks for tensor parallel experts, a placement for expert parallel ones",
    ),
    Indexed(
        "vllm",
        "layers of a draft or MTP head",
        "numbered by the draft itself; rows of their own in a plan, else the strategy's",
        "follows the map",
        "vllm/drafts.py:check_draft",
    ),
    Indexed(
        "sglang",
        "LoRA adapters (`--enable-lora`, `--lora-paths`)",
        "kept by SGLang in the trivial order",
        "refused",
        "sglang/placement_rules.py:PLACEMENT_RULES",
    ),
    Indexed(
        "sglang",
        "NVFP4 input scales (ModelOpt)",
        "a row per logical expert, sliced by the trivial position in some kernels",
        "refused",
        "sglang/placement_rules.py:PLACEMENT_RULES",
    ),
    Indexed(
        "sglang",
        "tensors with a row for every expert of the model",
        "read by local slot they are other experts'; right only where all rows agree",
        "one for all",
        "sglang/slot_digests.py:digest_model",
    ),
    Indexed(
        "sglang",
        "correction bias",
        "a value per logical expert, added before top-k",
        "kept logical",
        "engine: the TopK layer routes by logical expert and remaps afterwards",
    ),
    Indexed(
        "sglang",
        "columns of the router's logits",
        "a column per logical expert; runner back ends that route by themselves never see the map",
        "refused",
        "sglang/placement_rules.py:_kernel_routes",
    ),
    Indexed(
        "sglang",
        "hash routing (DeepSeek-V4)",
        "a table from token ids to experts, outside of the TopK layer",
        "refused",
        "sglang/placement_rules.py:_own_routing",
    ),
    Indexed(
        "sglang",
        "ids of fused shared experts",
        "numbered behind the routed and redundant slots",
        "follows the map",
        "sglang/routing.py:_remap",
    ),
    Indexed(
        "sglang",
        "dispatch table (logical expert to slot, per rank)",
        "read with ids that the router has just chosen; padded tokens are masked afterwards",
        "follows the map",
        "sglang/dispatch_table.py:dispatch_table",
    ),
    Indexed(
        "sglang",
        "table of the standard dispatcher (`local_expert_mapping`)",
        "local slot of each logical expert, and an entry for -1, padded tokens' id",
        "follows the map",
        "sglang/direct.py:local_slots",
    ),
    Indexed(
        "sglang",
        "slots of other ranks on the CPU engine",
        "-1, which its kernels do not know",
        "follows the map",
        "sglang/cpu.py:local_slots",
    ),
    Indexed(
        "sglang",
        "routed-experts capture",
        "logical ids, taken before they become slots",
        "kept logical",
        "engine: _post_process_topk_ids captures first",
    ),
    Indexed(
        "sglang",
        "EPLB's counters of load",
        "a count per physical slot; SGLang adds them up by its own map; -1 is left out",
        "follows the map",
        "sglang/eplb_counting.py:select_experts",
    ),
    Indexed(
        "sglang",
        "recorded load",
        "counts per logical expert; ids outside are left out, -1 among them",
        "kept logical",
        "../recording/counters.py:LoadCounters",
    ),
    Indexed(
        "sglang",
        "layers of a draft or MTP layer",
        "looked up under the target's layer of the same number (up to 0.5.22); rows of their own "
        "here",
        "follows the map",
        "sglang/draft_layers.py:lay_out",
    ),
    Indexed(
        "sglang",
        "scales and zero points of a draft that SGLang keeps by the trivial map",
        "a row per expert, or loaders of their own; right only where the draft stays in SGLang's "
        "order",
        "refused",
        "sglang/drafts.py:_check_layer",
    ),
    Indexed(
        "sglang",
        "Waterfill and KTransformers",
        "tables of their own for which expert lies where",
        "refused",
        "sglang/placement_rules.py:PLACEMENT_RULES",
    ),
    Indexed(
        "sglang",
        "zero-computation experts (LongCat-Flash)",
        "ids beyond the map",
        "refused",
        "sglang/placement_rules.py:_zero_experts",
    ),
)


def table() -> str:
    """Write the tables of ``docs/indexed-like-experts.md`` as Markdown."""
    lines = ["| what becomes of it | means |", "|---|---|"]
    lines += [f"| {fate} | {meaning} |" for fate, meaning in FATES.items()]
    for engine, title in (("vllm", "vLLM"), ("sglang", "SGLang")):
        head = f"| {title} | how it is indexed | what becomes of it | where |"
        lines += ["", head, "|---|---|---|---|"]
        lines += [
            f"| {row.name} | {row.what} | {row.fate} | {_place(row.where, title)} |"
            for row in INDEXED
            if row.engine == engine
        ]
    return "\n".join(lines)


def _place(where: str, engine: str) -> str:
    own = where.removeprefix("engine: ")
    return f"{engine}: {own}" if own != where else f"`{where}`"


if __name__ == "__main__":
    print(table())
