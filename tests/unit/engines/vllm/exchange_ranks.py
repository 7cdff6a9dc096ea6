"""What processes do in test_eplb_exchange.

vLLM's tables, buffers and communicator, with our exchange in sync and in async mode.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

EXPERTS, SLOTS, LAYERS = 10, 5, 3


def tables(number: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Old and new table, int64 ``[layers, physical experts]``.

    As vLLM's policy does, a rank may hold an expert twice.
    """
    rng = np.random.default_rng(number)

    def one() -> np.ndarray:
        return rng.permutation(
            np.concatenate(
                [np.arange(EXPERTS), rng.integers(EXPERTS, size=ranks * SLOTS - EXPERTS)]
            )
        )

    old = np.stack([one() for _ in range(LAYERS)])
    new = np.stack([one() for _ in range(LAYERS)])
    new[number % LAYERS] = old[number % LAYERS]  # one layer stays
    return old, new


def weights_of(table: np.ndarray, rank: int) -> list[list[torch.Tensor]]:
    local = torch.from_numpy(table[:, rank * SLOTS : (rank + 1) * SLOTS])
    return [
        [
            (1000.0 * layer + local[layer])[:, None].expand(-1, 6).contiguous(),
            (local[layer].to(torch.uint8) + 16 * layer)[:, None].expand(-1, 3).contiguous(),
        ]
        for layer in range(LAYERS)
    ]


def state_of(table: np.ndarray, weights) -> SimpleNamespace:
    """As much of vLLM's model state as an exchange needs, with real maps."""
    from vllm.distributed.eplb.eplb_state import compute_logical_maps

    to_physical, count = compute_logical_maps(torch.from_numpy(table), EXPERTS)
    wide = torch.full((LAYERS, EXPERTS, table.shape[1]), -1)
    wide[..., : to_physical.shape[2]] = to_physical
    model = SimpleNamespace(expert_weights=weights, num_moe_layers=LAYERS)
    held = torch.from_numpy(table.copy())
    return SimpleNamespace(
        physical_to_logical_map=held,
        physical_to_logical_map_buffer=held,
        logical_to_physical_map=wide,
        logical_replica_count=count,
        model=model,
        communicator=None,
    )


def adopted(state, name: str):
    """What the process knows of a model that EPLB has registered, the only one."""
    from moe_placement_plugin.engines.vllm import eplb_exchange
    from moe_placement_plugin.engines.vllm.state import STATE, Eplb, EplbModel
    from moe_placement_plugin.rebalancing.exchanger import ExchangeLimits, Exchanger, RankFacts

    group, limits = dist.group.WORLD, ExchangeLimits(timeout=10)
    exchanger = Exchanger(
        dict(enumerate(state.model.expert_weights)),
        EXPERTS,
        group,
        RankFacts.gather(group),
        name,
        eplb_exchange.logger,
        limits,
    )
    model = EplbModel(state, exchanger)
    STATE.eplb = Eplb(None, 30.0, limits, [model])
    return model


def equal(weights, table: np.ndarray, rank: int) -> bool:
    return all(a.equal(b) for x, y in zip(weights, weights_of(table, rank)) for a, b in zip(x, y))


def both_modes(rank: int, world: int, store, numbers) -> dict:
    from vllm.distributed.eplb import eplb_state, rebalance_execute
    from vllm.distributed.eplb.eplb_communicator import TorchDistNcclEplbCommunicator

    from moe_placement_plugin.engines.vllm import eplb_async, eplb_exchange

    result = {"async": [], "sync": [], "unchanged layers sent": 0}
    rearrange = eplb_exchange._rearrange_weights(rebalance_execute.rearrange_expert_weights_inplace)
    transfer = eplb_async._transfer_layer(rebalance_execute.transfer_layer)
    for number in numbers:
        old, new = tables(number, world)
        weights = weights_of(old, rank)
        state = state_of(old, weights)
        adopted(state, f"sync{number}")
        rearrange(torch.from_numpy(old), torch.from_numpy(new), weights, [], dist.group.WORLD, None)
        result["sync"].append(equal(weights, new, rank))

        weights = weights_of(old, rank)
        state = state_of(old, weights)
        adopted(state, f"async{number}")
        sent = []
        communicator = TorchDistNcclEplbCommunicator(ep_group=dist.group.WORLD)
        add_send = communicator.add_send
        communicator.add_send = lambda tensors, to, expert_id, add_send=add_send, sent=sent: (
            sent.append(to),
            add_send(tensors, to, expert_id),
        )
        state.communicator = communicator
        buffer = [torch.empty_like(w) for w in weights[0]]
        for layer in range(LAYERS):
            before = len(sent)
            metadata = transfer(
                old_layer_indices=torch.from_numpy(old[layer]),
                new_layer_indices=torch.from_numpy(new[layer]),
                expert_weights=weights[layer],
                expert_weights_buffer=buffer,
                communicator=communicator,
                ep_group=dist.group.WORLD,
                is_profile=False,
                layer_idx=layer,
            )
            if (old[layer] == new[layer]).all():
                result["unchanged layers sent"] += len(sent) - before
            rebalance_execute.move_from_buffer(weights[layer], buffer, metadata, new[layer], rank)
            eplb_state._commit_eplb_maps_for_layer(state, torch.from_numpy(new[layer]), layer)
        result["async"].append(
            equal(weights, new, rank)
            and state.physical_to_logical_map.numpy().tolist() == new.tolist()
        )
    return result


def weighed(rank: int, world: int, store, numbers) -> dict:
    """Rebalances whose exchange was weighed, of the table that vLLM asks for and of another one."""
    from vllm.distributed.eplb import rebalance_execute

    from moe_placement_plugin.engines.vllm import eplb_exchange
    from moe_placement_plugin.exchange.watchdog import Watchdog
    from moe_placement_plugin.rebalancing import exchanger
    from moe_placement_plugin.rebalancing.rebalance import Rebalance

    planned = []
    plan_exchange = exchanger.plan_exchange
    exchanger.plan_exchange = lambda *args: (planned.append(1), plan_exchange(*args))[1]
    result = {"planned anew": {}}
    rearrange = eplb_exchange._rearrange_weights(rebalance_execute.rearrange_expert_weights_inplace)
    for what in ("weighed", "another table than was weighed"):
        result[what], again = [], 0
        for number in numbers:
            old, new = tables(number, world)
            goal = new if what == "weighed" else np.roll(new, SLOTS, axis=1)
            weights = weights_of(old, rank)
            model = adopted(state_of(old, weights), f"{what}{number}".replace(" ", "-"))
            ours = model.exchanger
            model.rebalance = Rebalance(Watchdog())
            model.rebalance.exchange = ours.plan(old, new, range(LAYERS))
            before = len(planned)
            rearrange(
                torch.from_numpy(old), torch.from_numpy(goal), weights, [], dist.group.WORLD, None
            )
            again += len(planned) - before
            result[what].append(equal(weights, goal, rank))
        result["planned anew"][what] = again
    exchanger.plan_exchange = plan_exchange
    return result


def with_a_rank_that_fails(
    rank: int, world: int, store, number: int
) -> tuple[str, bool, bool, int]:
    """Rank 1 cannot finish its second chunk.

    What every rank is told, and whether maps and weights agree, layer by layer.
    """
    from moe_placement_plugin.engines.vllm import eplb_exchange
    from moe_placement_plugin.exchange.commit import ExchangeAborted
    from moe_placement_plugin.exchange.transfers import Transfers

    old, new = tables(number, world)
    weights = weights_of(old, rank)
    state = state_of(old, weights)
    model = adopted(state, "fails")
    model.exchanger._share = 1  # a layer a chunk
    finish, seen = Transfers.finish, []

    def failing(self, staged):
        finish(self, staged)
        seen.append(1)
        if rank == 1 and len(seen) == 2:
            raise OSError("the link is down")

    Transfers.finish = failing
    try:
        eplb_exchange.exchange(model, old, new)
    except ExchangeAborted as aborted:
        in_force = state.physical_to_logical_map.numpy()
        mixed = [row for row in in_force.tolist() if row not in old.tolist() + new.tolist()]
        return (
            aborted.reason,
            equal(weights, in_force, rank),
            not mixed,
            int((in_force == new).all(axis=1).sum()),
        )
    return "not noticed", False, False, 0


def all_of_it(rank: int, world: int, store, numbers) -> tuple[dict, tuple]:
    """All in one start, as importing vLLM takes longer.

    The failure, which breaks the group, last.
    """
    done = both_modes(rank, world, store, numbers) | weighed(rank, world, store, numbers)
    return done, with_a_rank_that_fails(rank, world, store, 1)
