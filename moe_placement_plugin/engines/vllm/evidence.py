"""Note, while a model loads, what was seen to be put into which slot.

A slot that nothing was seen to fill *by the map in force* is refused.

A weight that comes one expert at a time passes ``weight_loader``, which is told the expert. Rows of
many experts at once come by position, and no one says whose they are: they are proven by their
contents (`signature`), against the rows of the checkpoint.
"""

from __future__ import annotations

import functools
import logging
import re
from types import MethodType
from typing import Any

from ...core.errors import PlacementError
from ..common.patching import Patch
from .layers import EXPECTED, moved_slots, num_logical, slot_experts
from .reload_table import local_copies
from .signature import Signature, signature

logger = logging.getLogger("vllm.moe_placement_plugin")

EVIDENCE = "_moe_placement_evidence"
"""Attribute of a ``RoutedExperts`` that is being loaded: its `Evidence`."""

IN_ORDER = "_moe_placement_in_order"
"""Attribute of a ``RoutedExperts`` whose model is given rows in the order of the placement: how it
picks them.
"""

MEND = "use a checkpoint with a tensor per expert, or leave the placement flag out"

_NAMES = "_moe_placement_per_slot"
_BY_CONTENTS = "rows"
_WHOLE = (None, _BY_CONTENTS, "gpt_oss_w13", "gpt_oss_w2")
"""Shards that are a parameter's whole slot."""

_WEIGHT = re.compile(r"^(w13|w2)_(?=.*weight)(?!.*(scale|zero|shape|bias|offset|idx|global))")


class Evidence:
    """Keep what was seen to be put into the slots of one layer on this rank.

    Args:
        layer: a ``RoutedExperts`` with its parameters.
        moved: whether some slot holds another expert than the row that the engine's own loaders
            would copy to it.
        serving: whether the layer serves, its parameters being in the kernel's form.
    """

    def __init__(self, layer: Any, moved: bool, serving: bool = False):
        self.moved = moved
        self.layerwise = False
        """Whether weights are collected first and the layer's parameters made anew: what does not
        come is then lost.
        """
        self.slots: dict[str, dict[Any, set[int]]] = {}
        """Parameter -> shard -> slots that this shard was seen to be put into by the map."""
        self.rows: dict[str, dict[Any, Signature]] = {}
        """Parameter -> shard -> signatures of rows that came by position, slot by slot."""
        self.stacked: dict[str, dict[Any, Signature]] = {}
        """Tensor of the checkpoint with all experts -> dtype -> signatures of the rows that this
        rank's slots should hold.
        """
        self.names: tuple[str, ...] = vars(layer).get(_NAMES) or _per_slot(layer)
        """Parameters of the checkpoint's form with a row for each slot."""
        object.__setattr__(layer, _NAMES, self.names)
        self.before = {
            name: signature(layer._parameters[name])
            for name in self.names
            if not serving and self._watched(layer, name)
        }

    def _watched(self, layer: Any, name: str) -> bool:
        """Tell whether writing past ``weight_loader`` must be noticed.

        So it must for scales and biases, which a checkpoint may leave out.
        """
        return self.moved and _WEIGHT.match(name) is None and not layer._parameters[name].is_meta

    def note(self, name: str, shard: Any, slots: Any) -> None:
        """Note that this shard of a parameter was put into these slots, by the map."""
        self.slots.setdefault(name, {}).setdefault(shard, set()).update(map(int, slots))

    def saw(self, layer: Any, name: str, tensor: Any) -> None:
        """Take down what this rank's slots should hold of a tensor of the checkpoint.

        The tensor is ``[experts, ...]``.
        """
        import torch

        self.layerwise |= any(p is not None and p.is_meta for p in layer._parameters.values())
        experts = slot_experts(layer).tolist()
        mine = tensor[
            torch.tensor(
                [e if 0 <= e < tensor.shape[0] else 0 for e in experts], device=tensor.device
            )
        ]
        dtypes = {tensor.dtype}
        if tensor.is_floating_point():
            params = filter(None.__ne__, map(layer._parameters.get, self.names))
            dtypes |= {p.dtype for p in params if p.is_floating_point()}
        self.stacked[name] = {dtype: signature(mine.to(dtype)) for dtype in dtypes}

    def proven(self, found: Signature, dtype: Any, routed: list[int]) -> bool:
        """Tell whether some tensor of the checkpoint has these contents, slot by slot."""
        return any(
            (by_dtype[dtype][routed] == found[routed]).all()
            for by_dtype in self.stacked.values()
            if dtype in by_dtype
        )

    def settle(self, layer: Any) -> None:
        """Prove by their contents the parameters that were not filled one expert at a time.

        Called while parameters still have the form of the checkpoint, before the kernel's.

        Raises:
            PlacementError: for rows that came by position and are not those of the map.
        """
        if not self.moved:
            return
        routed = _routed(layer)
        for name in self.names:
            param = layer._parameters.get(name)
            if self.complete(layer, name, routed) or param is None or not routed:
                continue
            if name in self.rows:
                dtype, shards = self.rows[name].pop("dtype"), self.rows.pop(name)
                right = self.proven(sum(shards.values()), dtype, routed)
            elif param.is_meta:
                continue
            elif self.stacked and self.proven(signature(param), param.dtype, routed):
                right = True
            elif name in self.before and not (self.before[name] == signature(param)).all():
                right = all(bool((param[slot] == param[routed[0]]).all()) for slot in routed)
            else:
                continue
            if not right:
                raise PlacementError(
                    f"{layer.layer_name}: {name} of many experts was copied at once by position, "
                    f"past the map of experts: {MEND}"
                )
            self.note(name, _BY_CONTENTS, routed)

    def complete(self, layer: Any, name: str, routed: list[int]) -> bool:
        """Tell whether every slot of a routed expert was filled with the whole of this parameter.

        It counts as filled when it was seen to be.
        """
        wanted = set(routed)
        full = {shard for shard, slots in self.slots.get(name, {}).items() if wanted <= slots}
        if full & set(_WHOLE):
            return True
        if name.startswith("w13"):
            gated = getattr(layer.moe_config, "is_act_and_mul", True)
            return {"w1", "w3"} <= full if gated else bool(full)
        return bool(full)


def watch(layer: Any, moved: bool, serving: bool = False) -> None:
    """Note from now on what is loaded into a layer.

    Args:
        layer: a ``RoutedExperts`` whose parameters were just made, or are about to be loaded anew.
        moved, serving: as `Evidence` takes them.
    """
    _watch_override(layer)
    object.__setattr__(layer, EVIDENCE, Evidence(layer, moved, serving))


def _dims(param: Any) -> int:
    """Return the dimensions of a parameter, -1 if it is made when its weight comes (GGUF)."""
    from torch.nn.parameter import UninitializedParameter

    return -1 if param is None or isinstance(param, UninitializedParameter) else param.dim()


def _per_slot(layer: Any) -> tuple[str, ...]:
    params = layer._parameters.items()
    return tuple(
        name for name, p in params if _dims(p) > 0 and p.shape[0] == layer.local_num_experts
    )


def _routed(layer: Any) -> list[int]:
    """Return the slots that hold a routed expert, shared ones left out."""
    return [
        slot for slot, e in enumerate(slot_experts(layer).tolist()) if 0 <= e < num_logical(layer)
    ]


def _watch_override(layer: Any) -> None:
    """Watch a class with a ``weight_loader`` of its own (gpt-oss) too.

    Parameters that exist already get the watched one.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    own = type(layer).weight_loader
    if own is RoutedExperts.weight_loader or "weight_loader" in layer.__dict__:
        return
    watched = MethodType(functools.wraps(own)(_weight_loader(own)), layer)
    object.__setattr__(layer, "weight_loader", watched)
    for param in layer._parameters.values():
        loader = getattr(param, "weight_loader", None)
        if getattr(loader, "__func__", None) is own:
            param.weight_loader = watched


def _weight_loader(original):
    """Wrap ``RoutedExperts.weight_loader`` and the overrides of it.

    They may call each other: the outermost notes.
    """

    def weight_loader(
        self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
    ):
        if self.__dict__.get("_moe_placement_inside"):
            return original(
                self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
            )
        if hasattr(self, EXPECTED):
            object.__delattr__(self, EXPECTED)  # the digests are of the old weights
        name = next(
            (n for n, p in self._parameters.items() if p is param), weight_name.rpartition(".")[2]
        )
        bulk = _is_bulk(param, loaded_weight, shard_id, expert_id)
        evidence = getattr(self, EVIDENCE, None)
        if evidence is not None:
            evidence.layerwise |= param.is_meta
        if bulk:
            _note_rows(self, evidence, name, shard_id, param, loaded_weight, weight_name)
        object.__setattr__(self, "_moe_placement_inside", True)
        try:
            done = None
            for copy in (expert_id,) if bulk else local_copies(self, expert_id, weight_name):
                done = (
                    original(
                        self, param, loaded_weight, weight_name, shard_id, copy, *args, **kwargs
                    )
                    or done
                )
                slot = -1 if bulk else self.expert_map_manager.map_global_to_local(copy)
                if evidence is not None and slot >= 0:
                    evidence.note(name, shard_id, [slot])
        finally:
            object.__delattr__(self, "_moe_placement_inside")
        wants = kwargs.get("return_success", args[0] if args else False)
        return bool(done) if wants else done

    return weight_loader


def _is_bulk(param: Any, loaded: Any, shard: Any, expert: Any) -> bool:
    """Tell whether a tensor is of all slots at once, by position."""
    return expert is None or (loaded.dim() == _dims(param) >= 2 and shard not in _WHOLE)


def _note_rows(
    layer: Any, evidence: Any, name: str, shard: Any, param: Any, loaded: Any, full_name: str
) -> None:
    if loaded.shape[0] != param.shape[0]:
        return
    if evidence is None:  # new weights, given to the model without any of vLLM's ways to update
        if moved_slots(layer) and vars(layer).get(IN_ORDER) is None:
            raise PlacementError(
                f"{layer.layer_name}: new weights of {full_name} come by position, past the "
                f"placement of experts: {MEND}"
            )
        return
    if not evidence.moved:
        evidence.note(name, shard, range(param.shape[0]))
    elif not evidence.stacked:
        raise PlacementError(
            f"{layer.layer_name}: the checkpoint brings {full_name} of {loaded.shape[0]} experts "
            "at once, which vLLM copies by position, past "
            f"the map of experts: {MEND}"
        )
    else:
        evidence.rows.setdefault(name, {"dtype": loaded.dtype})[shard] = signature(loaded)


def check_evidence(layer: Any, whole: bool = True) -> None:
    """Refuse a layer of whose slots less than all were seen to be filled by the map in force.

    A layer of which nothing was seen is refused too.

    Args:
        layer: a ``RoutedExperts`` after loading.
        whole: False for new weights of a model that serves, which may leave a layer as it is.

    Raises:
        PlacementError: naming layer, weight, slot and expert.
    """
    evidence: Evidence | None = getattr(layer, EVIDENCE, None)
    if evidence is None:
        return
    object.__delattr__(layer, EVIDENCE)
    if not whole and not evidence.layerwise:
        return  # what does not come stays as it was
    routed, experts = _routed(layer), slot_experts(layer)
    rank = layer.expert_map_manager.ep_rank
    for weight, shards in evidence.slots.items():
        for shard, slots in shards.items():
            missing = sorted(set(routed) - slots)
            if missing and slots & set(routed):
                raise PlacementError(
                    f"{layer.layer_name}: the checkpoint brought {weight} ({shard}) for "
                    f"{len(routed) - len(missing)} of {len(routed)} slots "
                    f"of EP rank {rank}; slot {missing[0]} (expert {experts[missing[0]]}) was "
                    "never filled: the checkpoint is "
                    "incomplete, or a loader left the placement out of account; use a complete "
                    "checkpoint with a tensor per expert"
                )
    if not evidence.moved or not routed or not (whole or evidence.slots or evidence.stacked):
        return
    known = tuple(dict.fromkeys((*evidence.names, *evidence.slots)))
    for stem in ("w13", "w2"):
        names = [n for n in known if n.startswith(f"{stem}_") and _WEIGHT.match(n)] or list(known)
        if not any(evidence.complete(layer, name, routed) for name in names):
            came = {shard for name in names for shard in evidence.slots.get(name, {})}
            seen = f"only its part {', '.join(map(str, sorted(came)))}" if came else "nothing"
            raise PlacementError(
                f"{layer.layer_name}: {seen} was seen to be put into "
                f"{names[0] if names else 'its parameters'} by the map of experts on EP rank "
                f"{rank} (slot {routed[0]} "
                f"should hold expert {experts[routed[0]]}): this model or loader copies weights "
                f"by position or in a way of its own; {MEND}"
            )


def evidence_patches() -> list[Patch]:
    """Return the patch that watches the loader."""
    return [
        Patch(
            "filled-slots",
            "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.weight_loader",
            _weight_loader,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
            why="a slot that no weight was loaded into is served without a word",
            upstream="vLLM issue 55228",
            removable_when="vLLM checks that every slot was filled",
        )
    ]
