"""Gives freed memory back to the system, so that a process that runs for months stays as large as what it holds.

glibc's malloc keeps what is freed beneath a block that is still in use. Learner and server make and free megabytes
several times a second (versions of the weights, checkpoints, batches) in many threads, each with a heap of its own, and
now and then something small that stays comes to lie between: for hours their heaps grow, though no more is in use.
A lower M_MMAP_THRESHOLD, with which each such block is a mapping of its own, avoids that too, but the training pays for
it with page faults in every update; to look through the heaps once a minute costs milliseconds.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Final

_EVERY_S: Final = 60.0


def give_back(library: object = None) -> bool:
    """Give back each whole page that is free, wherever it lies; False where the C library knows no way.

    library: with malloc_trim, or without; None: this process's.
    """
    trim = getattr(library or ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # musl, macOS
        return False
    trim(ctypes.c_size_t(0))  # without the GIL
    return True


def keep_giving_back(every_s: float = _EVERY_S) -> None:
    """Do so again and again, in a thread of its own, for as long as the process lives."""

    def run() -> None:
        while give_back():
            time.sleep(every_s)

    threading.Thread(target=run, name="heap", daemon=True).start()
