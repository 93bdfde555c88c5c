"""The run folder's lock, and signals that stop a run after the current step."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dpo_cli.distributed.signals import stopping_signals
from dpo_cli.durable.refusals import as_refusal
from dpo_cli.errors import RunLockedError

if TYPE_CHECKING:  # run folders are claimed before torch is imported
    from dpo_cli.distributed.ranks import Ranks

log = logging.getLogger(__name__)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder's lock, which the kernel releases when the process dies.

    The file holds the owner's process id; one left behind means that the owner was killed, which
    is logged. Raises RunLockedError, and DiskError where the disk has no locks.
    """
    path = run_dir / ".lock"
    with path.open("a+", encoding="utf-8", errors="replace") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise RunLockedError(
                f"{run_dir}: in use by process {holder}; wait for it or choose another run_dir"
            ) from None
        except OSError as error:
            raise as_refusal(error, path) or error from error
        stream.seek(0)
        if left := stream.read().strip():
            log.warning("%s: taking over from process %s, which was killed", run_dir, left)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


class StopRequest:
    """Set by a signal; the loop checks it between steps."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    def received(self, ranks: Ranks) -> str | None:
        """The signal that any rank has received (a collective): all ranks stop, or none."""
        if ranks.size == 1:
            return self.signal
        if not ranks.any(self.signal is not None):
            return None
        return next(filter(None, ranks.gather(self.signal)), None)

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        before = {n: signal.signal(n, self._handle) for n in stopping_signals()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
