"""Say what an SGLang is started with, as far as this plugin cares.

The rules of `support` look at it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ..common.request import Request
from . import compat

SWITCHES = (
    "elastic_ep_backend",
    "enable_eplb",
    "elastic_ep_rejoin",
    "ep_join_mode",
    "max_ep_size",
    "enable_elastic_expert_backup",
    "enable_waterfill",
    "enable_lora",
    "lora_paths",
    "kt_weight_path",
    "expert_distribution_recorder_mode",
    "enable_nvidia_megakernel",
    "enable_amd_monokernel",
    "use_ray",
    "enforce_shared_experts_fusion",
    "enable_two_batch_overlap",
    "remote_instance_weight_loader_start_seed_via_transfer_engine",
)
"""Arguments of SGLang's that rules ask for, each switched on where it has a value."""


@dataclass(frozen=True)
class Combination:
    """Say what an engine is started with, as far as this plugin cares.

    Attributes:
        version: SGLang's version.
        architecture: name of the model class in the checkpoint's config.
        has_location: whether the model class has ``get_model_config_for_expert_location``.
        redundant: redundant experts per layer, padding included.
        device: ``cuda``, ``cpu``, ...
        a2a_backend: value of ``--moe-a2a-backend`` as resolved.
        runner_backend: value of ``--moe-runner-backend`` as resolved.
        quantization: quantization method, empty for none.
        dispatch: ``--ep-dispatch-algorithm`` as the user gave it, empty for SGLang's choice.
        load_format: value of ``--load-format``.
        options: other options that are switched on, by name.
        tp_size: value of ``--tp-size``.
        ep_size: value of ``--ep-size``.
        pp_size: value of ``--pp-size``.
        attention_dp: groups of ranks whose attention has tokens of its own.
        algorithm: value of ``--eplb-algorithm`` as resolved.
        plans: whether our planner is to rebalance under EPLB.
        level: how far weights are verified.
        places: whether a placement was asked for.
    """

    version: str
    architecture: str = ""
    has_location: bool = True
    redundant: int = 0
    device: str = "cuda"
    a2a_backend: str = "none"
    runner_backend: str = "auto"
    quantization: str = ""
    dispatch: str = ""
    load_format: str = "auto"
    options: frozenset[str] = frozenset()
    tp_size: int = 2
    ep_size: int = 2
    pp_size: int = 1
    attention_dp: int = 1
    algorithm: str = "auto"
    plans: bool = False
    level: str = "off"
    places: bool = True


def combination_of(server_args: Any, request: Request) -> Combination:
    """Read off resolved ``ServerArgs`` what the engine is started with.

    Args:
        server_args: SGLang's, once it has resolved its own arguments.
        request: what the user asked of this plugin.
    """
    import sglang

    cfg, config = compat.resolved(server_args), compat.model_config(server_args)
    a2a = str(cfg.moe_a2a_backend or "none")
    return Combination(
        version=sglang.__version__,
        architecture=_architecture(config) if request.places else "",
        has_location=not request.places or location_shape(config) is not None,
        redundant=int(cfg.ep_num_redundant_experts),
        device=str(cfg.device).split(":")[0],
        a2a_backend=a2a,
        runner_backend=str(cfg.moe_runner_backend or "auto"),
        quantization=_quantization(cfg, config),
        dispatch=request.dispatch or "",
        load_format=str(getattr(cfg.load_format, "value", cfg.load_format)),
        options=_options(cfg),
        tp_size=int(cfg.tp_size),
        ep_size=int(cfg.ep_size),
        pp_size=int(cfg.pp_size),
        attention_dp=compat.attention_dp_width(cfg),
        algorithm=str(getattr(cfg, "eplb_algorithm", "auto")),
        plans=request.plans,
        places=request.places,
    )


def _options(cfg: Any) -> frozenset[str]:
    """Name the options that are switched on; those with a value of their own as they are typed."""
    found = {name for name in SWITCHES if getattr(cfg, name, None)}
    if str(getattr(cfg, "weight_cache_mode", None) or "off") != "off":
        found.add("weight_cache_mode")
    if getattr(cfg, "startup_weight_load_mode", None) == "overlap":
        found.add("startup_weight_load_mode")
    if "sglang.srt.ray.engine" in sys.modules:  # newer versions have no flag for it
        found.add("use_ray")
    if _has_amx_kernels():
        found.add("cpu_amx")
    given = {
        "--cpu-offload-gb": getattr(cfg, "cpu_offload_gb", 0) > 0,
        "--offload-group-size": getattr(cfg, "offload_group_size", -1) > 0,
        "--enable-memory-saver": getattr(cfg, "enable_memory_saver", False),
    }
    return frozenset(found | {option for option, switched_on in given.items() if switched_on})


def location_shape(model_config: Any) -> Any:
    """Return SGLang's ``ModelConfigForExpertLocation`` of a model, None when its class has none."""
    from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation

    return ModelConfigForExpertLocation.from_model_config(model_config)


def _architecture(model_config: Any) -> str:
    """Return the class that SGLang will build.

    It is another than ``config.json`` names with ``--model-impl transformers``.
    """
    from sglang.srt.model_loader import get_model_architecture

    return get_model_architecture(model_config)[1]


def _has_amx_kernels() -> bool:
    from sglang.srt.utils import cpu_has_amx_support

    return bool(cpu_has_amx_support())


def _quantization(cfg: Any, config: Any) -> str:
    """Return the quantization that SGLang will load by, empty for none.

    Its ``ModelConfig`` reads what ``config.json`` does not say (``hf_quant_config.json`` of
    ModelOpt's checkpoints).

    Args:
        cfg: SGLang's resolved arguments.
        config: SGLang's ``ModelConfig``.
    """
    own = getattr(config, "quantization", None)
    return str(own or cfg.quantization or _checkpoint_quantization(config.hf_config))


def _checkpoint_quantization(hf_config: Any) -> str:
    quantization = getattr(hf_config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = getattr(quantization, "to_dict", dict)()
    return str(quantization.get("quant_method", "") or "")
