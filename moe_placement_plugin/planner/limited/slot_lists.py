"""Which slots hold an expert, in linked lists.

Most experts have one or two replicas, so that whether a rank holds one is told by fewer looks than the rank has slots.
"""

from ..kernels.compiled import kernel


@kernel
def list_slots(expert_of, first_slot, next_slot):
    """Write the lists: first_slot int64 [experts], next_slot int64 [slots], -1 at the end."""
    first_slot[:] = -1
    for s in range(expert_of.size):
        next_slot[s] = first_slot[expert_of[s]]
        first_slot[expert_of[s]] = s


@kernel
def has(expert, rank, rank_of, first_slot, next_slot):
    """Whether `rank` has a slot on the list of `expert`."""
    s = first_slot[expert]
    while s >= 0:
        if rank_of[s] == rank:
            return True
        s = next_slot[s]
    return False


@kernel
def relist(first_slot, next_slot, slot, before, after):
    """Bring `slot` from the list of expert `before` to that of expert `after`."""
    if first_slot[before] == slot:
        first_slot[before] = next_slot[slot]
    else:
        t = first_slot[before]
        while next_slot[t] != slot:
            t = next_slot[t]
        next_slot[t] = next_slot[slot]
    next_slot[slot] = first_slot[after]
    first_slot[after] = slot
