"""The signals on which a run saves a checkpoint and stops."""

from __future__ import annotations

import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def stopping_signals() -> list[signal.Signals]:
    """Without SIGHUP (closed terminal) if the process was started to ignore it, as by `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOPPING if not (ignored and number == signal.SIGHUP)]
