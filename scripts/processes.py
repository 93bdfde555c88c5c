"""Start a process and end it with everything that it has started."""

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

MARK = "DPO_RUN_MARKS"  # in the environment: of a process, of those that started it


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
        """The exit code, None if it had to be killed. All processes it started have ended."""
        try:
            return self.popen.wait(None if seconds is None else max(0.1, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.ended = time.monotonic()
            self.end()

    def end(self) -> None:
        """SIGKILL to the process and everything with its mark, including workers in other groups or
        sessions."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.popen.wait()

    def running(self) -> bool:
        return self.popen.poll() is None

    @property
    def seconds(self) -> float:
        """Its run time, without the time to end processes it left behind."""
        return (self.ended or time.monotonic()) - self.began


def marked(mark: str) -> list[int]:
    """Living processes with this mark in their environment; none without /proc."""
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
