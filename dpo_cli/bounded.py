"""Code and patterns that come with data, run with limits on processor time and memory."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")
MORE_BYTES = 2**30


class OverLimit(Exception):
    """More time or memory than allowed; the message says which."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise OverLimit if the body computes for more than `seconds`, or allocates more than
    `MORE_BYTES`.

    Only in the main thread, where Python runs signal handlers, and memory only on Linux. Seconds
    are processor time, so that a busy machine causes no failures. A single C operation is not
    interrupted: regular expressions check for signals, operations on long integers do not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OverLimit(f"takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        with _memory():
            yield
    except MemoryError as error:
        raise OverLimit(f"takes more than {MORE_BYTES / 2**30:g} GiB of memory") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory() -> Iterator[None]:
    """Limit the growth of the process's address space; the hard limit stays, so that the soft one
    can be restored."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform != "linux" or soft != resource.RLIM_INFINITY:
        yield
        return
    now = int(STATM.read_bytes().split()[0]) * resource.getpagesize()
    most = now + MORE_BYTES if hard == resource.RLIM_INFINITY else min(now + MORE_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
