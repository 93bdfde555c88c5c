"""Code and patterns that come with data, run in bounded processor time and memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")
MORE_BYTES = 2**30


class OverLimit(Exception):
    """More time or memory than allowed; the message says which."""


class bounded:  # a class and no @contextmanager, as each rendering enters one
    """Raise OverLimit once the body has computed for `seconds`, or wants `MORE_BYTES` more memory
    than the process has.

    Only in the main thread, where Python runs the handlers of signals, and memory only on Linux.
    Seconds are of the processor, so that a busy machine fails no one. A single operation of C is
    not interrupted: those of regular expressions look for signals, those of long integers do not.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.main:
            self._handler = signal.signal(signal.SIGVTALRM, self._stop)
            self._memory = resource.getrlimit(resource.RLIMIT_AS)
            if sys.platform == "linux" and self._memory[0] == resource.RLIM_INFINITY:
                _allow_memory(MORE_BYTES, self._memory[1])
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self.main:
            self._restore()
            if isinstance(error, MemoryError):
                most = f"{MORE_BYTES / 2**30:g} GiB"
                raise OverLimit(f"takes more than {most} of memory") from error

    def _stop(self, number: int, frame: Any) -> None:
        self._restore()  # here as well: a late signal is handled on the way into __exit__
        raise OverLimit(f"takes more than {self.seconds:g} seconds")

    def _restore(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, self._memory)
        signal.signal(signal.SIGVTALRM, self._handler)


def _allow_memory(more: int, hard: int) -> None:
    """Limit what the process may add to its addresses. The hard limit stays, so that the soft one
    can be set back."""
    most = int(os.pread(_statm(os.getpid()), 32, 0).split()[0]) * resource.getpagesize() + more
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


@lru_cache(maxsize=1)
def _statm(process: int) -> int:
    """A handle of this process's memory counters, for as long as it runs: a fork's are others."""
    return os.open(STATM, os.O_RDONLY | os.O_CLOEXEC)
