"""Prepare a process of the zoo once, before it forks the others.

It sets vLLM's environment, and gives what tiny models lack.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

from tests.zoo.vllm import engine, stand_ins


def clean_environment() -> None:
    """Set what vLLM reads of the environment when it is imported.

    It goes without Kimi K3's own all-reduce, whose module imports what only GPUs' builds have.
    """
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        OMP_NUM_THREADS="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_PLUGINS="moe_placement",
        TRANSFORMERS_VERBOSITY="error",
        GLOO_SOCKET_IFNAME="lo",
        VLLM_DIST_IDENT=f"zoo{os.getpid()}",
        VLLM_KIMI_K3_GEMM_AR="0",
    )


def prepare_process() -> None:
    """Let vLLM look at model classes in this process, and note what its loader leaves in slots."""
    from vllm.model_executor.model_loader import base_loader, default_loader
    from vllm.model_executor.models import registry

    # In a process of its own, which takes 10 s for each class.
    def inspect_here(self):
        try:
            return registry._ModelInfo.from_model_cls(self.load_model_cls())
        except Exception as error:  # vLLM says no more than that it could not
            raise TypeError(f"{self.class_name}: {error}") from error

    registry._LazyRegisteredModel.inspect_model_cls = inspect_here
    registry._try_inspect_model_cls = lambda name, model: model.inspect_model_cls()
    _stand_in_for_torchvision()
    _stand_in_for_processors()
    _know_every_model_type()
    # Checkpoints of the zoo hold the experts; the rest is filled below.
    default_loader.DefaultModelLoader.track_weights_loading = lambda *args, **kwargs: None
    process = base_loader.process_weights_after_loading

    def note_and_process(model, *args, **kwargs):
        engine.note_loaded(model)
        engine.fill_rest(model)
        if not stand_ins.loaded_only():
            process(model, *args, **kwargs)

    base_loader.process_weights_after_loading = note_and_process


class _AnyAttribute(type):
    """Have every attribute, each another one."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Anything(types.ModuleType):
    """Stand for a module or class that has every attribute."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _TorchvisionFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find torchvision, and nothing in it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.28.0"


def _stand_in_for_torchvision() -> None:
    """Have models that import torchvision, for images, build their language model without."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_TorchvisionFinder())


def _stand_in_for_processors() -> None:
    """Tell models that ask the checkpoint's processor what it can see: images.

    None is shown to them.
    """
    from vllm.multimodal.processing.context import InputProcessingContext

    images_only = types.SimpleNamespace(image_processor=None)
    InputProcessingContext.get_hf_processor = lambda *args, **kwargs: images_only


def _know_every_model_type() -> None:
    """Know configs of models whose config class comes with the checkpoint.

    These configs are as plain as theirs.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from tests.zoo.vllm.recipes import RECIPES

    for recipe in RECIPES.values():
        kind = recipe.config["model_type"]
        if kind not in CONFIG_MAPPING and kind not in _CONFIG_REGISTRY:
            name = f"Config_{kind}"
            own = {"model_type": kind, "__module__": __name__}
            if "vision_config" in recipe.config and "text_config" not in recipe.config:
                own["__post_init__"] = _with_vision
            if "text_config" in recipe.config:
                own["__post_init__"] = _with_text
            made = type(name, (PretrainedConfig,), own)
            globals()[name] = made  # a worker's config arrives as a pickle
            AutoConfig.register(kind, made)


def _with_vision(self: Any, vision_config: Any = None, **kwargs: Any) -> None:
    """Return a config's ``vision_config`` as a config of its own.

    It is for classes of transformers that make it none.
    """
    from transformers import PretrainedConfig

    if isinstance(vision_config, dict):
        vision_config = PretrainedConfig(**vision_config)
    PretrainedConfig.__post_init__(self, vision_config=vision_config, **kwargs)


def _with_text(self: Any, text_config: Any = None, **kwargs: Any) -> None:
    """Return a config's ``text_config`` as the config of its own ``model_type``, likewise."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(text_config, dict):
        text_config = AutoConfig.for_model(**text_config)
    PretrainedConfig.__post_init__(self, text_config=text_config, **kwargs)
