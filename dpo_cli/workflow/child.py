"""Start one run of a sweep or recipe in a child process.

A new process has fresh CUDA and global state, and a crash ends only this job.
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
    """The command of a child, which imports no module from the current folder (-P); tests replace
    it with a stub."""
    return [sys.executable, "-P", "-m", "dpo_cli"]


def run_child(arguments: Sequence[str]) -> tuple[int, bool]:
    """Run `dpo-run <arguments>`; returns its exit code, and whether we received a stop signal.

    The child inherits our output. We forward signals and wait for the child, so that it can save a
    checkpoint. The code is -N if signal N killed the child. Raises ConfigError for text that cannot
    be a process argument.
    """
    for word in arguments:
        try:
            valid = b"\0" not in os.fsencode(word)
        except UnicodeEncodeError:  # a lone surrogate, by an escape in YAML
            valid = False
        if not valid:
            raise ConfigError(f"{word!r}: contains a character not allowed in arguments; remove it")
    # A separate process group: the child gets Ctrl-C once, through us, and not a second time from
    # the terminal, which would end it without saving.
    child = subprocess.Popen([*child_command(), *arguments], process_group=0)
    with _forwarding(child) as stopped:
        code = child.wait()
    return code, bool(stopped)


def shell_status(code: int) -> int:
    """The shell's exit code for a child's: 128 + N if signal N killed it."""
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
    previous = {number: signal.signal(number, forward) for number in stopping_signals()}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
