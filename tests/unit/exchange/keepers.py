"""Processes that hold the store of an agreement of two ranks, and end as soon as they may."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch.distributed as dist

from moe_placement_plugin.exchange.commit import Agreement

LATE = 0.5
"""Seconds after which the other rank reads.

Without help the process with the store has ended by then.
"""


def killed() -> None:
    """End like a process that its caller kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def after_a_commit(agreement: Agreement) -> None:
    _vote_last(agreement)
    agreement.stay()
    killed()


def after_an_abort(agreement: Agreement) -> None:
    agreement.abort(0, "the disk is gone")


def after_an_error(agreement: Agreement) -> None:
    agreement.vote(0)
    sys.exit("not to be foreseen")


def after_the_survivors_are_known(agreement: Agreement) -> None:
    agreement.abort(0, "rank 2 has died")
    agreement.survivors(20)
    killed()


def _vote_last(agreement: Agreement) -> None:
    while agreement.missing(0) != [0]:
        time.sleep(0.001)
    assert agreement.vote(0, last=True) is None


def hold(pipe, then, timeout: float) -> None:
    """Make the store, enter as rank 0, and do ``then``."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    agreement = Agreement(store, 1, 0, [0, 1], timeout)
    assert agreement.enter("digest") is None
    then(agreement)
