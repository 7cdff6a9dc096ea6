"""What of vLLM a placement, a verification or a recording does not go with, decided before a model loads.

The tables of ``docs/vllm.md`` come from the same rules: ``python -m
moe_placement_plugin.engines.vllm.support``. What the kernels do is known once a layer is built, see
`kernels`; what the checkpoint does, once it is loaded, see `evidence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from packaging.version import InvalidVersion, Version

from ...core.errors import PlacementError
from ..common import options, support
from ..common.options import markdown
from ..common.support import Rule
from .combination import Combination
from .kernels import (
    ALL2ALL_WITH_MAP,
    ALL2ALL_WITH_TABLES,
    HONOURING,
    MAP_BACKENDS,
    MOE_BACKENDS_REFUSED,
)
from .weight_transfer import BY_THE_LOADER, PAST_THE_LOADER

SUPPORTED = ("0.25", "0.34")
"""First supported version of vLLM and the first that is not."""

LOADERS_OF_THEIR_OWN = (
    "tensorizer",
    "ipc_cache",
    "modelexpress",
    "sharded_state",
    "runai_streamer_sharded",
)
"""Values of ``--load-format`` that put weights where they lay when they were saved."""

EXPERTS_OF_THEIR_OWN = (
    "MiniCPMForCausalLM",
    "MiniCPM3ForCausalLM",
    "HfMoondream",
    "Moondream3ForCausalLM",
)
"""Architectures whose experts are no ``RoutedExperts`` of vLLM's: they number and load them themselves."""


_OTHER_TRANSFER = f"use one of {', '.join(BY_THE_LOADER)}, or leave the placement out"
_LEAVE_ONE = "leave one of the two out"


def _sends_by(backend: str) -> Callable[[Combination], bool]:
    return lambda combination: combination.transfer == backend


PLACEMENT_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        "model",
        "a model without experts",
        "it has no experts to place",
        "leave the flag out",
        lambda c: not c.is_moe,
        lambda c: f": {c.model} is no Mixture-of-Experts model",
    ),
    Rule(
        "model",
        ", ".join(EXPERTS_OF_THEIR_OWN),
        "vLLM holds its experts outside vLLM's MoE layer, where none can be placed",
        "leave the flag out",
        lambda c: c.architecture in EXPERTS_OF_THEIR_OWN,
        lambda c: f": {c.architecture}",
    ),
    Rule(
        "option",
        "no `--enable-expert-parallel`",
        "without expert parallelism every rank holds a part of every expert and there is nothing to place",
        "add --enable-expert-parallel",
        lambda c: not c.expert_parallel,
        lambda c: " without --enable-expert-parallel",
    ),
    Rule(
        "option",
        "one EP rank (tensor and data parallel size 1)",
        "all experts lie on that rank",
        "add --tensor-parallel-size or --data-parallel-size, or leave the flag out",
        lambda c: c.ep_size == 1,
        lambda c: " with one EP rank (tensor and data parallel size 1)",
    ),
    Rule(
        "load format",
        f"`--load-format` {', '.join(LOADERS_OF_THEIR_OWN)}",
        "it puts weights where they were when they were saved, past the map of experts",
        "use --load-format auto",
        lambda c: c.load_format in LOADERS_OF_THEIR_OWN,
        lambda c: f" together with --load-format {c.load_format}",
    ),
    *(
        Rule(
            "new weights",
            f"`--weight-transfer-config` with back end {backend}",
            f"it {why}",
            _OTHER_TRANSFER,
            _sends_by(backend),
            lambda c: f" with --weight-transfer-config backend {c.transfer}",
        )
        for backend, why in PAST_THE_LOADER.items()
    ),
    Rule(
        "option",
        "`--enable-elastic-ep`",
        "a static placement holds for a fixed number of ranks",
        _LEAVE_ONE,
        lambda c: c.elastic,
        lambda c: " together with --enable-elastic-ep",
    ),
    # EPLB sends tokens to slots by itself, through kernels that vLLM has checked.
    Rule(
        "back end",
        f"`--moe-backend` {', '.join(MOE_BACKENDS_REFUSED)}, without `--enable-eplb`",
        "it computes with contiguous, even blocks of experts and ignores expert maps",
        f"use --moe-backend {' or '.join(MAP_BACKENDS)} (which of them depends on the model's "
        "quantization), or leave the placement flag out",
        lambda c: not c.eplb and c.kernel_ignores_map,
        lambda c: f": MoE back end {c.moe_backend}",
    ),
)
"""What no placement goes with, known from the arguments alone."""

SLOT_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        "back end",
        f"`--all2all-backend` {', '.join(ALL2ALL_WITH_TABLES)} and ranks with unequal slots, "
        "without `--enable-eplb`",
        "this placement does not give it",
        f"use --all2all-backend {ALL2ALL_WITH_MAP[0]}, or a number of ranks that divides the number "
        "of experts",
        lambda c: not c.eplb and c.all2all in ALL2ALL_WITH_TABLES and not c.even,
        lambda c: f": all2all back end {c.all2all} needs the same number of experts on every rank",
    ),
    Rule(
        "back end",
        f"`--all2all-backend` other than {', '.join((*ALL2ALL_WITH_MAP, *ALL2ALL_WITH_TABLES))}, "
        "without `--enable-eplb`",
        "it sends tokens to contiguous, even blocks of experts and ignores any other placement",
        f"use --all2all-backend {' or '.join((ALL2ALL_WITH_MAP[0], *ALL2ALL_WITH_TABLES))}, or leave "
        "the placement flag out",
        lambda c: not c.eplb and c.all2all not in ("", *ALL2ALL_WITH_MAP, *ALL2ALL_WITH_TABLES),
        lambda c: f": all2all back end {c.all2all}",
    ),
)
"""What depends on the slots of the placement that was made."""

VERIFICATION_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        options.VERIFY.flag,
        "no `--enable-expert-parallel`, or a model without experts",
        "no rank holds whole experts",
        "add --enable-expert-parallel, or leave the flag out",
        lambda c: not (c.expert_parallel and c.is_moe),
        lambda c: " without --enable-expert-parallel and a Mixture-of-Experts model",
    ),
    Rule(
        options.VERIFY.flag,
        "`--enable-elastic-ep`",
        "ranks come and go and cannot check each other",
        _LEAVE_ONE,
        lambda c: c.elastic,
        lambda c: " together with --enable-elastic-ep",
    ),
    Rule(
        options.VERIFY.flag,
        "`--load-format` dummy",
        "weights are random, replicas of an expert differ",
        _LEAVE_ONE,
        lambda c: c.load_format == "dummy",
        lambda c: " with --load-format dummy",
    ),
)

RECORDING_RULES: tuple[Rule[Combination], ...] = (
    Rule(
        options.RECORD.flag,
        "a model without experts",
        "it has no experts",
        "leave the flag out",
        lambda c: not c.is_moe,
        lambda c: f": {c.model} is no Mixture-of-Experts model",
    ),
    *(
        Rule(
            options.RECORD.flag,
            f"`{option}`",
            "tokens would be counted wrongly",
            _LEAVE_ONE,
            support.has(option),
            support.together_with(option),
        )
        for option in (
            "--prefill-context-parallel-size",
            "--enable-dbo",
            "--enable-return-routed-experts",
        )
    ),
    Rule(
        options.RECORD.flag,
        "`--enable-elastic-ep`",
        "tokens would be counted wrongly",
        _LEAVE_ONE,
        lambda c: c.elastic,
        lambda c: " together with --enable-elastic-ep",
    ),
)

RULES = (*PLACEMENT_RULES, *SLOT_RULES, *VERIFICATION_RULES, *RECORDING_RULES)
"""Everything that is refused before a model loads but for values that make no sense by themselves."""


def check(rules: Sequence[Rule[Combination]], combination: Combination, flag: str) -> None:
    """Refuse a combination.

    Args:
        rules: some of `RULES`.
        combination: what the engine is started with.
        flag: the flag of ours that does not go with it, with its value.

    Raises:
        PlacementError: naming the flag, the combination, the reason and the mend.
    """
    support.refuse(rules, combination, lambda rule: f"{flag}{rule.subject(combination)}")


def check_version() -> None:
    """Refuse a vLLM outside the supported range.

    Raises:
        PlacementError: naming the version found.
    """
    # importlib.metadata knows the CPU build under another name, the module always knows its own.
    import vllm

    first, end = SUPPORTED
    try:
        version = Version(vllm.__version__)
    except InvalidVersion:
        version = None
    if version is None or not Version(first) <= Version(version.base_version) < Version(end):
        raise PlacementError(
            f"vLLM {vllm.__version__} is outside the supported range {first} to {end} (exclusive): "
            "install a vLLM in that range, or leave --expert-placement-strategy out"
        )


def table() -> str:
    """Return the tables of ``docs/vllm.md``, Markdown."""
    kernels = [(f"`{name}`", f"`--moe-backend {backend}`") for name, backend in HONOURING.items()]
    honouring = markdown(("kernel that honours an expert map", "chosen by"), kernels)
    return f"{support.refused_table(RULES)}\n\n{honouring}"


if __name__ == "__main__":
    print(table())
