"""Start a process, and end it together with all its descendants."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "DPO_RUN_MARKS"  # environment variable: the marks of a process and of its ancestors


@dataclass(eq=False)
class Process:
    """A command in its own session, with its output in `log`."""

    command: Sequence[str]
    log: Path
    env: Mapping[str, str]
    folder: Path | None = None
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.began, self.ended = time.monotonic(), 0.0
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env={**self.env, MARK: f"{self.env.get(MARK, '')} {self.mark}"},
                start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, None if it had to be killed. Ends all processes it started."""
        try:
            return self.popen.wait(None if seconds is None else max(0.1, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.ended = time.monotonic()
            self.end()

    def end(self) -> None:
        """Send SIGKILL to the process and all processes with its mark, including workers in other
        groups or sessions."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (pids := marked(self.mark)) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.popen.wait()

    def running(self) -> bool:
        return self.popen.poll() is None

    @property
    def seconds(self) -> float:
        """Its run time, without the time to end its remaining processes."""
        return (self.ended or time.monotonic()) - self.began


def marked(mark: str) -> list[int]:
    """Running processes with this mark in their environment; none without /proc."""
    results = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark.encode() in (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # ended meanwhile, or another user's
            continue
        if ours and state != "Z":
            results.append(int(folder.name))
    return results
