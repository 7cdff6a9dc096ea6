"""Make problems of five visibly different domains for the tiny MoE.

It is trained on some of them and examined with others.

A problem is a prompt that ends in its domain's own mark, and the one right answer:

    sum       47+85=        231       two-digit numbers; the answer has three digits, the
                                      lowest first (47+85 is 132)
    sort      dbgac>        abcdg     distinct letters a to j in alphabetical order
    brackets  ([]{<~        >})       what closes the brackets that are open, the innermost first
    reverse   QXAT/         TAXQ      capital letters backwards
    copy      ;:!_;|        ;:!_;     punctuation, repeated

Whether a prompt may be trained on is decided by the prompt itself (`held_out`), so that training
and examination are disjoint whatever the seeds are.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELD_OUT = 8
"""One prompt in so many is kept from training."""


@dataclass(frozen=True)
class Problem:
    """Hold a question with one right answer.

    Attributes:
        prompt: the question, with the mark of its domain at the end.
        answer: the answer, without the end-of-text token that follows it.
    """

    prompt: str
    answer: str


def _sum(rng: random.Random) -> Problem:
    a, b = rng.randrange(100), rng.randrange(100)
    return Problem(f"{a:02}+{b:02}=", f"{a + b:03}"[::-1])


def _sort(rng: random.Random) -> Problem:
    letters = rng.sample("abcdefghij", rng.randint(4, 6))
    return Problem("".join(letters) + ">", "".join(sorted(letters)))


CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">"}
"""Opening bracket -> the bracket that closes it."""


def _brackets(rng: random.Random) -> Problem:
    text, open_ones = "", []
    for _ in range(rng.randint(3, 8)):
        if open_ones and (len(open_ones) == 4 or rng.random() < 0.4):
            text += CLOSES[open_ones.pop()]
        else:
            open_ones.append(rng.choice("([{<"))
            text += open_ones[-1]
    if not open_ones:
        return _brackets(rng)
    return Problem(text + "~", "".join(CLOSES[bracket] for bracket in reversed(open_ones)))


def _reverse(rng: random.Random) -> Problem:
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(4, 7)))
    return Problem(letters + "/", letters[::-1])


def _copy(rng: random.Random) -> Problem:
    signs = "".join(rng.choices("!:;,._-*&%", k=rng.randint(4, 8)))
    return Problem(signs + "|", signs)


DOMAINS: dict[str, Callable[[random.Random], Problem]] = {
    "sum": _sum,
    "sort": _sort,
    "brackets": _brackets,
    "reverse": _reverse,
    "copy": _copy,
}
"""Domain -> a random problem of it."""


def held_out(prompt: str) -> bool:
    """Return whether the prompt is kept from training."""
    return zlib.crc32(prompt.encode()) % HELD_OUT == 0


def problems(domain: str, seed: int, training: bool) -> Iterator[Problem]:
    """Draw random problems of a domain without end, all for training or all held out.

    Args:
        domain: one of `DOMAINS`.
        seed: of the choice of problems.
        training: which of the two.
    """
    rng = random.Random(f"{domain} {seed} {training}")
    while True:
        problem = DOMAINS[domain](rng)
        if held_out(problem.prompt) != training:
            yield problem


def examination(domain: str, count: int, seed: int) -> list[Problem]:
    """Draw different held-out problems.

    Args:
        domain: one of `DOMAINS`.
        count: how many.
        seed: of the choice.
    """
    chosen: dict[str, Problem] = {}
    for problem in problems(domain, seed, training=False):
        chosen.setdefault(problem.prompt, problem)
        if len(chosen) == count:
            return list(chosen.values())
    raise AssertionError("problems() has no end")
