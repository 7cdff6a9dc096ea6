"""On ``PYTHONPATH``: vLLM's CPU platform names a device for Ray, else it refuses (``current platform cpu does not support ray``).

One pretended GPU of a Ray node stands for one CPU rank; ``ray start --num-gpus`` says how many a node has.
"""

from wrapt import register_post_import_hook


def _name_device(module):
    module.CpuPlatform.ray_device_key = "GPU"


register_post_import_hook(_name_device, "vllm.platforms.cpu")
