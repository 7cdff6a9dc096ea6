"""Plant faults while vLLM loads a model, for tests.

It is on PYTHONPATH of its processes; TEST_LOAD_FAULT chooses the fault.
"""

import functools
import os

from wrapt import register_post_import_hook


def _wrap_loader(change):
    def install(experts):
        original = experts.weight_loader

        @functools.wraps(original)
        def weight_loader(
            self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
        ):
            # The clean load of --expert-placement-verify checkpoint is left alone: only placed
            # layers are watched.
            if "_moe_placement_evidence" in self.__dict__:
                expert_id = change(self, expert_id)
                if expert_id is None:
                    return kwargs.get("return_success", False) or None
            return original(
                self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
            )

        experts.weight_loader = weight_loader

    _around("filled-slots", install)


def _around(patch, install):
    """Change RoutedExperts right after the plugin's own patch of that name.

    So the fault comes from outside of it.
    """

    def hook(module):
        apply = module.Patch.apply

        def apply_and_install(self):
            before = self.state
            apply(self)
            if self.name == patch and before != "applied" and self.state == "applied":
                install(self._owner()[0])

        module.Patch.apply = apply_and_install

    register_post_import_hook(hook, "moe_placement_plugin.engines.common.patching")


def _one_rank_skips(layer, expert_id):
    return (
        None
        if (expert_id, layer.expert_map_manager.ep_rank) == (9, 1) and ".2." in layer.layer_name
        else expert_id
    )


def _neighbour(layer, expert_id):
    return (expert_id + 1) % 30 if ".1." in layer.layer_name else expert_id


def _filter_as_upstream(module):
    """Have the loader's filter go by a strategy of its own, whatever the layers' maps are."""
    module._compute_local_expert_ids = lambda original: (
        lambda experts, size, rank, placement: original(experts, size, rank, "linear")
    )


def _other_map(experts):
    original = experts.__init__

    def __init__(self, layer_name, *args, **kwargs):
        original(self, layer_name, *args, **kwargs)
        manager = self.expert_map_manager
        if ".3." in layer_name:
            manager._expert_map = manager._expert_map.roll(1)
            self.update_expert_map_info()

    experts.__init__ = __init__


def _rows_as_stock(module):
    """Have models copy rows of stacked tensors by position, and nobody permute them.

    It gives upstream's wrong answers of gpt-oss.
    """
    module._splits = lambda model: frozenset()
    module._picks = lambda model: {}


def _loader_of_its_own(module):
    """Give a loader a load_model of its own, as out-of-tree ones have.

    It goes past the check of what was loaded.
    """
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.BaseModelLoader.load_model
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__
    module.DefaultModelLoader.load_model = original


def _first_table(module):
    """Put new weights where vLLM's loader believes the experts, whatever EPLB has moved since."""
    module.local_copies = lambda layer, expert_id, weight_name: (expert_id,)


FAULT = os.environ.get("TEST_LOAD_FAULT")
if FAULT == "filter as upstream":
    register_post_import_hook(_filter_as_upstream, "moe_placement_plugin.engines.vllm.expert_maps")
elif FAULT == "replica never filled":
    _wrap_loader(_one_rank_skips)
elif FAULT == "neighbour's weights":
    _wrap_loader(_neighbour)
elif FAULT == "map changed":
    _around("layer-placement", _other_map)
elif FAULT == "rows as stock":
    register_post_import_hook(_rows_as_stock, "moe_placement_plugin.engines.vllm.stacked")
elif FAULT == "loader of its own":
    register_post_import_hook(_loader_of_its_own, "vllm.model_executor.model_loader.default_loader")
elif FAULT == "new weights by the first table":
    register_post_import_hook(_first_table, "moe_placement_plugin.engines.vllm.reload_table")
