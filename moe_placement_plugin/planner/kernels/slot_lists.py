"""Find the slots of an expert, in linked lists.

Most experts have one or two replicas, so that whether a rank holds one is told by fewer looks than
the rank has slots.
"""

import numpy as np

from .compiled import inner_kernel
from .state import SlotLists


@inner_kernel(makes_arrays=True)
def make_slot_lists(experts, slots):
    """Return `SlotLists` that are yet to be written."""
    return SlotLists(np.empty(experts, np.int64), np.empty(slots, np.int64))


@inner_kernel
def list_slots(expert_of, lists):
    """Write the lists of a layer, int32 [slots]."""
    first, following = lists
    first[:] = -1
    for s in range(expert_of.size):
        following[s] = first[expert_of[s]]
        first[expert_of[s]] = s


@inner_kernel
def has(expert, rank, rank_of, lists):
    """Decide whether a rank has a slot on the list of an expert."""
    following = lists.next
    s = lists.first[expert]
    while s >= 0:
        if rank_of[s] == rank:
            return True
        s = following[s]
    return False


@inner_kernel
def relist(lists, slot, before, after):
    """Bring a slot from the list of expert `before` to that of expert `after`."""
    first, following = lists
    if first[before] == slot:
        first[before] = following[slot]
    else:
        t = first[before]
        while following[t] != slot:
            t = following[t]
        following[t] = following[slot]
    following[slot] = first[after]
    first[after] = slot
