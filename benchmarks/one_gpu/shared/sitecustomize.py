"""All ranks of an engine on one GPU: on PYTHONPATH of its processes.

NCCL refuses two ranks on one device, so they talk over gloo, which takes CUDA tensors. Kernels, loaders, expert maps and EPLB are
the real ones, and so are the answers; speed means nothing. Without custom all-reduce and CUDA graphs, and vLLM needs ``VLLM_DISABLE_PYNCCL=1``.
"""

import functools
import inspect

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


@when_imported("sglang.srt.managers.scheduler")
def run_on_the_first_gpu(module):
    original = module.run_scheduler_process

    @functools.wraps(original)
    def run(*args, **kwargs):
        given = inspect.signature(original).bind(*args, **kwargs)
        given.arguments["gpu_id"] = 0
        return original(*given.args, **given.kwargs)

    module.run_scheduler_process = run


@when_imported("sglang.srt.distributed.parallel_state")
def group_over_gloo(module):
    import torch.distributed as dist

    init, group = dist.init_process_group, module.GroupCoordinator.__init__

    @functools.wraps(init)
    def init_gloo(*args, **kwargs):
        return init(*args, **{**kwargs, "backend": "gloo"})

    @functools.wraps(group)
    def gloo_group(self, *args, **kwargs):
        group(self, *args, **{**kwargs, "torch_distributed_backend": "gloo", "use_pynccl": False})

    dist.init_process_group, module.GroupCoordinator.__init__ = init_gloo, gloo_group
