"""LoRA adapters of experts follow the expert map in force, which vLLM cuts into contiguous blocks of experts.

An adapter has a pair of matrices for each logical expert, in the model's order. vLLM keeps on each rank those of its own
experts, which it takes to be ``ep_rank * local_num_experts`` onwards, and its kernels read the one of a slot by the slot's
number. Here each slot of each layer gets the matrices of the expert that the layer's map puts there, for any numbers of slots.

Under EPLB base weights move and adapters would stay: an adapter with experts is refused there when it is read, before
anything that serves is overwritten. Adapters of other modules need none of this and are never refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.errors import PlacementError
from ..common.patching import Patch, PatchSet
from .layers import layer_id_of, num_logical, slot_experts
from .state import STATE

_MANAGER = "vllm.lora.model_manager:LoRAModelManager"


def experts_of_slots(module: Any) -> list[int] | None:
    """The logical expert of each local slot of a MoE layer with adapters, in the order of the slots.

    Args:
        module: a ``FusedMoEWithLoRA``.

    Returns:
        None where no placement of ours is in force, so that vLLM's own cut is right.

    Raises:
        PlacementError: when a slot holds no routed expert, so that no adapter belongs to it.
    """
    settings = STATE.settings
    if settings is None or settings.static is None or not getattr(module, "use_ep", False):
        return None
    layer = module.base_layer.routed_experts
    experts = slot_experts(layer).tolist()
    strange = [slot for slot, expert in enumerate(experts) if not 0 <= expert < num_logical(layer)]
    if strange:
        raise PlacementError(
            f"{layer.layer_name}: slot {strange[0]} of EP rank {layer.expert_map_manager.ep_rank} holds no routed "
            "expert (a fused shared expert), which adapters know nothing of: leave --enable-lora or the placement "
            "flag out"
        )
    return experts


class _OnlyLocal:
    """A ``FusedMoEWithLoRA`` as the cutting code sees it once the rows of other ranks are gone: one rank has all experts."""

    ep_rank = 0

    def __init__(self, module: Any):
        self._module = module

    @property
    def global_num_experts(self) -> int:
        """Experts that the rows are of."""
        return self._module.local_num_experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _keep_rows(lora: Any, experts: list[int], num_experts: int, module_name: str) -> None:
    """Reduce fused adapter matrices of all experts to those of ``experts``, in that order.

    Args:
        lora: vLLM's ``LoRALayerWeights``: ``lora_a [experts * rank, in]``, the expert being the slower index, and
            ``lora_b [out, rank * experts]``, the expert being the faster one.
        experts: logical expert of each slot.
        num_experts: logical experts of the layer.
        module_name: for the message.
    """
    rows = lora.lora_a.shape[0]
    if rows % num_experts:
        if rows % len(experts) == 0 and not lora.lora_a.any() and not lora.lora_b.any():
            return  # vLLM up to 0.32 makes the empty adapters of its warm-up for local experts only
        raise PlacementError(
            f"{module_name}: the adapter has {rows} rows for {num_experts} experts, which do not divide: give an "
            "adapter that was trained on this model"
        )
    a, b = lora.lora_a, lora.lora_b
    lora.lora_a = a.reshape(num_experts, -1, a.shape[-1])[experts].flatten(0, 1)
    lora.lora_b = b.reshape(b.shape[0], -1, num_experts)[..., experts].flatten(1)


def _fused(cut):
    """For the two methods that cut a fused (3D) adapter: ``[gate and up, down]`` of all experts at once."""

    def make(original):
        def method(self, lora_model, module, module_name):
            import torch

            experts = experts_of_slots(module)
            down = self._get_lora_layer_weights(lora_model, module_name)
            gate_up = self._get_lora_layer_weights(lora_model, module_name + ".base_layer")
            whole = (
                down is not None and gate_up is not None and all(map(torch.is_tensor, (down.lora_a, gate_up.lora_a)))
            )  # fmt: skip
            if experts is None or not whole:
                return original(self, lora_model, module, module_name)
            if cut == "stacked" and not self._is_3d_moe_model:
                raise PlacementError(
                    f"{module_name}: an adapter of all experts in one tensor, for a model whose experts vLLM does not "
                    "know to be stacked: use an adapter with a tensor per expert, or leave the placement flag out"
                )
            for lora in (gate_up, down):
                _keep_rows(lora, experts, module.global_num_experts, module_name)
            return original(self, lora_model, _OnlyLocal(module), module_name)

        return method

    return make


def _slice_moe_lora_ep(original):
    def _slice_moe_lora_ep(self, lora_model, module, module_name):
        experts = experts_of_slots(module)
        lora = self._get_lora_layer_weights(lora_model, module_name)
        if experts is None or lora is None or not isinstance(lora.lora_a, list):
            return original(self, lora_model, module, module_name)
        # Only adapters whose outer factors all experts share arrive whole; others were packed by slots.
        if getattr(self, "_enable_moe_shared_loras", False) or module.local_num_experts != (
            module.global_num_experts
        ):
            every = module.global_num_experts

            def of_slots(factor: Any) -> Any:
                whole = factor is not None and factor.shape[0] == every
                return factor[experts].contiguous() if whole else factor

            lora.lora_a = [of_slots(factor) for factor in lora.lora_a]
            lora.lora_b = [of_slots(factor) for factor in lora.lora_b]
        return None

    return _slice_moe_lora_ep


def _restrict_to_local_experts(original):
    def _restrict_to_local_experts(self, module_name, new_module_names):
        from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

        module = self.modules.get(module_name)
        separate = isinstance(module, FusedMoEWithLoRA) and not isinstance(
            module, FusedMoE3DWithLoRA
        )
        experts = experts_of_slots(module) if separate else None
        if experts is None:
            return original(self, module_name, new_module_names)
        if getattr(self, "_enable_moe_shared_loras", False):
            return new_module_names  # three stacks, cut by `_slice_moe_lora_ep`
        per_expert, rest = divmod(len(new_module_names), module.global_num_experts)
        if rest or not per_expert:
            raise PlacementError(
                f"{module_name}: {len(new_module_names)} adapter modules for {module.global_num_experts} experts do "
                "not divide: leave --enable-lora or the placement flag out"
            )
        return [
            name
            for expert in experts
            for name in new_module_names[expert * per_expert : (expert + 1) * per_expert]
        ]

    return _restrict_to_local_experts


@dataclass(frozen=True)
class ExpertsByLayer:
    """Which experts' adapters this rank reads; in place of vLLM's ``MoEEPLoadSpec``, which has one block for all layers.

    Attributes:
        experts: the layer's index in the model -> its experts on this rank.
    """

    experts: dict[int, frozenset[int]]


def _build_moe_ep_load_spec(original):
    def _build_moe_ep_load_spec(self):
        from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

        spec = original(self)
        if spec is None:
            return None
        found: dict[int, list[frozenset[int]]] = {}
        for name, module in self.modules.items():
            experts = experts_of_slots(module) if isinstance(module, FusedMoEWithLoRA) else None
            layer_id = layer_id_of(name)
            if experts is not None and layer_id is not None:
                found.setdefault(layer_id, []).append(frozenset(experts))
        if not found:
            return spec
        # Two towers of a model may both have a layer 3: what cannot be told apart is read.
        return ExpertsByLayer({n: sets[0] for n, sets in found.items() if len(sets) == 1})

    return _build_moe_ep_load_spec


def _is_remote_expert_key(original):
    def _is_remote_expert_key(raw_name, spec):
        if not isinstance(spec, ExpertsByLayer):
            return original(raw_name, spec)
        expert = raw_name.rpartition(".experts.")[2].partition(".")[0]
        layer_id = layer_id_of(raw_name)
        local = None if layer_id is None else spec.experts.get(layer_id)
        return local is not None and expert.isdecimal() and int(expert) not in local

    return _is_remote_expert_key


def check_adapter(lora_model: Any, name: str) -> None:
    """Refuse an adapter with experts where EPLB moves the base weights of experts and adapters stay.

    Args:
        lora_model: vLLM's ``LoRAModel``, read and not yet in force.
        name: what the user called the adapter.

    Raises:
        PlacementError: naming the adapter and one of its modules.
    """
    settings = STATE.settings
    if settings is None or not settings.rebalancing.moves:
        return
    experts = sorted(key for key in lora_model.loras if ".experts" in key)
    if experts:
        raise PlacementError(
            f"adapter {name} has weights for experts ({experts[0]}), and with --enable-eplb the experts' base weights "
            "move while adapters stay: leave --enable-eplb out, the placement then holds for adapters too; or use an "
            "adapter of other modules"
        )


def _load_adapter(original):
    def _load_adapter(self, lora_request):
        lora_model = original(self, lora_request)
        check_adapter(lora_model, lora_request.lora_name)
        return lora_model

    return _load_adapter


def lora_patches() -> PatchSet:
    """The patches of a server with a placement and ``--enable-lora``."""
    why = "vLLM takes the experts of a rank to be one contiguous block: each slot would get another expert's adapter"
    upstream, until = "vLLM PR 40867, PR 38021", "vLLM cuts adapters by the layer's expert map"
    fused = ("lora_model", "module", "module_name")

    def patch(name, target, make, relies_on):
        return Patch(name, target, make, why, relies_on, upstream, until)

    return PatchSet(
        [
            patch("lora-stacked", f"{_MANAGER}._stack_moe_lora_weights", _fused("stacked"), fused),
            patch("lora-3d-to-2d", f"{_MANAGER}._convert_3d_to_2d_moe_lora", _fused("converted"), fused),
            patch("lora-shared", f"{_MANAGER}._slice_moe_lora_ep", _slice_moe_lora_ep, fused),
            patch(
                "lora-per-expert", f"{_MANAGER}._restrict_to_local_experts", _restrict_to_local_experts,
                ("module_name", "new_module_names"),
            ),
            patch("lora-spec", f"{_MANAGER}._build_moe_ep_load_spec", _build_moe_ep_load_spec, ("self",)),
            patch(
                "lora-read", "vllm.lora.lora_model:_is_remote_expert_key", _is_remote_expert_key, ("raw_name", "spec")
            ),
            Patch(
                "lora-eplb", "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter", _load_adapter,
                why="EPLB moves the base weights of experts and leaves their adapters where they were",
                relies_on=("lora_request",),
                removable_when="vLLM's EPLB moves adapters with their experts",
            ),
        ]
    )  # fmt: skip
