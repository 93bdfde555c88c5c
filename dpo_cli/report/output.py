"""Console output that survives its terminal, and a copy of it in the run folder.

Output goes to the terminal as long as it can be written, and as plain lines without secrets to the
folder's console.log. Once a run has its folder, a closed terminal or pipe, or a full disk behind `>
file`, does not end it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from dpo_cli.escapes import printable

LOG = "console.log"
_CODES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")


class Log:
    """Lines of console.log, kept in memory until there is a folder for them."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._lines = ""
        self._lock = threading.RLock()

    def add(self, lines: str) -> None:
        """Add complete lines. Lines that the folder's disk cannot store are written with the
        next ones; a full disk ends nothing, as this is a copy."""
        with self._lock:
            self._lines += lines
            if self.folder is None or not self._lines or not self.folder.is_dir():
                return
            from dpo_cli.durable import encode  # of use once there is a folder
            from dpo_cli.durable.redact import redact

            text = printable(redact(_CODES.sub("", self._lines)))
            with suppress(OSError), (self.folder / LOG).open("ab") as file:
                file.write(encode(text))
                self._lines = ""  # else the next ones take them along


class Copy:
    """A text file whose complete lines go to a log, without text overwritten after a carriage
    return."""

    def __init__(self, log: Log) -> None:
        self.log, self._begun = log, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text.replace("\r\n", "\n")).split("\n")
        self._begun = _last_shown(self._begun)
        if lines:
            self.log.add("".join(f"{_last_shown(line)}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Nothing to do: lines are written when they are complete."""

    def close(self) -> None:
        if self._begun:
            self.write("\n")


def _last_shown(line: str) -> str:
    return line.rpartition("\r")[2]


class Terminal:
    """stdout or stderr, as long as it can be written to."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lasting, self._gone = stream, False, False

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: closed
            if not self.lasting:
                raise
            if isinstance(error, BlockingIOError):  # its reader is slow
                return
            self._gone = True
            with suppress(OSError, ValueError):  # what is buffered, and native code's output
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Copied:
    """A terminal whose text is copied. Replaces sys.stdout and sys.stderr."""

    def __init__(self, terminal: Terminal, copy: Copy) -> None:
        self.terminal, self.copy = terminal, copy

    def write(self, text: str) -> int:
        self.copy.write(text)
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


@contextmanager
def copied_output() -> Iterator[None]:
    """Run a command with stdout and stderr as `Copied`, for `go_on_in`."""
    log, before = Log(), (sys.stdout, sys.stderr)
    _open_closed()
    out, err = (Copied(Terminal(_never_raising(stream)), Copy(log)) for stream in before)
    sys.stdout, sys.stderr = cast(Any, out), cast(Any, err)
    try:
        yield
    except Exception:  # a bug, whose traceback Python prints at the end
        log.add(traceback.format_exc())
        raise
    finally:
        outlast_terminals()
        for stream in (out, err):
            stream.copy.close()
            stream.flush()  # else Python does, as it exits
        log.add("")
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """If the shell closed a standard stream (`2>&-`), the next opened file would get its
    descriptor, and with it the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _never_raising(stream: TextIO | None) -> TextIO:
    """A stream that escapes characters its encoding does not have. None: it was closed before the
    start."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def outlast_terminals() -> None:
    """From now on, output that can no longer be written is discarded."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Copied):
            stream.terminal.lasting = True


def go_on_in(folder: Path) -> None:
    """`outlast_terminals`, with all previous and further output in the folder's console.log."""
    outlast_terminals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Copied):
            stream.copy.log.folder = folder
            stream.copy.log.add("")
