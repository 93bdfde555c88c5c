"""Start one run in a process of its own, for sweeps and recipes.

A fresh process means fresh CUDA and global state, and a crash stays in its job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dpo_cli.distributed.signals import stopping_signals
from dpo_cli.errors import ConfigError


def child_command() -> list[str]:
    """How a child is started, with no module from the current folder (-P); tests replace this to
    put a stub in its place."""
    return [sys.executable, "-P", "-m", "dpo_cli"]


def run_child(arguments: Sequence[str]) -> tuple[int, bool]:
    """Run `dpo-run <arguments>` to its end: its exit code, and whether a signal asked us to stop.

    The child inherits our output. Signals are forwarded and the child is waited for, so that
    it can save a checkpoint. A child killed by signal N gives -N. Raises ConfigError for text that
    no process can be given.
    """
    for word in arguments:
        try:
            whole = b"\0" not in os.fsencode(word)
        except UnicodeEncodeError:  # a lone surrogate, by an escape in YAML
            whole = False
        if not whole:
            raise ConfigError(f"{word!r}: has a character that no command line can have; remove it")
    # Its own process group: Ctrl-C reaches it once, through us, and not a second time from
    # the terminal, at which it would not save.
    child = subprocess.Popen([*child_command(), *arguments], process_group=0)
    with _forwarding(child) as stopped:
        code = child.wait()
    return code, bool(stopped)


def shell_status(code: int) -> int:
    """The exit code that stands for a child's: 128 + N where signal N killed it."""
    return 128 - code if code < 0 else code


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    stopped: list[int] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield stopped  # a launcher's worker thread: Python sets handlers in the main one only
        return
    before = {number: signal.signal(number, forward) for number in stopping_signals()}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
