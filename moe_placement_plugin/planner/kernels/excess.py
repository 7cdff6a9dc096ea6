"""Value steps by the excess that they remove: the time by which ranks are above a target."""

import numpy as np

from .compiled import inner_kernel


@inner_kernel
def over(time, target):
    """Return how far a time is above a target, 0 if it is not."""
    return max(np.int64(0), time - target)


@inner_kernel
def excess_gained(load, step, slowness, target):
    """Return the excess that a rank gains with `step` more load; negative for what it loses."""
    return over((load + step) * slowness, target) - over(load * slowness, target)


@inner_kernel
def excess_removed(step, most, slow_here, slow_there, slack):
    """Return the excess that goes when a rank hands load to another.

    Args:
        step: int64, the load.
        most: int64, excess of the rank that gives.
        slow_here: int64, slowness of the rank that gives.
        slow_there: int64, slowness of the rank that takes.
        slack: int64, time by which the rank that takes is below the target; negative if above.
    """
    return min(step * slow_here, most) - over(step * slow_there, slack) + max(np.int64(0), -slack)


@inner_kernel
def excess_relieved(expert, drop, lists, rank_of, rank_load, slowness, target):
    """Return the excess that goes when every replica of an expert gets lighter.

    Args:
        expert: whose replicas.
        drop: int64, load that each loses.
        lists: `SlotLists` of the layer.
        rank_of: int64 [slots].
        rank_load: int64 [ranks].
        slowness: int64 [ranks].
        target: int64, time.
    """
    following = lists.next
    relief = np.int64(0)
    t = lists.first[expert]
    while t >= 0:
        r = rank_of[t]
        relief -= excess_gained(rank_load[r], -drop, slowness[r], target)
        t = following[t]
    return relief
