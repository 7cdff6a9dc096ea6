"""On ``PYTHONPATH``: vLLM's CPU build lacks the two collectives of data-parallel ranks that share experts, which fail without
(``NotImplementedError`` in ``all_gatherv`` at the first request). Here they are, over gloo, as the CUDA build has them over NCCL.
"""

from wrapt import register_post_import_hook


def _complete(module):
    import torch
    import torch.distributed as dist

    def all_gatherv(self, input_, dim=0, sizes=None):
        if isinstance(input_, list):
            return [all_gatherv(self, one, dim, sizes) for one in input_]
        sizes = sizes or [input_.shape[0]] * self.world_size
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))  # gloo gathers equal shapes only
        padded[: input_.shape[0]] = input_
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=self.device_group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)])

    def reduce_scatterv(self, input_, dim=-1, sizes=None):
        summed = input_.clone()
        dist.all_reduce(summed, group=self.device_group)
        sizes = sizes or [summed.shape[0] // self.world_size] * self.world_size
        first = sum(sizes[: self.rank_in_group])
        return summed[first : first + sizes[self.rank_in_group]].clone()

    module.CpuCommunicator.all_gatherv = all_gatherv
    module.CpuCommunicator.reduce_scatterv = reduce_scatterv


register_post_import_hook(_complete, "vllm.distributed.device_communicators.cpu_communicator")
