"""See weights of other ranks of the same host where they lie.

CUDA lets a process see another one's memory (inter-process handles, the way of NCCL's own
peer-to-peer transport and of vLLM's custom all-reduce); a copy from it goes over NVLink as fast as
the link carries, without a message, without memory to pack it in and without a processor that
answers. That a rank's weights stand still while others read them is what the exchange's agreement
is for: nobody overwrites a layer before all have voted that they hold what they need of it. On CPUs
the same goes for weights in shared memory, and for all others by cross-memory attach (`attached`).
"""

from __future__ import annotations

import inspect
import io
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.topology import Topology
from .cross_memory import AttachedRows, Process
from .expert_memory import Parameter
from .transfer_table import TransferTable

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

PROBE = 64
"""Bytes of each parameter that a rank says it has and the others must find there.

Memory that is seen wrongly must not be read.
"""


@dataclass(frozen=True)
class PeerMemory:
    """Hold who reads whose weights, and this rank's view of those that it reads.

    Attributes:
        reads: bool ``[ranks, ranks]``, the same on all ranks: whether the first reads the second's
            weights by itself.
        parameters: rank -> layer -> its parameters, of the ranks that this one reads.
    """

    reads: np.ndarray
    parameters: Mapping[int, Mapping[int, Sequence[Parameter | AttachedRows]]]

    @classmethod
    def of(
        cls,
        own: Mapping[int, Sequence[Parameter]],
        topology: Topology,
        cpu_group: dist.ProcessGroup,
        log: logging.Logger,
    ) -> PeerMemory:
        """See what can be seen; a collective call.

        What cannot be seen (another host, no peer access, memory of an allocator that does not
        share) is left to messages.

        Args:
            own: this rank's parameters of each layer, which stay where they are from now on.
            topology: nodes of the ranks.
            cpu_group: of all EP ranks, for CPU tensors.
        """
        import torch.distributed as dist

        ranks, rank = cpu_group.size(), cpu_group.rank()
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, _offer(own, log), group=cpu_group)
        seen = {}
        for peer, offer in enumerate(found):
            if (
                peer != rank
                and offer is not None
                and topology.node_of_rank[peer] == topology.node_of_rank[rank]
            ):
                parameters = _take(offer, own, peer, log)
                if parameters is not None:
                    seen[peer] = parameters
        reads = np.zeros((ranks, ranks), dtype=bool)
        dist.all_gather_object(found, sorted(seen), group=cpu_group)
        for reader, peers in enumerate(found):
            reads[reader, peers] = True
        return cls(reads, seen)

    def __str__(self) -> str:
        pairs = self.reads.shape[0] * (self.reads.shape[0] - 1)
        return f"{int(self.reads.sum())} of {pairs} pairs of ranks read each other's memory"


@dataclass(frozen=True)
class SeenPeers:
    """Hold `PeerMemory` by the rows of one exchange.

    Attributes:
        reads: as `PeerMemory.reads`.
        layers: rank -> its parameters of each row's layer.
    """

    reads: np.ndarray
    layers: Mapping[int, Sequence[Sequence[Parameter | AttachedRows]]]

    @classmethod
    def of(cls, peers: PeerMemory, layer_ids: Sequence[int]) -> SeenPeers:
        """Return what is seen by the rows of an exchange of these layers."""
        return cls(
            peers.reads,
            {rank: [seen[layer] for layer in layer_ids] for rank, seen in peers.parameters.items()},
        )

    def are_read(self, transfers: TransferTable) -> np.ndarray:
        """Return which transfers their receivers carry out by themselves, bool ``[transfers]``."""
        return self.reads[transfers.to_rank, transfers.from_rank]

    @property
    def mapped(self) -> list[Sequence[Parameter]]:
        """Return the parameters that lie in this process's own address space as well."""
        found = (parameters for of_rank in self.layers.values() for parameters in of_rank)
        own = (([p for p in ps if not isinstance(p, AttachedRows)], len(ps)) for ps in found)
        return [mine for mine, number in own if len(mine) == number]


def _offer(own: Mapping[int, Sequence[Parameter]], log: logging.Logger) -> bytes | None:
    """Return what others need to see this rank's parameters, and how each begins.

    None when they cannot be shared.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    process = Process.own()
    handles = []
    try:
        for layer, parameters in own.items():
            for parameter in parameters:
                rows = parameter.rows
                if (
                    rows.device.type == "cpu" and not rows.is_shared()
                ):  # to share it would move it, and the engine would go on with what it had
                    handle = AttachedRows, (process, rows.data_ptr(), rows.stride(0), rows.shape[1])
                elif rows.device.type in ("cpu", "cuda"):
                    if rows.device.type == "cuda":
                        torch.cuda.synchronize(rows.device)
                    handle = reduce_tensor(rows)
                else:
                    return None
                handles.append((layer, handle, _beginning(rows)))
        buffer = io.BytesIO()
        ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(handles)
        return buffer.getvalue()
    except Exception as error:  # noqa: BLE001 - whatever it is, messages are left
        log.info(
            "moe_placement_plugin: experts' memory cannot be shared with other ranks, they are "
            "sent: %s",
            _in_a_line(error),
        )
        return None


def _take(
    offer: bytes, own: Mapping[int, Sequence[Parameter]], peer: int, log: logging.Logger
) -> dict[int, list[Parameter | AttachedRows]] | None:
    """Return the parameters of another rank; None when they are not seen as it says."""
    device = next((p.rows.device for parameters in own.values() for p in parameters), None)
    seen: dict[int, list[Parameter | AttachedRows]] = {layer: [] for layer in own}
    try:
        # The offer is of a rank of this very server.
        for layer, (rebuild, arguments), beginning in pickle.loads(offer):  # noqa: S301
            if rebuild is AttachedRows:
                rows = AttachedRows(*arguments)
                if not any(seen.values()):
                    rows.process.check()
                if rows.beginning(len(beginning)) != beginning:
                    raise RuntimeError(f"layer {layer} reads otherwise than the rank says")
                seen[layer].append(rows)
                continue
            if device is not None and device.type == "cuda":
                # Seen from this rank's own device, which reads the peer's memory: no context on the
                # peer's is needed. Nor is there an event to wait for: the owner has waited for its
                # device.
                named = dict(zip(inspect.signature(rebuild).parameters, arguments))
                rows = rebuild(
                    **(named | {"storage_device": device.index, "event_sync_required": False})
                )
            else:
                rows = rebuild(*arguments)
            if _beginning(rows) != beginning:
                raise RuntimeError(f"layer {layer} reads otherwise than the rank says")
            like = own[layer][len(seen[layer])]
            seen[layer].append(Parameter(rows, like.shape, like.stride, like.dtype))
    except Exception as error:  # noqa: BLE001 - whatever it is, messages are left
        log.info(
            "moe_placement_plugin: the memory of EP rank %d cannot be read, experts are sent: %s",
            peer,
            _in_a_line(error),
        )
        return None
    return seen


def _beginning(rows: torch.Tensor) -> bytes:
    return rows[:1, :PROBE].cpu().numpy().tobytes()


def _in_a_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
