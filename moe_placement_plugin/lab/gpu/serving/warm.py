"""Have every kernel compiled before anything is measured.

Requests are sent whose forward passes have every size that a kernel is compiled anew for.

Triton compiles a kernel when a server first needs it, about a second each time on the hosts of two
H200: vLLM's MoE kernel has other tiles for up to 32, 64, 96, 128 and 512 tokens and for more than
128 per expert, each compiled anew where a number of rows is no multiple of 16 (`unlike`). vLLM
keeps what was compiled in a folder per compiled graph, so that servers with different placements
compile it all again. Whoever measures without this sees each server stop about once in a workload,
in one round or another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import aiohttp
import numpy as np

from .traffic import Seen, complete


def unlike(top_k: int, experts: int) -> set[int]:
    """Return how many tokens less than a multiple of 16 steps must have.

    One for each way that the MoE kernel is compiled in.

    Triton compiles anew according to which of a kernel's integers are multiples of 16. Two of the
    MoE kernel's change with the tokens: choices, and rows with the padding of each expert to a
    block of 16 or a multiple of that.

    Args:
        top_k: experts per token.
        experts: of a layer, redundant ones too.
    """
    ways: dict[tuple[bool, bool], int] = {}
    for less in range(16):
        choices = -less * top_k
        ways.setdefault((choices % 16 == 0, (choices - experts) % 16 == 0), less)
    return set(ways.values())


def steps(longest: int, largest: int, ways: Collection[int]) -> list[list[int]]:
    """Return the lengths of the prompts that are asked at once, step after step.

    Args:
        longest: tokens of a prompt at most.
        largest: tokens of a step at most.
        ways: of `unlike`.

    Returns:
        Single prompts of 2, 3, 4, 6, 8, 12, ... tokens, each in all ways, then several of the
        greatest, likewise. An engine may take those in two steps, which are of such a size again.
    """
    sizes = sorted(
        n
        for n in (first << k for first in (2, 3) for k in range(longest.bit_length()))
        if n <= longest
    )
    several = [[sizes[-1]] * n for n in range(2, largest // sizes[-1] + 1)]
    return [
        [*rest, last - less]
        for *rest, last in [*([n] for n in sizes), *several]
        for less in sorted(ways)
        if less < last
    ]


def warm(
    servers: Mapping[str, str], vocab: int, longest: int, largest: int, ways: Collection[int]
) -> dict[str, str]:
    """Ask all servers at once, each step by step.

    Args:
        servers: name -> address.
        vocab: tokens to ask with.
        longest: tokens of a prompt at most.
        largest: tokens of a step at most.
        ways: of `unlike`.

    Returns:
        name -> why a server could not be asked on.
    """
    return asyncio.run(_warm(servers, vocab, steps(longest, largest, ways)))


async def _warm(servers: Mapping[str, str], vocab: int, asked: list[list[int]]) -> dict[str, str]:
    tokens = np.random.default_rng(11).integers(4, vocab, max(map(max, asked))).tolist()
    failed = {}
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def one(name: str, url: str) -> None:
            try:
                for step in asked:
                    await asyncio.gather(
                        *(complete(session, url, tokens[:length], 1, Seen()) for length in step)
                    )
            except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
                failed[name] = f"{type(error).__name__}: {error}"

        await asyncio.gather(*(one(name, url) for name, url in servers.items()))
    return failed
