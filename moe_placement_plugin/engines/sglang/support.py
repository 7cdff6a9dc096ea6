"""Say what of SGLang a placement, EPLB, a verification or a recording does not go with.

This is decided before a model loads. The tables of ``docs/sglang.md`` come from the same rules:
``python -m moe_placement_plugin.engines.sglang.support``. What depends on the checkpoint is settled
while loading, see `evidence` and `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..common import options, support
from ..common.support import Rule
from .combination import Combination
from .placement_rules import PLACEMENT_RULES
from .supported import RIGHT

_LEAVE_ONE = "leave one of the two out"
_SECOND_LOAD = ("auto", "safetensors", "fastsafetensors", "pt", "npcache", "mistral")
"""Load formats of SGLang's ``DefaultModelLoader``."""

EPLB_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        "EPLB",
        "`--tp-size` other than `--ep-size`",
        "SGLang's updater takes the TP rank for the EP rank and would move the wrong experts",
        "make them equal, or leave --enable-eplb out",
        lambda c: c.tp_size != c.ep_size,
        lambda c: f", --tp-size {c.tp_size} and --ep-size {c.ep_size}",
    ),
    Rule(
        "EPLB",
        "pipeline stages (`--pp-size`)",
        "SGLang's updater sends to ranks of the first pipeline stage",
        _LEAVE_ONE,
        lambda c: c.pp_size > 1,
        lambda c: f" and --pp-size {c.pp_size}",
    ),
    Rule(
        "EPLB",
        "`--load-format` dummy",
        "most models list the weights to move only while they load a checkpoint",
        "leave --enable-eplb out",
        lambda c: c.load_format == "dummy",
        lambda c: " and --load-format dummy",
    ),
    Rule(
        "EPLB",
        "`--eplb-algorithm` of SGLang's with strategy eplb (but `elasticity_aware` with elastic "
        "EP)",
        "both decide how to rebalance",
        _LEAVE_ONE,
        lambda c: (
            c.plans
            and c.algorithm != "auto"
            and not ("elastic_ep_backend" in c.options and c.algorithm == "elasticity_aware")
        ),
        lambda c: f", --eplb-algorithm {c.algorithm} and {options.STRATEGY.flag} eplb",
    ),
)


def _loads_twice_with(option: str) -> Callable[[Combination], bool]:
    return lambda combination: combination.level == "checkpoint" and option in combination.options


VERIFICATION_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        options.VERIFY.flag,
        "`--ep-size` 1",
        "no rank holds whole experts that another could hold too",
        "add --ep-size, or leave the flag out",
        lambda c: c.ep_size < 2,
        lambda c: f" with --ep-size {c.ep_size}",
    ),
    Rule(
        options.VERIFY.flag,
        "`--elastic-ep-backend` without a placement",
        "ranks that come and go change the slots",
        _LEAVE_ONE,
        lambda c: "elastic_ep_backend" in c.options and not c.places,
        lambda c: " together with --elastic-ep-backend",
    ),
    Rule(
        f"{options.VERIFY.flag} checkpoint",
        "`--load-format` dummy",
        "there is no checkpoint to compare with",
        "use replicas",
        lambda c: c.level == "checkpoint" and c.load_format == "dummy",
        lambda c: " with --load-format dummy",
    ),
    Rule(
        f"{options.VERIFY.flag} checkpoint",
        f"`--load-format` other than {', '.join(_SECOND_LOAD)}",
        f"only {', '.join(_SECOND_LOAD)} can be loaded a second time",
        "use replicas",
        lambda c: c.level == "checkpoint" and c.load_format not in _SECOND_LOAD,
        lambda c: f" with --load-format {c.load_format}",
    ),
    *(
        Rule(
            f"{options.VERIFY.flag} checkpoint",
            f"`{option}`",
            "it would keep the model of the clean load in memory",
            "use replicas",
            _loads_twice_with(option),
            support.together_with(option),
        )
        for option in ("--cpu-offload-gb", "--offload-group-size", "--enable-memory-saver")
    ),
    Rule(
        options.VERIFY.flag,
        "`--load-format` dummy and redundant experts",
        "replicas are random and differ",
        "leave it out",
        lambda c: c.load_format == "dummy" and c.redundant > 0,
        lambda c: f" with --load-format dummy and {c.redundant} redundant experts",
    ),
    Rule(
        options.VERIFY.flag,
        "`--startup-weight-load-mode` overlap",
        "nothing is loaded yet when it is verified",
        "leave the mode out",
        lambda c: "startup_weight_load_mode" in c.options,
        lambda c: " with --startup-weight-load-mode overlap",
    ),
)

RECORDING_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        options.RECORD.flag,
        "`--enable-two-batch-overlap`",
        "tokens would be counted wrongly",
        _LEAVE_ONE,
        lambda c: "enable_two_batch_overlap" in c.options,
        lambda c: " together with --enable-two-batch-overlap",
    ),
    Rule(
        options.RECORD.flag,
        "`--enable-dp-attention` without an all-to-all back end",
        "the ranks route each other's tokens, which cannot be told apart",
        "add --moe-a2a-backend deepep, or leave --enable-dp-attention (--attn-dp-size) out while "
        "recording",
        lambda c: c.a2a_backend == "none" and c.attention_dp > 1,
        lambda c: " together with --enable-dp-attention without an all-to-all back end",
    ),
    Rule(
        options.RECORD.flag,
        "an all-to-all back end and tensor-parallel attention",
        "each rank routes a share of the tokens that only it knows",
        "add --enable-dp-attention with --dp-size equal to --tp-size (from 0.5.23 on "
        "--attn-dp-size), or use --moe-a2a-backend none while recording",
        lambda c: c.a2a_backend != "none" and c.tp_size > c.attention_dp,
        lambda c: f" together with --moe-a2a-backend {c.a2a_backend} and tensor-parallel attention",
    ),
)

RULES = (*PLACEMENT_RULES, *EPLB_RULES, *VERIFICATION_RULES, *RECORDING_RULES)
"""Everything that is refused before a model loads.

Values that make no sense by themselves are left out.
"""


def refusals(combination: Combination) -> Iterator[Rule[Combination]]:
    """Find the rules by which no placement goes with ``combination``."""
    return (rule for rule in PLACEMENT_RULES if rule.applies(combination))


def check_placement(combination: Combination) -> None:
    """Refuse a combination that would not be served right with a placement.

    Raises:
        PlacementError: naming the combination, the reason and the mend.
    """

    def begin(rule: Rule[Combination]) -> str:
        model = f"{combination.architecture}: " if rule.kind == "model" else ""
        return f"an expert placement does not work with {model}{rule.what}"

    support.refuse(PLACEMENT_RULES, combination, begin)


def check(rules: Sequence[Rule[Combination]], combination: Combination, flag: str) -> None:
    """Refuse a combination.

    Args:
        rules: some of `RULES`.
        combination: what the engine is started with.
        flag: what does not go with it, with its value.

    Raises:
        PlacementError: naming the flag, the combination, the reason and the mend.
    """
    support.refuse(rules, combination, lambda rule: f"{flag}{rule.subject(combination)}")


def table() -> str:
    """Return the tables of ``docs/sglang.md``, Markdown."""
    return f"{support.right_table(RIGHT)}\n\n{support.refused_table(RULES)}"


if __name__ == "__main__":
    print(table())
