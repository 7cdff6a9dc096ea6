"""All ranks of a vLLM on one GPU, for tests: on PYTHONPATH of its processes.

NCCL refuses two ranks on one device, so they talk over gloo, which takes CUDA tensors. Kernels, loaders, expert maps and EPLB are
the real ones; speed means nothing. Needs ``disable_custom_all_reduce`` and ``VLLM_DISABLE_PYNCCL=1``, and no CUDA graphs.
"""

import functools

from wrapt import when_imported


@when_imported("vllm.platforms.cuda")
def talk_over_gloo(module):
    module.CudaPlatformBase.dist_backend = "gloo"


@when_imported("vllm.v1.worker.gpu_worker")
def share_the_first_gpu(module):
    original = module.Worker.init_device

    @functools.wraps(original)
    def init_device(self, *args, **kwargs):
        self.local_rank = 0
        return original(self, *args, **kwargs)

    module.Worker.init_device = init_device
