"""Starts the workers of `bench.py`, each in a process of its own, and ends them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench_job import STARTED, UNAVAILABLE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}
ERROR = re.compile(r"error: |([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception|Interrupt)\b(:|$)")
LAUNCHERS_ERROR = "ChildFailedError"
LONGEST = 200  # characters of a reason
GRACE = 20  # seconds between being asked to stop and being killed


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Failed(SystemExit):
    """A worker that ended without an answer. why: one line."""

    def __init__(self, why: str, worker: str = "") -> None:
        super().__init__(f"{worker}: {why}" if worker else why)
        self.why = why


class Unavailable(Failed):
    """The other side cannot be imported here."""


class TimeIsUp(SystemExit):
    """--minutes are over."""

    def __init__(self) -> None:
        super().__init__(
            "time is up (--minutes); what is finished is kept in the folder of --keep: the same "
            "command goes on (with fewer --steps, if it never gets further)"
        )


@dataclass(frozen=True)
class Launch:
    """How workers are started. python: of TRL's side, where it is another one. devices:
    processes of a worker, by torch's launcher. until: `time.monotonic()` at which work stops;
    goes_on: another command may finish it (--keep)."""

    trl_python: str = ""
    devices: int = 1
    until: float | None = None
    goes_on: bool = True

    def other_python(self, script: str) -> str:
        return self.trl_python if script == "bench_trl.py" else ""

    def command(self, script: str) -> list[str]:
        python = self.other_python(script)
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.devices}"]
        start = [python or sys.executable, *(ranks if self.devices > 1 else [])]
        return [*start, str(HERE / script)]

    def half(self) -> Launch:
        """With half of the time that is left."""
        left = self.seconds_left()
        return self if left is None else replace(self, until=time.monotonic() + left / 2)

    def seconds_left(self) -> float | None:
        if self.until is None:
            return None
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeIsUp()
        return left


PLAIN = Launch()  # one process of this Python, however long it takes


def run_python(
    script: str,
    arguments: Sequence[Path],
    scratch: Path,
    threads: int,
    launch: Launch = PLAIN,
) -> None:
    """A worker script; exits with the end of what it wrote if it fails or takes too long."""
    seconds = launch.seconds_left()
    scratch.mkdir(parents=True)
    env = os.environ | OFFLINE | allocator() | {
        "PYTHONPATH": import_path(), "OMP_NUM_THREADS": str(threads), STARTED: repr(time.time()),
        "HF_HOME": str(scratch / "hf"), "DPO_RUN_CACHE": str(scratch / "cache"),
        "TMPDIR": str(scratch),
    }  # fmt: skip
    if launch.other_python(script):
        env["PYTHONPATH"] = str(ROOT)  # ours may hold packages for this Python alone
    command = [*launch.command(script), *map(str, arguments)]
    with (scratch / "log.txt").open("w+") as log:
        worker = subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0)
        try:
            code = worker.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeIsUp() from None
        finally:
            stop(worker)
        if code:
            log.seek(0)
            raise failure(script, code, log.read())


def import_path() -> str:
    """PYTHONPATH of a child: this checkout, then what ours has, such as a folder of packages."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def allocator() -> dict[str, str]:
    """The CUDA allocator as `dpo-run` sets it, on all sides."""
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def stop(worker: subprocess.Popen[bytes]) -> None:
    """End a worker that still runs. Torch's launcher, when asked to, ends its ranks, which are in
    groups of their own."""
    if worker.poll() is None:
        worker.terminate()
        try:
            worker.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def failure(script: str, code: int, written: str) -> Failed:
    missing = [line for line in written.splitlines() if line.startswith(UNAVAILABLE)]
    if missing:
        return Unavailable(missing[0])
    say(written[-4000:])
    return Failed(reason(code, written), f"{script} failed with exit code {code}")


def reason(code: int, written: str) -> str:
    """One line: the error at the end of what a worker wrote, not the one of torch's launcher."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line) and LAUNCHERS_ERROR not in line]
    last = [*lines[-1:], *errors[-1:]] or ["it wrote nothing"]
    return last[-1] if len(last[-1]) <= LONGEST else f"{last[-1][: LONGEST - 3]}..."
