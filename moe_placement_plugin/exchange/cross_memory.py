"""Read memory of another process of the same host by cross-memory attach.

One copy by the system, where a message over loopback takes four. Linux allows it to processes of
the same user, unless the Yama module restricts tracing (``kernel.yama.ptrace_scope``) or a
container's rules forbid it; then experts are sent.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_AT_ONCE = 1024
"""Pieces in one call: the system's IOV_MAX."""

_mark = ctypes.create_string_buffer(16)
"""By which another process knows that it reads this one.

A process's number may be another's in another container.
"""


class _Piece(ctypes.Structure):
    """Stands for the system's ``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


@dataclass(frozen=True)
class Process:
    """Name a process whose memory can be read.

    Attributes:
        number: its process id.
        mark_at: address of the bytes that only this process holds.
        mark: these bytes.
    """

    number: int
    mark_at: int
    mark: bytes

    @classmethod
    def own(cls) -> Process:
        """Return this process, for others, who must check it before it is called again."""
        _mark.raw = secrets.token_bytes(len(_mark))
        return cls(os.getpid(), ctypes.addressof(_mark), _mark.raw)

    def check(self) -> None:
        """Make sure that it is the process it says it is.

        Raises:
            OSError: when it is not, or its memory cannot be read.
        """
        found = ctypes.create_string_buffer(len(self.mark))
        self.read([(ctypes.addressof(found), self.mark_at, len(self.mark))])
        if found.raw != self.mark:
            raise OSError(f"process {self.number} is another one here")

    def read(self, pieces: Iterable[tuple[int, int, int]]) -> None:
        """Copy memory of the process into this one's.

        Args:
            pieces: (address here, address there, bytes), each.

        Raises:
            OSError: when it is gone, or any of it cannot be read.
        """
        whole = [piece for piece in pieces if piece[2]]
        for begin in range(0, len(whole), _AT_ONCE):
            part = whole[begin : begin + _AT_ONCE]
            here = (_Piece * len(part))(*(_Piece(at, size) for at, _, size in part))
            there = (_Piece * len(part))(*(_Piece(at, size) for _, at, size in part))
            wanted = sum(size for _, _, size in part)
            got = _readv()(self.number, here, len(part), there, len(part), 0)
            if got < 0:
                error = ctypes.get_errno()
                raise OSError(
                    error, f"memory of process {self.number} cannot be read: {os.strerror(error)}"
                )
            if got != wanted:
                # The system reads at most 2 GB at once, and stops at what is not there.
                if got == 0:
                    raise OSError(f"memory of process {self.number} ends within what is to be read")
                self.read(_after(part, got))


def _after(pieces: Sequence[tuple[int, int, int]], done: int) -> list[tuple[int, int, int]]:
    """Return what is left of the pieces when the first ``done`` bytes have been copied."""
    left = []
    for here, there, size in pieces:
        skip = min(done, size)
        done -= skip
        left.append((here + skip, there + skip, size - skip))
    return left


@cache
def _readv() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except AttributeError:
        raise OSError("this system has no process_vm_readv") from None
    call.restype = ctypes.c_ssize_t
    call.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Piece),
        ctypes.c_ulong,
        ctypes.POINTER(_Piece),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    return call


@dataclass(frozen=True)
class AttachedRows:
    """Show a parameter of a layer's experts in another process.

    `expert_memory.Parameter.rows`, as far as reading takes it.

    Attributes:
        process: whose memory it is.
        at: address of its first slot.
        stride: bytes from slot to slot.
        bytes: of one expert.
    """

    process: Process
    at: int
    stride: int
    bytes: int

    def row(self, slot: int) -> int:
        """Return the address of a slot's expert."""
        return self.at + slot * self.stride

    def beginning(self, size: int) -> builtins.bytes:
        """Return the first ``size`` bytes.

        Raises:
            OSError: as `Process.read`.
        """
        found = ctypes.create_string_buffer(size)
        self.process.read([(ctypes.addressof(found), self.at, size)])
        return found.raw
