"""Say how good any plan could be: provable lower bounds of the busiest rank's time."""

import numpy as np

from .compiled import inner_kernel
from .layer import ranks_in_use, sum_of


@inner_kernel
def busiest_at_least(load, order, largest_replica, start, inverse_speed, thorough):
    """Return a lower bound of the time of the busiest rank of one layer, whatever the placement.

    The largest of

    - the mean: total load over total speed;
    - the largest replica of the optimal replication, on the fastest rank, in the lightest company;
    - if `thorough` and all ranks have as many slots and the same speed, counting: see
      `_by_counting`.

    Args:
        load: float64 [experts].
        order: int64 [experts], heaviest first.
        largest_replica: float64, of the optimal replication.
        start: int64 [ranks + 1].
        inverse_speed: float64 [ranks].
        thorough: whether to count.

    Returns:
        float64, in the unit of `load` over speed.
    """
    experts = load.size
    num_slots = start[start.size - 1]
    ranks = ranks_in_use(start)
    speed = 0.0
    fastest = np.inf
    slowest = 0.0
    width = num_slots
    for r in range(start.size - 1):
        if start[r + 1] > start[r]:
            speed += 1.0 / inverse_speed[r]
            fastest = min(fastest, inverse_speed[r])
            slowest = max(slowest, inverse_speed[r])
            width = min(width, start[r + 1] - start[r])
    best = sum_of(load) / speed
    # The lightest that `width - 1` companions can be: an expert has at most `split` replicas.
    extra = num_slots - experts
    split = max(1, min(1 + extra, ranks))
    company = 0.0
    for k in range(min(width - 1, experts - 1)):
        company += load[order[experts - 1 - k]] / split
    best = max(best, (largest_replica + company) * fastest)
    if not thorough or width * ranks != num_slots or fastest != slowest or extra >= experts:
        return best
    return max(best, _by_counting(load, order, extra, ranks, width) * fastest)


@inner_kernel(makes_arrays=True, inlined=True)
def _by_counting(load, order, extra, ranks, width):
    """Return the load that the busiest of equal ranks must have, by counting heavy experts.

    Of the `h` heaviest experts with just one replica (at least `experts - extra` have just one; at
    best those are the lightest), `h = j x ranks + m`, some s ranks hold more than j each and
    together at least max((j + 1) s, j s + m) of them, so that the busiest has at least the mean of
    those s ranks.

    Args:
        load: float64 [experts].
        order: int64 [experts], heaviest first.
        extra: slots beyond one for each expert, fewer than experts.
        ranks: how many.
        width: slots of each.

    Returns:
        float64; 0 where counting says nothing.
    """
    single = order.size - extra
    # prefix[k]: load of the k lightest single experts.
    prefix = np.zeros(single + 1, np.float64)
    for k in range(single):
        prefix[k + 1] = prefix[k] + load[order[order.size - 1 - k]]
    free = width * ranks - single  # slots of replicas: counted as empty
    best = 0.0
    for h in range(1, single + 1):
        j = (h - 1) // ranks
        m = h - j * ranks
        if j >= width:
            break
        lightest_heavy = single - h  # the h heaviest occupy [single - h, single)
        value = np.inf
        for s in range(1, ranks + 1):
            heavy = max((j + 1) * s, j * s + m)
            if heavy > h or heavy > width * s:
                continue
            light = max(0, min(width * s - heavy - free, lightest_heavy))
            mean = (prefix[lightest_heavy + heavy] - prefix[lightest_heavy] + prefix[light]) / s
            value = min(value, mean)
        if value < np.inf:
            best = max(best, value)
    return best
