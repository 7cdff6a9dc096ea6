"""Tell what a plan does to a load, and how it differs from another one."""

import numpy as np

from .compiled import kernel


@kernel
def busiest_times(load, plan, start, inverse_speed, times):
    """Write the busiest rank's load over speed, per window and layer.

    Args:
        load: float64 [windows, layers, experts].
        plan: int32 [layers, slots].
        start: int64 [ranks + 1].
        inverse_speed: float64 [ranks].
        times: float64 [windows, layers], written.
    """
    windows, layers, experts = load.shape
    count = np.empty(experts, np.int64)
    share = np.empty(experts, np.float64)
    for layer in range(layers):
        row = plan[layer]
        count[:] = 0
        for s in range(row.size):
            count[row[s]] += 1
        for w in range(windows):
            for e in range(experts):
                v = load[w, layer, e]
                share[e] = v if count[e] < 2 else v / count[e]
            worst = 0.0
            for r in range(start.size - 1):
                total = 0.0
                for s in range(start[r], start[r + 1]):
                    total += share[row[s]]
                worst = max(worst, total * inverse_speed[r])
            times[w, layer] = worst


@kernel
def missing_expert(table, experts):
    """Find the first expert without a slot: (layer, expert), (-1, -1) if there is none.

    Args:
        table: int32 [layers, slots], experts in [0, experts).
        experts: logical experts per layer.
    """
    held = np.full(experts, -1, np.int64)
    for layer in range(table.shape[0]):
        found = 0
        for s in range(table.shape[1]):
            found += held[table[layer, s]] != layer
            held[table[layer, s]] = layer
        if found < experts:
            for e in range(experts):
                if held[e] != layer:
                    return layer, e
    return -1, -1


@kernel
def moved_slots(old, new, start, moved):
    """Write how many replicas of each layer their ranks have to fetch.

    Args:
        old: int32 [layers, slots].
        new: int32 [layers, slots].
        start: int64 [ranks + 1].
        moved: int64 [layers], written.
    """
    for layer in range(new.shape[0]):
        moved[layer] = 0
        for r in range(start.size - 1):
            for s in range(start[r], start[r + 1]):
                held = old[layer, s] == new[layer, s]
                if held:
                    continue
                for t in range(start[r], start[r + 1]):
                    held = held or old[layer, t] == new[layer, s]
                moved[layer] += 0 if held else 1


@kernel
def keep_slots(old, new, start):
    """Reorder the slots of each rank so that experts which the rank held before keep their slots.

    Args:
        old: int32 [layers, slots].
        new: int32 [layers, slots], updated.
        start: int64 [ranks + 1].
    """
    before = np.empty(new.shape[1], np.int32)
    used = np.empty(new.shape[1], np.bool_)
    for layer in range(new.shape[0]):
        before[:] = new[layer]
        used[:] = False
        for r in range(start.size - 1):
            same = True
            for s in range(start[r], start[r + 1]):
                same = same and old[layer, s] == new[layer, s]
            if same:
                continue
            for s in range(start[r], start[r + 1]):
                new[layer, s] = -1
                for k in range(start[r], start[r + 1]):
                    if not used[k] and before[k] == old[layer, s]:
                        new[layer, s] = before[k]
                        used[k] = True
                        break
            k = start[r]
            for s in range(start[r], start[r + 1]):
                if new[layer, s] < 0:
                    while used[k]:
                        k += 1
                    new[layer, s] = before[k]
                    used[k] = True
