"""What a plan does to a load, and how it differs from another one."""

import numpy as np

from .compiled import kernel


@kernel
def busiest_times(load, plan, start, inverse_speed, times):
    """Write times[w, l], float64: the busiest rank's load over speed, per window and layer.

    Args:
        load: float64 [windows, layers, experts]; plan: int32 [layers, slots]; start: int64 [ranks + 1]; inverse_speed: float64 [ranks].
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
    """(layer, expert) of the first expert without a slot; (-1, -1) if there is none.

    Args:
        table: int32 [layers, slots], experts in [0, experts).
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
    """Write moved[l], int64: replicas of layer l that their rank has to fetch.

    Args:
        old, new: int32 [layers, slots]; start: int64 [ranks + 1].
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
    """Reorder the slots of each rank of `new` so that experts which the rank held in `old` keep their slots; in place.

    Args:
        old, new: int32 [layers, slots]; start: int64 [ranks + 1].
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


@kernel
def align_layers(old, new, start, label, node_of, keep_nodes):
    """Relabel the ranks of `new` so that they overlap `old` most (greedily), then keep unmoved experts in their slots; in place.

    Args:
        old, new: int32 [layers, slots]; start: int64 [ranks + 1]; label: int64 [ranks], ranks are interchangeable when equal;
        node_of: int64 [ranks]; keep_nodes: relabel whole nodes first, and ranks only within a node.
    """
    ranks = start.size - 1
    slots = new.shape[1]
    nodes = node_of.max() + 1
    experts = 0
    for layer in range(new.shape[0]):
        for s in range(slots):
            experts = max(experts, max(old[layer, s], new[layer, s]) + 1)
    ranks_with = np.empty((experts, ranks), np.int64)
    num_with = np.empty(experts, np.int64)
    overlap = np.empty((ranks, ranks), np.int64)
    source = np.empty(ranks, np.int64)
    source_node = np.empty(nodes, np.int64)
    before = np.empty(slots, np.int32)
    for layer in range(new.shape[0]):
        num_with[:] = 0
        for r in range(ranks):
            for s in range(start[r], start[r + 1]):
                e = old[layer, s]
                if e >= 0 and (num_with[e] == 0 or ranks_with[e, num_with[e] - 1] != r):
                    ranks_with[e, num_with[e]] = r
                    num_with[e] += 1
        overlap[:] = 0
        for q in range(ranks):
            for s in range(start[q], start[q + 1]):
                e = new[layer, s]
                for k in range(num_with[e]):
                    overlap[ranks_with[e, k], q] += 1
        source[:] = -1
        taken = np.zeros(ranks, np.bool_)
        source_node[:] = -1
        if keep_nodes:
            node_taken = np.zeros(nodes, np.bool_)
            for _ in range(nodes):
                best = -1
                best_n = -1
                best_m = -1
                for n in range(nodes):
                    if source_node[n] >= 0:
                        continue
                    for m in range(nodes):
                        if node_taken[m]:
                            continue
                        total = 0
                        alike = True
                        r = 0
                        q = 0
                        # Nodes are interchangeable if their ranks are, one by one.
                        while r < ranks or q < ranks:
                            while r < ranks and node_of[r] != n:
                                r += 1
                            while q < ranks and node_of[q] != m:
                                q += 1
                            if (r < ranks) != (q < ranks) or (r < ranks and label[r] != label[q]):
                                alike = False
                                break
                            r += 1
                            q += 1
                        if not alike:
                            continue
                        for r in range(ranks):
                            if node_of[r] == n:
                                for q in range(ranks):
                                    if node_of[q] == m:
                                        total += overlap[r, q]
                        if total > best:
                            best = total
                            best_n = n
                            best_m = m
                source_node[best_n] = best_m
                node_taken[best_m] = True
        for _ in range(ranks):
            best = -1
            best_r = -1
            best_q = -1
            for r in range(ranks):
                if source[r] >= 0:
                    continue
                for q in range(ranks):
                    if taken[q] or label[r] != label[q] or overlap[r, q] <= best:
                        continue
                    if keep_nodes and source_node[node_of[r]] != node_of[q]:
                        continue
                    best = overlap[r, q]
                    best_r = r
                    best_q = q
            source[best_r] = best_q
            taken[best_q] = True
        before[:] = new[layer]
        for r in range(ranks):
            for k in range(start[r + 1] - start[r]):
                new[layer, start[r] + k] = before[start[source[r]] + k]
    keep_slots(old, new, start)
