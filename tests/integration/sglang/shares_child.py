"""Gather and scatter unequal shares in SGLang's own group of two ranks; prints JSON.

Run with the site that has all ranks on one GPU. It also sends as a GPU's memory is sent.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing
from over_gloo import exchange
from sglang.srt.distributed import parallel_state

SIZES = [3, 1]


def run(rank: int, port: int, queue) -> None:
    parallel_state.init_distributed_environment(
        2, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo"
    )
    parallel_state.initialize_model_parallel(2, backend="gloo")
    group = parallel_state.get_tp_group()
    share, rows = (
        torch.full((SIZES[rank], 2), rank + 1.0),
        torch.arange(8.0).view(4, 2) * (rank + 1),
    )
    gathered, scattered, halves = torch.empty(4, 2), torch.empty(SIZES[rank], 2), torch.empty(2, 2)
    group.all_gatherv(share, sizes=SIZES, output=gathered)
    group.reduce_scatterv(rows, output=scattered, sizes=SIZES)
    group._reduce_scatter_tensor(halves, rows)
    several = group.all_gatherv([share, share.int()], sizes=SIZES)
    received, other = torch.zeros_like(gathered), 1 - rank
    operations = [
        dist.P2POp(dist.isend, gathered + rank, other),
        dist.P2POp(dist.irecv, received, other),
    ]
    for batch in (dist.batch_isend_irecv, exchange):
        received.zero_()
        works = batch(operations)
        for work in works:
            work.wait()
        several.append(received.clone())
    assert all(work.wait() for work in works), (
        "once more, which gloo's own would not come back from"
    )
    queue.put((rank, [t.tolist() for t in (gathered, scattered, halves, *several)]))


if __name__ == "__main__":
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(run, (int(sys.argv[1]), answers), nprocs=2)
    print("found " + json.dumps(dict(answers.get() for _ in range(2))))
