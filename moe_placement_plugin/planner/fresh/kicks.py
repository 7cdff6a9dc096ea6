"""Draw the random steps with which a search that is stuck is kicked."""

from ..kernels.compiled import inner_kernel
from ..kernels.layer import holds, may_swap

NO_STEP = 0
EXCHANGE = 1
REPLACE = 2


@inner_kernel
def next_random(random):
    """Return the next integer of 31 bits of a generator, int64 [1], which is updated.

    One step of a 64-bit linear congruential generator (Knuth, MMIX); integers only, so equal on
    every machine.
    """
    random[0] = random[0] * 6364136223846793005 + 1442695040888963407
    return (random[0] >> 33) & 0x7FFFFFFF


@inner_kernel
def draw_step(state, ranks, hot, redundant, random):
    """Draw a step around a busy rank, where the slots that are drawn allow one.

    Args:
        state: `LayerState` or `WindowsState`.
        ranks: `Ranks`.
        hot: the busy rank.
        redundant: whether experts may be replicated.
        random: int64 [1], the generator's state, updated.

    Returns:
        (what, slot on the rank, slot elsewhere): `EXCHANGE` their experts, `REPLACE` the latter's
        expert by the former's, or `NO_STEP`.
    """
    start = ranks.start
    expert_of = state.expert_of
    replicas = state.replicas
    i = start[hot] + next_random(random) % (start[hot + 1] - start[hot])
    j = next_random(random) % expert_of.size
    a = expert_of[i]
    b = expert_of[j]
    r = ranks.rank_of[j]
    if r == hot or a == b:
        return NO_STEP, i, j
    if redundant and replicas[b] > 1 and next_random(random) % 2 == 0:
        if not holds(expert_of, start, r, a):
            return REPLACE, i, j
    if may_swap(expert_of, replicas, start, i, j, hot, r):
        return EXCHANGE, i, j
    return NO_STEP, i, j
