"""Compiled inner loops of `plan`: who sends what, in which order slots are copied, which transfers run at the same time."""

import numpy as np

from ..planner.kernels.compiled import kernel


@kernel
def _put(table, row, a, b, c, d):
    """Fill the first four columns of a row (numba cannot assign tuples of mixed integer types)."""
    table[row, 0] = a
    table[row, 1] = b
    table[row, 2] = c
    table[row, 3] = d


@kernel
def route(old, new, old_start, new_start, experts, live, node_of, transfers, reads, copies):
    """How every slot of the new placement is filled.

    Args:
        old: int32 [layers, old slots]; new: int32 [layers, new slots]; old_start, new_start: int64 [ranks + 1], first slot of each rank.
        experts: logical experts per layer; live: bool [ranks]; node_of: int64 [ranks].
        transfers: int32 [layers * new slots, 6], filled with (layer, expert, from rank, from slot, to rank, to slot).
        reads: int32 [layers * new slots, 4], filled with (layer, expert, rank, slot); experts that no live rank holds.
        copies: int32 [2 * layers * new slots, 4], filled with (layer, rank, from slot, to slot), slot -1 being the scratch row; in an
            order in which every slot is read before it is overwritten.
        Slots are local to their rank.

    Returns:
        How many rows of transfers, reads and copies are filled.

    Sources are holders on the receiver's own node where there are any, and among those a rank that sends least in the layer: no transfer
    could be given to another such holder that sends two or more fewer.
    """
    layers = old.shape[0]
    ranks = live.size
    slot_of = np.empty((ranks, experts), np.int32)
    holder_start = np.empty(experts + 1, np.int64)
    cursor = np.empty(experts, np.int64)
    holders = np.empty(old.shape[1], np.int64)
    sends = np.empty(ranks, np.int64)
    sends_before = np.zeros(ranks, np.int64)
    most = 1
    for r in range(ranks):
        most = max(most, old_start[r + 1] - old_start[r], new_start[r + 1] - new_start[r])
    source = np.empty(most, np.int64)
    readers = np.empty(most, np.int64)
    ready = np.empty(most, np.int64)
    n, m, k = 0, 0, 0
    for layer in range(layers):
        slot_of[:] = -1
        holder_start[:] = 0
        for r in range(ranks):
            if live[r]:
                for s in range(old_start[r + 1] - 1, old_start[r] - 1, -1):
                    e = old[layer, s]
                    if slot_of[r, e] < 0:
                        holder_start[e + 1] += 1
                    slot_of[r, e] = s - old_start[r]
        for e in range(experts):
            holder_start[e + 1] += holder_start[e]
            cursor[e] = holder_start[e]
        for r in range(ranks):
            if live[r]:
                for s in range(old_start[r], old_start[r + 1]):
                    e = old[layer, s]
                    if slot_of[r, e] == s - old_start[r]:
                        holders[cursor[e]] = r
                        cursor[e] += 1
        sends[:] = 0
        first = n
        for r in range(ranks):
            if not live[r]:
                continue
            here = new_start[r + 1] - new_start[r]
            source[:] = -1
            readers[:] = 0
            local = 0
            for j in range(here):
                e = new[layer, new_start[r] + j]
                at = slot_of[r, e]
                if at >= 0:
                    if j < old_start[r + 1] - old_start[r] and old[layer, old_start[r] + j] == e:
                        continue
                    source[j] = at
                    readers[at] += 1
                    local += 1
                    continue
                begin, end = holder_start[e], holder_start[e + 1]
                if begin == end:
                    _put(reads, m, layer, e, r, j)
                    m += 1
                    continue
                near = False
                for h in range(begin, end):
                    near = near or node_of[holders[h]] == node_of[r]
                best = -1
                for h in range(begin, end):
                    a = holders[h]
                    if near and node_of[a] != node_of[r]:
                        continue
                    if (
                        best < 0
                        or sends[a] < sends[best]
                        or (
                            sends[a] == sends[best]
                            and sends_before[a] + sends[a] < sends_before[best] + sends[best]
                        )
                    ):
                        best = a
                sends[best] += 1
                _put(transfers, n, layer, e, best, slot_of[best, e])
                transfers[n, 4] = r
                transfers[n, 5] = j
                n += 1
            # Slots that nobody reads any more can be overwritten; what is left then are cycles, one scratch row opens each.
            waiting = 0
            for j in range(here):
                if source[j] >= 0 and readers[j] == 0:
                    ready[waiting] = j
                    waiting += 1
            while waiting > 0:
                waiting -= 1
                j = ready[waiting]
                s = source[j]
                _put(copies, k, layer, r, s, j)
                k += 1
                local -= 1
                source[j] = -1
                readers[s] -= 1
                if readers[s] == 0 and s < here and source[s] >= 0:
                    ready[waiting] = s
                    waiting += 1
            j = 0
            while local > 0:
                if source[j] < 0:
                    j += 1
                    continue
                _put(copies, k, layer, r, j, -1)
                k += 1
                at = j
                while source[at] != j:
                    s = source[at]
                    _put(copies, k, layer, r, s, at)
                    k += 1
                    local -= 1
                    source[at] = -1
                    at = s
                _put(copies, k, layer, r, -1, at)
                k += 1
                local -= 1
                source[at] = -1
        changed = True
        while changed:
            changed = False
            for t in range(first, n):
                e, sender, r = transfers[t, 1], transfers[t, 2], transfers[t, 4]
                begin, end = holder_start[e], holder_start[e + 1]
                near = node_of[sender] == node_of[r]
                for h in range(begin, end):
                    a = holders[h]
                    if (node_of[a] == node_of[r]) == near and sends[a] + 1 < sends[sender]:
                        sends[sender] -= 1
                        sends[a] += 1
                        transfers[t, 2] = a
                        transfers[t, 3] = slot_of[a, e]
                        sender = a
                        changed = True
        for r in range(ranks):
            sends_before[r] += sends[r]
    return n, m, k


@kernel
def color(sender, receiver, ranks):
    """Rounds in which every rank sends to one rank and receives from one: as few as there are transfers at the busiest end.

    Edge colouring of a bipartite multigraph by alternating paths (König, 1916).

    Args:
        sender, receiver: int64 [transfers]; ranks: how many there are.

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
        # The path of rounds a and b that begins at the receiver cannot end at the sender, where a is free: swapped, a is free at both.
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
