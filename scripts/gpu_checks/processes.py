"""Starts a check's process and ends it with all that it has started."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_checks.facts import ROOT

MARK = "DPO_RUN_GPU_CHECK"  # in the environment of all processes of a step
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
    "MPLBACKEND": "Agg", "COLUMNS": "160", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


def environment(work: Path, threads: int) -> dict[str, str]:
    """Offline, with this checkout first; packages that a folder of PYTHONPATH holds are kept."""
    before = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    paths = [str(ROOT / "scripts"), str(ROOT), *before]
    own = {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads),
        "HF_HOME": str(work / "hf"), "DPO_RUN_CACHE": str(work / "cache"),
    }  # fmt: skip
    return os.environ | OFFLINE | own


@dataclass(eq=False)
class Process:
    """A command in a session of its own, with its output in `log`."""

    command: Sequence[str]
    log: Path
    env: dict[str, str]
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                env=self.env | {MARK: self.mark}, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> int | None:
        """The exit code, None if it had to be killed. Nothing that it started is left."""
        try:
            return self.popen.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """SIGKILL to the process and everything with its mark: workers in groups or sessions of
        their own, too."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.popen.wait()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def marked(mark: str) -> list[int]:
    """Living processes with this mark in their environment; none where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = wanted in (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # ended meanwhile, or another user's
            continue
        if ours and state != "Z":
            found.append(int(folder.name))
    return found


def python(*words: str) -> list[str]:
    return [sys.executable, *words]
