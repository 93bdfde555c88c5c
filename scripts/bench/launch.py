"""Start the benchmark's workers, one process each, and end them."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.bench.job import STARTED, UNAVAILABLE
from scripts.common import ROOT, environment
from scripts.processes import Process

WORKERS = "scripts.bench.workers"
ERROR = re.compile(r"error: |([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception|Interrupt)\b(:|$)")
LAUNCHERS_ERROR = "ChildFailedError"
LONGEST = 200  # characters of a reason


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Failed(SystemExit):
    """A worker that ended without a result. why: one line."""

    def __init__(self, why: str, worker: str = "") -> None:
        super().__init__(f"{worker}: {why}" if worker else why)
        self.why = why


class Unavailable(Failed):
    """The other side cannot be imported here."""


class TimeIsUp(SystemExit):
    """The time limit of --minutes has passed."""

    def __init__(self) -> None:
        super().__init__(
            "time is up (--minutes); finished results are kept in the folder of --keep, and the "
            "same command continues (use fewer --steps if it makes no progress)"
        )


@dataclass(frozen=True)
class Launch:
    """How workers are started. python: of TRL's side, if it has its own. devices: processes per
    worker, started by torch's launcher. until: deadline, in `time.monotonic()`; goes_on: another
    command may continue the work (--keep)."""

    trl_python: str = ""
    devices: int = 1
    until: float | None = None
    goes_on: bool = True

    def other_python(self, worker: str) -> str:
        return self.trl_python if worker == "trl" else ""

    def command(self, worker: str) -> list[str]:
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.devices}"]
        start = [self.other_python(worker) or sys.executable, *(ranks if self.devices > 1 else [])]
        return [*start, "-m", f"{WORKERS}.{worker}"]

    def half(self) -> Launch:
        """The same with half of the remaining time."""
        left = self.seconds_left()
        return self if left is None else replace(self, until=time.monotonic() + left / 2)

    def seconds_left(self) -> float | None:
        if self.until is None:
            return None
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeIsUp()
        return left


PLAIN = Launch()  # one process of this Python, without a time limit


def run_worker(
    worker: str, arguments: Sequence[Path], scratch: Path, threads: int, launch: Launch = PLAIN
) -> None:
    """Raises with the last line of a worker's output if it fails or takes too long."""
    seconds = launch.seconds_left()
    scratch.mkdir(parents=True)
    env = environment(scratch, threads) | allocator()
    env |= {STARTED: repr(time.time()), "TMPDIR": str(scratch)}
    if launch.other_python(worker):
        env["PYTHONPATH"] = str(ROOT)  # ours may contain packages for this Python only
    log = scratch / "log.txt"
    process = Process([*launch.command(worker), *map(str, arguments)], log, env)
    code = process.wait(seconds)
    if code is None:
        raise TimeIsUp()
    if code:
        raise failure(worker, code, log.read_text(errors="replace"))


def allocator() -> dict[str, str]:
    """Configure the CUDA allocator as `dpo-run` does, on all sides."""
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def failure(worker: str, code: int, written: str) -> Failed:
    missing = [line for line in written.splitlines() if line.startswith(UNAVAILABLE)]
    if missing:
        return Unavailable(missing[0])
    say(written[-4000:])
    return Failed(reason(code, written), f"{worker} failed with exit code {code}")


def reason(code: int, written: str) -> str:
    """One line: the error at the end of a worker's output, not that of torch's launcher."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line) and LAUNCHERS_ERROR not in line]
    last = [*lines[-1:], *errors[-1:]] or ["it wrote nothing"]
    return last[-1] if len(last[-1]) <= LONGEST else f"{last[-1][: LONGEST - 3]}..."
