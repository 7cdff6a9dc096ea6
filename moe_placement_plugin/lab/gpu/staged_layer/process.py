"""Hold one process of the benchmark: its device, its ranks, its matmuls."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from ...bench.layer.shapes import SHAPES, LayerShape
from ...bench.timing import device_facts
from ...staged_layer import EpGroup, ExpertWeights, find_matmuls


class Process:
    """Hold one process of the benchmark.

    Args:
        arguments: of the command line.

    Attributes:
        shape: the layer that is measured.
        device: where.
        group: the EP ranks.
        dtype: of weights and tokens.
        matmuls: who multiplies.
        facts: machine, versions, kernel, ranks and shape, for reports.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.shape = arguments, SHAPES[arguments.shape]
        cuda = arguments.device == "cuda"
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(1)
        if "RANK" in os.environ:
            _meet(self.device, arguments.ctas)
        self.group = EpGroup() if dist.is_initialized() else EpGroup.single()
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.matmuls = find_matmuls(arguments.matmuls, self.device)
        self.facts = {
            **device_facts(self.device),
            "kernel": self.matmuls.name,
            "ranks": self.group.size,
            "shape": arguments.shape,
        }
        self.facts["NCCL's most thread blocks"] = arguments.ctas
        self.say("; ".join(f"{k} {v}" for k, v in self.facts.items()))

    @property
    def on_gpu(self) -> bool:
        """Return whether this is a process on a GPU."""
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.group.rank == 0:
            print(text, flush=True)

    def weights(self, slots: int, shape: LayerShape) -> ExpertWeights:
        """Draw the weights of so many experts."""

        def random(*sizes: int) -> torch.Tensor:
            empty = torch.empty(sizes, dtype=self.dtype, device=self.device)
            return empty.normal_(0, sizes[-1] ** -0.5)

        return ExpertWeights(
            random(slots, 2 * shape.intermediate, shape.hidden),
            random(slots, shape.hidden, shape.intermediate),
        )

    def tokens(self, defaults: list[int]) -> list[int]:
        """Return the batch sizes to measure: those asked for, else those of the device."""
        return self.arguments.tokens or (defaults if self.on_gpu else [24])

    def agree(self, good: bool) -> bool:
        """Return whether all ranks say so; waits for all of them."""
        return all(row[0] for row in self.group.all_gather_ints([int(good)], self.device))


def _meet(device: torch.device, ctas: int | None) -> None:
    """Make the process group of all ranks.

    Args:
        device: of this rank.
        ctas: most thread blocks of an NCCL kernel, None for its own choice.
    """
    cuda, options = device.type == "cuda", None
    if cuda:  # an exchange must not wait until a matmul's last block has begun
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if ctas:
            options.config.max_ctas = ctas
    dist.init_process_group(
        "nccl" if cuda else "gloo", device_id=device if cuda else None, pg_options=options
    )
