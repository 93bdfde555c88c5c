"""Checks that pass, fail, crash and hang, for `test_gpu_check.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fine(setup: Any) -> Iterator[tuple[str, Any]]:
    yield "answer", 42
    yield "threads", os.environ["OMP_NUM_THREADS"]


def fails(setup: Any) -> Iterator[tuple[str, Any]]:
    yield "answer", 41
    raise ValueError("a bug | of ours\nsecond line")


def crashes(setup: Any) -> Iterator[tuple[str, Any]]:
    yield "answer", 42
    os.kill(os.getpid(), signal.SIGSEGV)


def skips(setup: Any) -> Iterator[tuple[str, Any]]:
    from scripts.gpu_checks.facts import Skip

    raise Skip("no such package")
    yield


def hangs(setup: Any) -> Iterator[tuple[str, Any]]:
    """With a worker in a session of its own, as torch's launcher starts them."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"],
                              start_new_session=True)  # fmt: skip
    Path(setup.work, "worker").write_text(str(worker.pid))
    yield "answer", 42
    print("hangs now", flush=True)
    time.sleep(100)
