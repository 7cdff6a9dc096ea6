"""Compute digests on the CPU: numba, one pass over the bytes, as many threads as torch uses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from .definition import BLOCK, KEYS, multipliers

_SHARE = 1 << 22
"""Bytes for one thread at a time: long against the call, short against a layer."""


@njit(cache=True, nogil=True)
def _blocks(words: np.ndarray, keys: np.ndarray, factors: np.ndarray) -> np.uint64:
    """Add factor * (sum of key * word) up over the blocks of ``words`` (uint32), mod 2^64."""
    # The inner loops run over slices from zero: only then does the compiler see that no index is
    # negative and multiplies eight words at a time.
    total = np.uint64(0)
    size = keys.size
    full = words.size // size
    for block in range(full):
        here = words[block * size : (block + 1) * size]
        part = np.uint64(0)
        for i in range(size):
            part += np.uint64(here[i]) * np.uint64(keys[i])
        total += part * factors[block]
    rest = words[full * size :]
    if rest.size:
        part = np.uint64(0)
        for i in range(rest.size):
            part += np.uint64(rest[i]) * np.uint64(keys[i])
        total += part * factors[full]
    return total


def digests(data: np.ndarray, threads: int = 1) -> np.ndarray:
    """Compute the digest of every slot.

    Args:
        data: uint8 ``[slots, bytes per slot]``, C-contiguous.
        threads: threads to use.

    Returns:
        uint64 ``[slots]``, as `definition.reference` gives for each row.
    """
    slots, size = data.shape
    if not size:
        return np.zeros(slots, dtype=np.uint64)
    if size % 4 or data.ctypes.data % 4:
        padded = np.zeros((slots, -(-size // 4) * 4), dtype=np.uint8)
        padded[:, :size] = data
        data = padded
    words = data.view("<u4")
    step = max(BLOCK, _SHARE // 4 // BLOCK * BLOCK)
    factors = multipliers(-(-words.shape[1] // BLOCK))
    jobs = [(slot, first) for slot in range(slots) for first in range(0, words.shape[1], step)]

    def run(job: tuple[int, int]) -> Any:
        slot, first = job
        part = words[slot, first : first + step]
        return _blocks(
            part, KEYS, factors[first // BLOCK : first // BLOCK + -(-part.size // BLOCK)]
        )

    if threads > 1 and len(jobs) > 1:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(run, jobs))
    else:
        parts = [run(job) for job in jobs]
    result = np.zeros(slots, dtype=np.uint64)
    np.add.at(result, [slot for slot, _ in jobs], np.array(parts, dtype=np.uint64))
    return result
