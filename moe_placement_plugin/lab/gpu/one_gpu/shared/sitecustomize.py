"""Run all ranks of an engine on one GPU: on PYTHONPATH of its processes.

NCCL refuses two ranks on one device, so they talk over gloo, which takes CUDA tensors; what it
cannot do with them is in `over_gloo`. Kernels, loaders, expert maps and EPLB are the real ones, and
so are the answers; speed means nothing. Without custom all-reduce and CUDA graphs, and vLLM needs
``VLLM_DISABLE_PYNCCL=1``. vLLM's CPU build, which has gloo but not the two collectives of
data-parallel ranks that share experts, is given those.
"""

import functools
import inspect

from over_gloo import exchange, gather, reduce_scatter
from wrapt import when_imported


@when_imported("torch.distributed")
def exchange_over_gloo(module):
    original = module.batch_isend_irecv

    @functools.wraps(original)
    def batch_isend_irecv(operations):
        return (exchange if any(one.tensor.is_cuda for one in operations) else original)(operations)

    module.batch_isend_irecv = batch_isend_irecv


@when_imported("vllm.platforms.cuda")
def talk_over_gloo(module):
    module.CudaPlatformBase.dist_backend = "gloo"


@when_imported("vllm.v1.worker.gpu_worker")
def share_the_first_gpu(module):
    original = module.Worker.init_device

    @functools.wraps(original)
    def init_device(self, *args, **kwargs):
        config = self.parallel_config
        rank = config.data_parallel_rank_local
        # vLLM adds the GPUs of the data-parallel ranks before this one.
        self.local_rank = (
            -(config.data_parallel_index if rank is None else rank)
            * config.tensor_parallel_size
            * config.pipeline_parallel_size
        )
        return original(self, *args, **kwargs)

    module.Worker.init_device = init_device


@when_imported("vllm.distributed.device_communicators.cpu_communicator")
@when_imported("vllm.distributed.device_communicators.cuda_communicator")
def share_over_gloo(module):
    def all_gatherv(self, input_, dim=0, sizes=None):
        return gather(input_, sizes, self.device_group)

    def reduce_scatterv(self, input_, dim=-1, sizes=None):
        return reduce_scatter(input_, sizes, self.device_group)

    def reduce_scatterv_into_output(self, input_, output, dim=-1, sizes=None):
        return reduce_scatter(input_, sizes, self.device_group, output)

    for name in {"CpuCommunicator", "CudaCommunicator"} & vars(module).keys():
        communicator = getattr(module, name)
        communicator.all_gatherv, communicator.reduce_scatterv = all_gatherv, reduce_scatterv
        communicator.reduce_scatterv_into_output = reduce_scatterv_into_output


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

    def all_gatherv(self, input_, sizes=None, output=None):
        return gather(input_, sizes, self.device_group, output)

    def reduce_scatterv(self, input_, output=None, sizes=None):
        return reduce_scatter(input_, sizes, self.device_group, output)

    def reduce_scatter_tensor(self, output, input):
        return reduce_scatter(input, None, self.device_group, output)

    dist.init_process_group, module.GroupCoordinator.__init__ = init_gloo, gloo_group
    module.GroupCoordinator.all_gatherv, module.GroupCoordinator.reduce_scatterv = (
        all_gatherv,
        reduce_scatterv,
    )
    module.GroupCoordinator._reduce_scatter_tensor = reduce_scatter_tensor
