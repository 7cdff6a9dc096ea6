"""Find, compiled, which transfers run at the same time, for `chunks`."""

import numpy as np

from ..planner.kernels.compiled import kernel


@kernel
def color(sender, receiver, ranks):
    """Deal transfers into rounds in which every rank sends to one rank and receives from one.

    There are as few rounds as transfers at the busiest end: an edge colouring of a bipartite
    multigraph by alternating paths (König, 1916).

    Args:
        sender, receiver: int64 [transfers].
        ranks: how many there are.

    Returns:
        int32 [transfers], the round of each.
    """
    sent = np.zeros(ranks, np.int64)
    received = np.zeros(ranks, np.int64)
    rounds = 0
    for t in range(sender.size):
        sent[sender[t]] += 1
        received[receiver[t]] += 1
        rounds = max(rounds, sent[sender[t]], received[receiver[t]])
    result = np.full(sender.size, -1, np.int32)
    by_sender = np.full((ranks, rounds), -1, np.int64)
    by_receiver = np.full((ranks, rounds), -1, np.int64)
    path = np.empty(2 * ranks, np.int64)
    for t in range(sender.size):
        u, v = sender[t], receiver[t]
        a = 0
        while by_sender[u, a] >= 0:
            a += 1
        b = 0
        while by_receiver[v, b] >= 0:
            b += 1
        # The path of rounds a and b that begins at the receiver cannot end at the sender, where a
        # is free: swapped, a is free at both.
        length = 0
        x, at_receiver, here, there = v, True, a, b
        while True:
            edge = by_receiver[x, here] if at_receiver else by_sender[x, here]
            if edge < 0:
                break
            path[length] = edge
            length += 1
            x = sender[edge] if at_receiver else receiver[edge]
            at_receiver = not at_receiver
            here, there = there, here
        for i in range(length):
            edge = path[i]
            by_sender[sender[edge], result[edge]] = -1
            by_receiver[receiver[edge], result[edge]] = -1
        for i in range(length):
            edge = path[i]
            result[edge] = a + b - result[edge]
            by_sender[sender[edge], result[edge]] = edge
            by_receiver[receiver[edge], result[edge]] = edge
        by_sender[u, a] = t
        by_receiver[v, a] = t
        result[t] = a
    return result
