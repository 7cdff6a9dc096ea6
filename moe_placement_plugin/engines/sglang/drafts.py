"""Place the experts of the draft of speculative decoding.

A draft is a model of its own, or MTP layers of the target's checkpoint, loaded after it. SGLang has
one map of experts, the target's. Up to 0.5.22 it loads and routes a draft's layer by the row of the
target's layer with the same number, from 0.5.23 on by contiguous blocks. Here each MoE layer of a
draft has a row of its own, by which its weights come in and its tokens go out: a plan's under
``draft``, else the strategy's. Which model is being loaded is known to SGLang's ``ModelRunner``;
layers are numbered when the model has been built, before its weights come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape, num_experts_of
from ...core.placement import Placement, even_slots
from ...core.topology import Topology
from ...strategies import PlacementRequest, get_strategy
from ...strategies.resolve import check_draft_rows
from ..common.drafts import layer_numbers
from ..common.request import Request
from ..common.settings import Settings
from . import compat, direct, draft_layers, evidence
from .hook_registry import Hook
from .layers import check_router, expert_layers, moe_blocks
from .state import STATE, placing

logger = logging.getLogger(__name__)

_WITHOUT_MODEL = ("", "NONE", "NGRAM", "UNO")
"""Values of ``--speculative-algorithm`` that load no draft."""

LEAVE = (
    "give the placement as a plan without rows for the draft (--expert-placement-file), which "
    "leaves the draft in SGLang's own order, or leave the placement flags out"
)
"""What to do about a draft that cannot be placed."""


def first_number(runner: Any) -> int:
    """Return the number of a draft's first layer without one in its name.

    MTP layers follow the target's layers, as vLLM calls them.

    Args:
        runner: SGLang's ``ModelRunner`` of the draft, whose model is not built yet.
    """
    layers = getattr(runner.model_config.hf_text_config, "num_hidden_layers", 0)
    return int(layers or 0) + (getattr(runner, "draft_model_idx", None) or 0)


def numbers_of(names: Iterable[str], first: int) -> dict[str, int | None]:
    """Map the name of each MoE layer of a draft to its number; None where the name has several.

    Args:
        names: in the order of the model.
        first: see `first_number`.
    """
    found: dict[str, int | None] = {}
    for name in names:
        numbers = layer_numbers(name)
        if not numbers:
            found[name], first = first, first + 1
        else:
            found[name] = numbers[0] if len(numbers) == 1 else None
    return found


class DraftLoading:
    """Follow a draft that is being built and loaded.

    Args:
        runner: SGLang's ``ModelRunner``.
        settings: the engine's.
        plan: theirs, which is the target's.
    """

    def __init__(self, runner: Any, settings: Settings, plan: Placement):
        config = runner.model_config.hf_text_config
        self.part = getattr(runner, "draft_model_idx", None)
        self.parts = int(compat.resolved(runner.server_args).speculative_num_steps or 1)
        self.redundant, self.ranks = plan.num_redundant, plan.num_ranks
        self.rows = None if settings.rebalancing.moves else plan.draft
        self.experts = num_experts_of(config)
        self.first = first_number(runner)  # some models change their config while they are built
        self.strategy = self._strategy(settings)

    def _strategy(self, settings: Settings) -> Placement | None:
        """Return the row of every layer that the plan has none for; None for SGLang's own order."""
        strategy = get_strategy(settings.strategy)
        own_order = settings.rebalancing.moves or strategy.needs_load or strategy.name == "linear"
        if own_order or self.rows is not None or not self.experts:
            return None
        return strategy.place(
            PlacementRequest(
                1,
                self.experts,
                Topology(self.ranks),
                slots_per_rank=even_slots(self.experts, self.ranks),
            )
        )

    def slots(self, routed: int) -> int:
        """Return how many slots a layer is built with that asks for ``routed``.

        It is as many as every rank needs for its experts.

        Raises:
            PlacementError: when the model counts its experts otherwise than its config.
        """
        if routed not in (self.experts, self.experts + self.redundant):
            raise PlacementError(
                f"the draft model builds a layer with {routed} experts, its config names "
                f"{self.experts}: this draft is not understood; serve it without the placement "
                "flags"
            )
        most = -(-routed // self.ranks)
        if self.rows is not None:
            most = max(most, *self.rows.slots_per_rank)
        return most * self.ranks

    def number(self, model: Any) -> None:
        """Give each MoE layer of the model that was just built its number and its row.

        Raises:
            PlacementError: when the plan's rows are another draft's, or SGLang cannot load or route
                a layer by them.
        """
        if self.part in (None, 0):
            STATE.draft_layers.clear()
        layers = expert_layers(model)
        numbers = numbers_of(layers, self.first)
        for name, layer in layers.items():
            number = numbers[name]
            own = self._row(name, number, layer)
            _check_layer(name, layer, own)
            object.__setattr__(layer, draft_layers.ATTRIBUTE, own)
            if number is not None:
                STATE.draft_layers[number] = name
        if self.rows is not None and self._is_last():
            missing = sorted(set(self.rows.layer_ids) - set(STATE.draft_layers))
            if missing:
                raise PlacementError(
                    f"the plan has a row for layer {missing[0]} of the draft, whose MoE layers "
                    f"are {sorted(STATE.draft_layers)}: plan for this draft, or leave its rows out"
                )

    def _is_last(self) -> bool:
        """Tell whether this is the whole draft, or the last of parts that are loaded one by one."""
        return self.part is None or self.part + 1 >= self.parts

    def _row(self, name: str, number: int | None, layer: Any) -> draft_layers.DraftLayer:
        slots, ranks = layer._num_global_routed, layer.moe_ep_size
        if ranks != self.ranks:
            raise PlacementError(
                f"{name} of the draft runs on {ranks} EP ranks, the placement is for "
                f"{self.ranks}: leave the placement flags out"
            )
        if self.rows is None:
            if self.strategy is None:
                return draft_layers.in_order(self.experts, ranks, number, slots)
            return draft_layers.lay_out(self.strategy, 0, number, slots)
        if number not in self.rows.layer_ids:
            raise PlacementError(
                f"{name}, layer {number} of the draft, is not among the plan's rows for the draft "
                f"(layers {list(self.rows.layer_ids)}): number them as docs/loop.md says, or "
                "leave the draft's rows out"
            )
        if self.rows.num_logical_experts != self.experts:
            raise PlacementError(
                f"{name} of the draft has {self.experts} experts, the plan's rows for the draft "
                f"are for {self.rows.num_logical_experts}: plan for this draft, or leave its rows "
                "out"
            )
        return draft_layers.lay_out(self.rows, self.rows.row(number), number, slots)


def _check_layer(name: str, layer: Any, own: draft_layers.DraftLayer) -> None:
    """Refuse what SGLang loads or routes past a draft's own row, before its weights come."""
    if not own.in_order:
        from .placement_rules import unmapped_quantizations  # lazy: heavy

        method = type(layer.quant_method).__name__
        if method in unmapped_quantizations(compat.OLDEST).values():
            raise PlacementError(
                f"{name} of the draft is quantized by {method}, which puts zero points or scales "
                f"where the trivial map has them: {LEAVE}"
            )
        for parameter, tensor in layer.named_parameters(recurse=False):
            if getattr(tensor, "_sglang_require_global_experts", False):
                raise PlacementError(
                    f"{name} of the draft keeps {parameter} for all experts, by the trivial map: "
                    f"{LEAVE}"
                )
    metadata = evidence.in_force()
    if (
        not compat.topk_finds_the_placement()
        and metadata is not None
        and layer.layer_id >= metadata.num_layers
    ):
        raise PlacementError(
            f"{name} is layer {layer.layer_id} of the draft, the target has "
            f"{metadata.num_layers}: SGLang before 0.5.23 looks it up among the target's while it "
            "routes; use 0.5.23, or leave --speculative-algorithm out"
        )


@contextmanager
def loading(runner: Any | None) -> Iterator[None]:
    """Mark that a draft is built and its weights come in; None for any other model."""
    before, STATE.draft = STATE.draft, None
    settings = placing()
    if runner is not None and settings is not None and settings.plan is not None:
        STATE.draft = DraftLoading(runner, settings, settings.plan)
    try:
        yield
    finally:
        STATE.draft = before


def initialize(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Number a draft's layers after `_initialize_model`, which builds every model."""
    model = original(*args, **kwargs)
    if STATE.draft is not None:
        STATE.draft.number(model)
    return model


def settle(runner: Any, settings: Settings) -> None:
    """Check a draft that has been loaded, and have its TopK layers route by its own rows.

    Args:
        runner: SGLang's ``ModelRunner`` of the draft.
        settings: the engine's.

    Raises:
        PlacementError: when slots, weights or routing do not go by the rows.
    """
    reads, rows = _reads(runner, settings), {}
    for name, layer in expert_layers(runner.model).items():
        own = draft_layers.of_layer(layer)
        if own is None:
            raise PlacementError(
                f"draft model: {name} was built past SGLang's _initialize_model, so that its "
                "layers have no numbers: use --load-format auto for the draft, or leave the "
                "placement flags out"
            )
        if reads:
            evidence.check(f"draft model: {name}", layer)
        rows[layer] = own
    if not rows:
        return
    in_order = all(own.in_order for own in rows.values())
    if not (in_order and compat.topk_finds_the_placement()):  # else SGLang's own way
        _route_all(runner.model, rows)
    by_plan = settings.plan is not None and settings.plan.draft is not None
    how = "its rows of the plan" if by_plan else settings.strategy
    logger.info(
        "moe_placement_plugin: the draft's experts are placed by %s in %d layers (%s)",
        "SGLang's own order" if in_order else how,
        len(rows),
        ", ".join(str(own.number) for own in rows.values()),
    )


def _route_all(model: Any, rows: dict[Any, draft_layers.DraftLayer]) -> None:
    for name, layer, router in moe_blocks(model, "draft model: "):
        if not rows[layer].in_order:
            check_router(f"draft model: {name}", router)
        _route(layer, router, rows[layer])


def _route(layer: Any, router: Any, own: draft_layers.DraftLayer) -> None:
    import torch
    from sglang.srt.utils.common import get_device

    info = None
    if not own.in_order:
        table = own.local_slots(layer.moe_ep_rank)
        direct.settle(layer, router, own.num_logical, table)
        info = draft_layers.dispatch_info(own, torch.device(get_device()))
    draft_layers.routes(router.topk_config, draft_layers.DraftRouting(info))


def _reads(runner: Any, settings: Settings) -> bool:
    """Tell whether a draft's weights come from a checkpoint.

    Its load format may be another than the target's.
    """
    args = compat.resolved(runner.server_args)
    own = getattr(args, "speculative_draft_load_format", None)
    return settings.loading.reads if own is None else str(getattr(own, "value", own)) != "dummy"


def check_rows(plan: Placement, request: Request, cfg: Any, target: ModelShape) -> None:
    """Refuse a plan whose rows for a draft fit no draft of this server.

    The launcher does so before anything is loaded.

    Args:
        plan: the target's placement, with the rows.
        request: the flags.
        cfg: SGLang's resolved arguments.
        target: the target's MoE layers.

    Raises:
        PlacementError: naming the plan and what does not fit.
    """
    rows = plan.draft
    if rows is None:
        return
    if getattr(cfg, "enable_eplb", False):
        raise PlacementError(
            f"{request.file} has rows for a draft (layers {list(rows.layer_ids)}), which stays in "
            "SGLang's own order with --enable-eplb: leave the draft's rows out"
        )
    check_draft_rows(plan, draft_shape(cfg, target), Topology(plan.num_ranks), str(request.file))
    a2a = str(cfg.moe_a2a_backend or "none")
    if a2a != "none" and not rows.is_even:
        raise PlacementError(
            f"{request.file} gives the ranks {list(rows.slots_per_rank)} experts of a draft, "
            f"--moe-a2a-backend {a2a} needs the same number on every rank: plan the draft with "
            "equal ranks"
        )


def draft_shape(cfg: Any, target: ModelShape) -> ModelShape | None:
    """Return the experts of the draft that the server is started with; None without any.

    It is None without a draft, and for a draft without experts. Which of its layers are MoE layers
    is known once it was built, and checked then.

    Args:
        cfg: SGLang's resolved arguments.
        target: the target's MoE layers, whose checkpoint may have the draft's too.
    """
    if str(cfg.speculative_algorithm or "").upper() in _WITHOUT_MODEL:
        return None
    path = str(cfg.speculative_draft_model_path or cfg.model_path)
    if path == str(cfg.model_path):
        return ModelShape((), target.num_experts, name=path)
    from sglang.srt.configs.model_config import get_config, get_hf_text_config

    config = get_config(
        path,
        trust_remote_code=cfg.trust_remote_code,
        revision=getattr(cfg, "speculative_draft_model_revision", None),
    )
    experts = num_experts_of(get_hf_text_config(config))
    return ModelShape((), experts, name=path) if experts else None


def draft_hooks() -> list[Hook]:
    """Return the hook that numbers a draft's layers."""
    return [
        Hook(
            name="draft-layers",
            target="sglang.srt.model_loader.loader:_initialize_model",
            hook=initialize,
            relies_on=("model_config", "load_config"),
            counted=False,
            why="a draft's layers are placed by rows of their own, which its weights come in by, "
            "and known by name once it was built",
            removable_when="SGLang has a map of experts for drafts too",
        ),
    ]
