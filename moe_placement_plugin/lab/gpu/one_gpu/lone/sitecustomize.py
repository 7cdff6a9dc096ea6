"""Start one rank of many on one GPU, without the others.

It is on PYTHONPATH of a SGLang server that is started with all its ranks.

Only rank 0 is started, and collectives give back what it put in (PyTorch's ``fake`` back end), also
inside CUDA graphs. What it computes is wrong from the first layer on, and what it takes is a rank's
own work: kernels, launches, scheduling, without the waiting for others. Two servers that place
experts alike compute the same, so that their times show what a plugin adds. Without custom
all-reduce.
"""

import functools

from wrapt import when_imported


@when_imported("sglang.srt.entrypoints.engine")
def start_rank_0_only(module):
    original = module._calculate_rank_ranges

    @functools.wraps(original)
    def of_rank_0(*args, **kwargs):
        pp_ranks, tp_ranks, *per_node = original(*args, **kwargs)
        return (pp_ranks[:1], tp_ranks[:1], *per_node)

    module._calculate_rank_ranges = of_rank_0


@when_imported("sglang.srt.distributed.parallel_state")
def talk_to_nobody(module):
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group, init = dist.new_group, dist.init_process_group

    @functools.wraps(new_group)
    def fake_group(ranks=None, **kwargs):
        return new_group(ranks, backend="fake")

    @functools.wraps(init)
    def fake_world(*args, world_size, rank, **kwargs):
        init("fake", world_size=world_size, rank=rank, store=FakeStore())

    dist.new_group, dist.init_process_group = fake_group, fake_world
    dist.monitored_barrier = lambda *args, **kwargs: None  # of gloo alone
    _without_channels(module)


def _without_channels(module):
    """Switch off NCCL and SGLang's message queue, which would wait for the other ranks."""
    original = module.GroupCoordinator.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(
            self, *args, **{**kwargs, "use_pynccl": False, "use_message_queue_broadcaster": False}
        )

    module.GroupCoordinator.__init__ = init
