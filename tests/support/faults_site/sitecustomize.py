"""Faults while vLLM loads a model, for tests: on PYTHONPATH of its processes, chosen by TEST_LOAD_FAULT."""

import os

from wrapt import register_post_import_hook

_EXPERTS = "vllm.model_executor.layers.fused_moe.routed_experts"


def _wrap_loader(change):
    def install(module):
        original = module.RoutedExperts.weight_loader

        def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs):
            # The clean load of --expert-placement-verify checkpoint is left alone: only placed layers are watched.
            if "_moe_placement_filled" in self.__dict__:
                expert_id = change(self, expert_id)
                if expert_id is None:
                    return kwargs.get("return_success", False) or None
            return original(self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs)

        module.RoutedExperts.weight_loader = weight_loader

    _after_the_plugin(install)


def _after_the_plugin(install):
    """Around the plugin's own patches, which were asked for when the settings arrived, before any loader is imported."""
    register_post_import_hook(
        lambda _: register_post_import_hook(install, _EXPERTS), "vllm.model_executor.model_loader.default_loader"
    )


def _one_rank_skips(layer, expert_id):
    return None if (expert_id, layer.expert_map_manager.ep_rank) == (9, 1) and ".2." in layer.layer_name else expert_id


def _neighbour(layer, expert_id):
    return (expert_id + 1) % 30 if ".1." in layer.layer_name else expert_id


def _filter_as_upstream(module):
    module._compute_local_expert_ids = lambda original: original


def _other_map(module):
    original = module.RoutedExperts.__init__

    def __init__(self, layer_name, *args, **kwargs):
        original(self, layer_name, *args, **kwargs)
        manager = self.expert_map_manager
        if ".3." in layer_name:
            manager._expert_map = manager._expert_map.roll(1)
            self.update_expert_map_info()

    module.RoutedExperts.__init__ = __init__


FAULT = os.environ.get("TEST_LOAD_FAULT")
if FAULT == "filter as upstream":
    register_post_import_hook(_filter_as_upstream, "moe_placement_plugin.engines.vllm.static")
elif FAULT == "replica never filled":
    _wrap_loader(_one_rank_skips)
elif FAULT == "neighbour's weights":
    _wrap_loader(_neighbour)
elif FAULT == "map changed":
    _after_the_plugin(_other_map)
