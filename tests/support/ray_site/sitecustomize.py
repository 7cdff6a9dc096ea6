"""Have vLLM's CPU platform name a device for Ray: on ``PYTHONPATH``.

Else it refuses (``current platform cpu does not support ray``).

One pretended GPU of a Ray node stands for one CPU rank; ``ray start --num-gpus`` says how many a
node has. Under Ray the CPU build names its shared memory alike on all hosts and takes them for one
(``open shm in SHMManager failed``): names get the host's.
"""

import socket

from wrapt import register_post_import_hook


def _name_device(module):
    module.CpuPlatform.ray_device_key = "GPU"


def _name_host(module):
    shared = module._CPUSHMDistributed
    original = shared.make_group_name
    shared.make_group_name = staticmethod(
        lambda communicator: f"{socket.gethostname()}-{original(communicator)}"
    )


register_post_import_hook(_name_host, "vllm.distributed.device_communicators.cpu_communicator")
register_post_import_hook(_name_device, "vllm.platforms.cpu")
