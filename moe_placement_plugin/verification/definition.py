"""Define the digest of one tensor of one slot, in numpy: the fast forms must equal it.

The slot's bytes, in the order in which they lie in memory, are read as little-endian 32-bit words
``w`` (zeros behind the last byte). In blocks ``b`` of `BLOCK` words

    digest = sum over b of M[b] * (sum over j of K[j] * w[b, j])   mod 2^64

with odd 32-bit keys ``K`` and odd 64-bit multipliers ``M``: multilinear hashing (Carter and Wegman
1981; Lemire and Kaser 2014). It is a sum, so that any number of threads may add it up in any order
and find the same, and yet every word has a factor of its own: a changed word or two exchanged words
always change it, any other difference does with probability 1 - 2^-32 or better. Bits are compared,
not numbers: NaN payloads and the sign of zero count.
"""

from __future__ import annotations

import hashlib

import numpy as np

BLOCK = 4096
"""Words per block.

Their 16 KiB of keys stay in the first-level cache beside the weights that stream through.
"""

_MASK = (1 << 64) - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele et al. 2014), uint64 in and out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys() -> np.ndarray:
    drawn = (splitmix64(np.arange(2 * BLOCK, dtype=np.uint64)) >> np.uint64(32)).astype(
        np.uint32
    ) | np.uint32(1)
    # Different keys, so that no two words of a block can be exchanged unseen.
    first = np.sort(np.unique(drawn, return_index=True)[1])[:BLOCK]
    return drawn[first]


KEYS = _keys()
"""uint32 ``[BLOCK]``, odd and all different."""

KEYS.setflags(write=False)


def multipliers(blocks: int) -> np.ndarray:
    """Draw the factor of each block, uint64 ``[blocks]``, odd."""
    return splitmix64(np.arange(1 << 32, (1 << 32) + blocks, dtype=np.uint64)) | np.uint64(1)


def reference(data: bytes | np.ndarray) -> int:
    """Compute the digest of one slot's bytes.

    Args:
        data: the bytes in memory order.
    """
    raw = np.frombuffer(
        np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data,
        dtype=np.uint8,
    )
    words = np.zeros(-(-raw.size // (4 * BLOCK)) * BLOCK, dtype="<u4")
    words.view(np.uint8)[: raw.size] = raw
    sums = (words.reshape(-1, BLOCK).astype(np.uint64) * KEYS.astype(np.uint64)).sum(
        1, dtype=np.uint64
    )
    return int((sums * multipliers(sums.size)).sum(dtype=np.uint64)) & _MASK


def salt(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Compute what a tensor adds to its slots' digests, mod 2^64.

    Args:
        name: of the tensor.
        shape: without the slots.
        dtype: its type's name.
    """
    return int.from_bytes(
        hashlib.blake2b(f"{name}|{shape}|{dtype}".encode(), digest_size=8).digest(), "little"
    )
