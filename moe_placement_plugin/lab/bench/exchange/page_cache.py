"""See, and empty, what the system keeps of a folder's files in memory."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path


def cached_share(folder: Path) -> float | None:
    """Return the share of the files' pages that are in the page cache, from a sample of them.

    None where that cannot be asked.
    """
    page, seen, hits = bytearray(4096), 0, 0
    try:
        for file in sorted(folder.iterdir()):
            handle = os.open(file, os.O_RDONLY)
            try:
                for offset in range(0, os.fstat(handle).st_size, 1 << 20):
                    seen += 1
                    try:
                        hits += os.preadv(handle, [page], offset, os.RWF_NOWAIT) > 0
                    except BlockingIOError:
                        continue
            finally:
                os.close(handle)
    except (OSError, AttributeError):
        return None
    return hits / seen if seen else None


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages, which must be on the disk and in no mapping."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def disk_rate(folder: Path) -> float | None:
    """Return the bytes per second of reading the files past the page cache, which stays as it is.

    None where that cannot be done.
    """
    block = mmap.mmap(-1, 1 << 22)  # aligned as O_DIRECT wants it
    amount, begin = 0, time.perf_counter()
    try:
        for file in sorted(folder.iterdir()):
            handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                while got := os.readv(handle, [block]):
                    amount += got
            finally:
                os.close(handle)
    except (OSError, AttributeError):
        return None
    return amount / (time.perf_counter() - begin)
