"""Start one run in a process of its own, for sweeps and recipes.

A fresh process means fresh CUDA and global state, and a crash stays in its job.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_BARE = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_WORDS = ("true", "false", "null", "nan", "inf")  # Hydra would not read these as text


def child_command() -> list[str]:
    """How a child is started; tests replace this to put a stub in its place."""
    return [sys.executable, "-m", "dpo_cli"]


def run_child(arguments: Sequence[str]) -> tuple[int, bool]:
    """Run `dpo-run <arguments>` to its end: its exit code, and whether a signal asked us to stop.

    The child inherits our output. Signals are forwarded and the child is waited for, so that
    it can save a checkpoint. A child killed by signal N gives -N.
    """
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
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar, text quoted where it needs to be."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_literal, value)) + "]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    if _BARE.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # Backslashes count only before a quote and before ${ (which would interpolate), where
    # each is doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return "'" + re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", escaped) + "'"
