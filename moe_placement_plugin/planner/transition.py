"""From the old placement to a better one with few moves.

A slot moves when its rank has to fetch an expert that it did not hold. The cheapest thing that lowers a busy rank is often not a swap (two
moves) but turning one replica elsewhere into another replica of an expert of that rank (one move, and every rank that holds the expert gets
lighter). What counts as progress is the excess: the time by which ranks are above a target, summed over ranks. Unlike the maximum it
rewards a
step that helps one of several busy ranks. Which layers get how many moves is decided
over all layers, see `moves`.
"""

import numpy as np

from .compiled import kernel
from .refine import _holds, busiest, measure, replace_replica


@kernel
def _over(time, target):
    return max(np.int64(0), time - target)


@kernel
def _foreign(old, start, rank, expert):
    """1 if `rank` did not hold `expert` in the old placement, else 0."""
    return 0 if _holds(old, start, rank, expert) else 1


@kernel
def _remaining(top, load_hot, target, shares, loads, excess, change):
    """Write the change of the two ranks' excess for every partner of a replica of load `top`, ranks of equal speed; returns the lowest."""
    best = np.int64(1 << 62)
    for s in range(shares.size):
        step = top - shares[s]
        a = max(0, load_hot - step - target)
        b = max(0, loads[s] + step - target)
        change[s] = a + b - excess[s]
        best = min(best, change[s])
    return best


@kernel
def _remaining_uneven(top, load_hot, slow_hot, target, shares, loads, slowness, excess, change):
    """As `_remaining` for ranks of different speed."""
    best = np.int64(1 << 62)
    for s in range(shares.size):
        step = top - shares[s]
        a = max(0, (load_hot - step) * slow_hot - target)
        b = max(0, (loads[s] + step) * slowness[s] - target)
        change[s] = a + b - excess[s]
        best = min(best, change[s])
    return best


@kernel
def _swap_rate(i, j, gain, best_rate, hot, count, start, rank_of, old, foreign, expert_of):
    """Excess removed per move by exchanging slots `i` (on `hot`) and `j`; -1 where that is not better or not allowed.

    A swap that costs nothing, since replicas go home, counts four times its gain.
    """
    q = rank_of[j]
    a = expert_of[i]
    b = expert_of[j]
    if q == hot or a == b:
        return -1.0
    cost = _foreign(old, start, q, a) + _foreign(old, start, hot, b) - foreign[i] - foreign[j]
    rate = 4.0 * gain if cost <= 0 else gain / cost
    if rate <= best_rate:
        return -1.0
    if (count[a] > 1 and _holds(expert_of, start, q, a)) or (count[b] > 1 and _holds(expert_of, start, hot, b)):
        return -1.0
    return rate


@kernel
def _swap_off(
    hot,
    target,
    best_rate,
    count,
    start,
    rank_of,
    slowness,
    slot_slowness,
    old,
    foreign,
    expert_of,
    share_of,
    rank_load,
    slot_load,
    slot_excess,
    change,
):
    """Best swap off rank `hot` by excess removed per move: (rate, slot here, slot there); slots -1 if none beats `best_rate`."""
    best_i = -1
    best_j = -1
    load_hot = rank_load[hot]
    slow_hot = slowness[hot]
    excess_hot = _over(load_hot * slow_hot, target)
    for i in range(start[hot], start[hot + 1]):
        top = share_of[i]
        # A swap gains no more than the load that leaves, and costs two moves unless a replica that moved before moves again.
        cheapest = 0.25 if foreign[i] else 2.0
        if min(excess_hot, top * slow_hot) <= cheapest * best_rate:
            continue
        if slot_slowness.size:
            most = excess_hot - _remaining_uneven(top, load_hot, slow_hot, target, share_of, slot_load, slot_slowness, slot_excess, change)
        else:
            most = excess_hot - _remaining(top, load_hot, target, share_of, slot_load, slot_excess, change)
        if most <= cheapest * best_rate:
            continue
        for j in range(change.size):
            gain = excess_hot - change[j]
            if gain <= cheapest * best_rate or gain <= 0:
                continue
            rate = _swap_rate(i, j, gain, best_rate, hot, count, start, rank_of, old, foreign, expert_of)
            if rate > best_rate:
                best_rate = rate
                best_i = i
                best_j = j
    # Replicas that stay off their old rank and could go home in exchange for one that is still at home.
    for j in range(expert_of.size):
        if foreign[j] == 0:
            continue
        q = rank_of[j]
        for i in range(start[hot], start[hot + 1]):
            if foreign[i]:
                continue
            step = share_of[i] - share_of[j]
            gain = (
                excess_hot
                + slot_excess[j]
                - _over((load_hot - step) * slow_hot, target)
                - _over((rank_load[q] + step) * slowness[q], target)
            )
            if gain <= 0 or 4.0 * gain <= best_rate:
                continue
            rate = _swap_rate(i, j, gain, best_rate, hot, count, start, rank_of, old, foreign, expert_of)
            if rate > best_rate:
                best_rate = rate
                best_i = i
                best_j = j
    return best_rate, best_i, best_j


@kernel
def _replacement_off(
    hot,
    target,
    cap,
    best_rate,
    load,
    count,
    start,
    rank_of,
    slowness,
    old,
    foreign,
    expert_of,
    share_of,
    rank_load,
    first_slot,
    next_slot,
    spare,
    give_up,
):
    """Best new replica for an expert of rank `hot` by excess removed per move: (rate, slot, expert); slot -1 if none beats `best_rate`."""
    best_slot = -1
    best_expert = -1
    # The slots that may change, and what it costs the other replicas of an expert that one of its slots is given up.
    spares = 0
    least = np.int64(1 << 62)
    for s in range(expert_of.size):
        f = expert_of[s]
        if count[f] < 2 or rank_of[s] == hot:
            continue
        rise = load[f] // (count[f] - 1) - share_of[s]
        if share_of[s] + rise > cap:
            continue
        total = np.int64(0)
        t = first_slot[f]
        while t >= 0:
            if t != s:
                r = rank_of[t]
                total += _over((rank_load[r] + rise) * slowness[r], target) - _over(rank_load[r] * slowness[r], target)
            t = next_slot[t]
        r = rank_of[s]
        spare[spares] = s
        give_up[spares] = total - _over(rank_load[r] * slowness[r], target)
        least = min(least, give_up[spares])
        spares += 1
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        share_new = load[e] // (count[e] + 1)
        drop = share_of[i] - share_new
        relief = np.int64(0)
        t = first_slot[e]
        while t >= 0:
            r = rank_of[t]
            relief += _over(rank_load[r] * slowness[r], target) - _over((rank_load[r] - drop) * slowness[r], target)
            t = next_slot[t]
        if relief - least <= best_rate:
            continue
        for k in range(spares):
            # The slot's own rank may be over the target too: giving up there gains as well.
            if relief - give_up[k] <= best_rate and foreign[spare[k]] == 0:
                continue
            s = spare[k]
            r = rank_of[s]
            gain = relief - give_up[k] - _over((rank_load[r] - share_of[s] + share_new) * slowness[r], target)
            if gain <= 0:
                continue
            f = expert_of[s]
            if f == e:
                continue
            cost = _foreign(old, start, r, e) - foreign[s]
            rate = 4.0 * gain if cost <= 0 else 1.0 * gain
            if rate <= best_rate or _holds(expert_of, start, r, e):
                continue
            best_rate = rate
            best_slot = s
            best_expert = e
    return best_rate, best_slot, best_expert


@kernel
def _link(first_slot, next_slot, expert, slot):
    next_slot[slot] = first_slot[expert]
    first_slot[expert] = slot


@kernel
def _unlink(first_slot, next_slot, expert, slot):
    if first_slot[expert] == slot:
        first_slot[expert] = next_slot[slot]
        return
    t = first_slot[expert]
    while next_slot[t] != slot:
        t = next_slot[t]
    next_slot[t] = next_slot[slot]


@kernel
def _split_largest(cap, load, count, start, rank_of, slowness, expert_of, share_of, rank_load, first_slot, next_slot):
    """The best slot to turn into a replica of the expert with the largest replica: (slot, expert), slot -1 if none is above `cap`."""
    e = -1
    largest = cap
    for s in range(expert_of.size):
        if share_of[s] > largest:
            largest = share_of[s]
            e = expert_of[s]
    if e < 0:
        return -1, -1
    share_new = load[e] // (count[e] + 1)
    best = np.int64(1 << 62)
    best_slot = -1
    for s in range(expert_of.size):
        f = expert_of[s]
        if f == e or count[f] < 2 or load[f] // (count[f] - 1) > cap:
            continue
        r = rank_of[s]
        if _holds(expert_of, start, r, e):
            continue
        rise = load[f] // (count[f] - 1) - share_of[s]
        worst = (rank_load[r] - share_of[s] + share_new) * slowness[r]
        t = first_slot[f]
        while t >= 0:
            if t != s:
                worst = max(worst, (rank_load[rank_of[t]] + rise) * slowness[rank_of[t]])
            t = next_slot[t]
        if worst < best:
            best = worst
            best_slot = s
    return best_slot, e


@kernel
def descend_moves(load, count, start, rank_of, slowness, old, expert_of, target, cap, step_slot, step_expert, step_moves, step_time):
    """Lower one layer's ranks to `target` from the placement in `expert_of`, busiest rank first, by what gains most per move.

    Args:
        load: int64 [experts]; count: int64 [experts], updated; start: int64 [ranks + 1]; rank_of: int64 [slots];
        slowness: int64 [ranks]; old: int32 [slots], the placement in service; expert_of: int32 [slots], updated; target: time.
        cap: no replica may become heavier than this by giving up others of its expert, and heavier ones are split first.
        step_slot: int64 [steps, 2], step_expert: int32 [steps, 2]: which slots each step wrote and with what, slot -1 if only one.
        step_moves: int64 [steps], moves from `old` after each step; step_time: int64 [steps], the busiest rank's time.

    Returns:
        Number of steps.
    """
    slots = expert_of.size
    ranks = start.size - 1
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(ranks, np.int64)
    slot_load = np.empty(slots, np.int64)
    slot_excess = np.empty(slots, np.int64)
    change = np.empty(slots, np.int64)
    give_up = np.empty(slots, np.int64)
    spare = np.empty(slots, np.int64)
    foreign = np.empty(slots, np.int64)
    first_slot = np.empty(load.size, np.int64)
    next_slot = np.empty(slots, np.int64)
    uneven = slowness.min() != slowness.max()
    slot_slowness = slowness[rank_of] if uneven else np.empty(0, np.int64)
    stuck = np.zeros(ranks, np.bool_)
    seen_load = np.full(ranks, -1, np.int64)  # rank loads that slot_load and slot_excess stand for
    measure(load, count, start, expert_of, share_of, rank_load)
    redundant = slots > load.size
    splitting = redundant and busiest(rank_load, slowness, 0, ranks)[1] > target  # what is balanced is left alone
    first_slot[:] = -1
    steps = 0
    moves = 0
    for s in range(slots):
        foreign[s] = _foreign(old, start, rank_of[s], expert_of[s])
        moves += foreign[s]
        e = expert_of[s]
        next_slot[s] = first_slot[e]
        first_slot[e] = s
    while steps < step_moves.size:
        slot = -1
        expert = -1
        if splitting:
            slot, expert = _split_largest(cap, load, count, start, rank_of, slowness, expert_of, share_of, rank_load, first_slot, next_slot)
            splitting = slot >= 0
        hot = -1
        high = target
        for r in range(ranks):
            v = rank_load[r] * slowness[r]
            if v > high and not stuck[r]:
                high = v
                hot = r
        if hot < 0 and not splitting:
            break
        rate = 0.0
        if redundant and not splitting:
            rate, slot, expert = _replacement_off(
                hot,
                target,
                cap,
                rate,
                load,
                count,
                start,
                rank_of,
                slowness,
                old,
                foreign,
                expert_of,
                share_of,
                rank_load,
                first_slot,
                next_slot,
                spare,
                give_up,
            )
        for r in range(ranks):
            if rank_load[r] != seen_load[r]:
                seen_load[r] = rank_load[r]
                excess = _over(rank_load[r] * slowness[r], target)
                for s in range(start[r], start[r + 1]):
                    slot_load[s] = rank_load[r]
                    slot_excess[s] = excess
        i = -1
        j = -1
        if not splitting:
            rate, i, j = _swap_off(
                hot,
                target,
                rate,
                count,
                start,
                rank_of,
                slowness,
                slot_slowness,
                old,
                foreign,
                expert_of,
                share_of,
                rank_load,
                slot_load,
                slot_excess,
                change,
            )
        if i >= 0:
            a = expert_of[i]
            b = expert_of[j]
            q = rank_of[j]
            _unlink(first_slot, next_slot, a, i)
            _unlink(first_slot, next_slot, b, j)
            _link(first_slot, next_slot, b, i)
            _link(first_slot, next_slot, a, j)
            expert_of[i] = b
            expert_of[j] = a
            step = share_of[i] - share_of[j]
            share_of[i] -= step
            share_of[j] += step
            rank_load[hot] -= step
            rank_load[q] += step
            step_slot[steps, 0] = i
            step_slot[steps, 1] = j
            step_expert[steps, 0] = b
            step_expert[steps, 1] = a
            moves -= foreign[i] + foreign[j]
            foreign[i] = _foreign(old, start, hot, b)
            foreign[j] = _foreign(old, start, q, a)
            moves += foreign[i] + foreign[j]
        elif slot >= 0:
            r = rank_of[slot]
            _unlink(first_slot, next_slot, expert_of[slot], slot)
            _link(first_slot, next_slot, expert, slot)
            replace_replica(load, count, start, rank_of, expert_of, share_of, rank_load, slot, expert)
            step_slot[steps, 0] = slot
            step_slot[steps, 1] = -1
            step_expert[steps, 0] = expert
            step_expert[steps, 1] = -1
            moves -= foreign[slot]
            foreign[slot] = _foreign(old, start, r, expert)
            moves += foreign[slot]
        else:
            stuck[hot] = True
            continue
        stuck[:] = False
        step_moves[steps] = moves
        step_time[steps] = busiest(rank_load, slowness, 0, ranks)[1]
        steps += 1
    return steps
