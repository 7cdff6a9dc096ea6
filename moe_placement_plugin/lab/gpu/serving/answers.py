"""Say how one server's greedy answers differ from another's.

Adding the same numbers in another order changes the last bits of a logit, so two correct servers
may part where two tokens are about as probable. That is what tells such a place from a wrong
answer: how far the other server's token was behind in the reference's own distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ...servers.engines import Completion

ASKED, ANSWERED = 12, 16
"""Prompts whose answers are compared, and tokens of each."""

ALTERNATIVES = 5
"""Most probable tokens at each place that servers are asked for."""


def difference(found: Sequence[Completion], reference: Sequence[Completion]) -> dict:
    """Compare answers up to and with the first other token.

    Behind it the two continue different texts.

    Args:
        found: of the server, one per prompt.
        reference: of the one that it is compared with, with alternatives where they differ.

    Returns:
        ``different``: answers with another token; ``logprobs``: the largest difference of the
        chosen tokens' log probabilities, and ``median`` that of half of them: a few that differ
        much are routed otherwise at a near tie, all of them mean another sum; ``behind``: how much
        less probable the reference had the other token, the largest of all (natural logarithm; at
        least so much for a token that is not among its alternatives, 0 when nothing differs);
        ``first``: of each answer that differs its number, the place, both log probabilities and
        ``behind``.
    """
    first: list[dict] = []
    gaps: list[float] = []
    for number, (ours, theirs) in enumerate(zip(found, reference, strict=True)):
        parted = [a != b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
        until = parted.index(True) + 1 if True in parted else len(parted)
        gaps += [abs(a - b) for a, b in zip(ours.logprobs[:until], theirs.logprobs[:until])]
        if True in parted:
            at = until - 1
            likely = theirs.alternatives[at]
            missed = theirs.logprobs[at] - likely.get(ours.token_ids[at], min(likely.values()))
            first.append(
                {
                    "answer": number,
                    "place": at,
                    "logprob": ours.logprobs[at],
                    "reference": theirs.logprobs[at],
                    "behind": missed,
                }
            )
    behind = max((one["behind"] for one in first), default=0.0)
    return {
        "different": len(first),
        "logprobs": max(gaps, default=0.0),
        "median": median(gaps or [0.0]),
        "behind": behind,
        "first": first,
    }
