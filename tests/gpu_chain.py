"""Several `dpo-run` commands one after the other in one process: a process takes seconds to start.

    python gpu_chain.py commands.json results.json

commands.json holds a list of {words, stop_after?, room?}; results.json gets, for each of them,
{code, seconds, peak, syncs}: exit code, bytes at most on the device, and where each step made the
host wait for it. A bug of ours ends the chain with its traceback.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_cli.cli import main
from dpo_cli.train import loop, step

CUDA = torch.cuda.is_available()
syncs: list[list[str]] = []  # of the steps of the command that runs


def counted(train_step: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
    """The step, not the rollout before it; CUDA warns of every call that waits for the device."""

    def run(fit: Any) -> dict[str, float]:
        seen: list[str] = []
        before_step = fit.task.before_step
        if before_step is not None:
            fit.before = before_step(fit.step) or fit.before
            fit.task.before_step = lambda step: {}

        def told(message: Any, kind: Any, file: str, line: int, *rest: Any) -> None:
            own = threading.current_thread() is threading.main_thread()  # not one that saves
            if own and "synchronizing CUDA operation" in str(message):
                seen.append(f"{Path(file).name}:{line}")

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = told
            torch.cuda.set_sync_debug_mode("warn")
            try:
                values = train_step(fit)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                fit.task.before_step = before_step
        syncs.append(seen)
        return values

    return run


def stopping(after_step: Callable[..., None], last: int) -> Callable[..., None]:
    """What comes after a step; behind step `last` the process gets a SIGTERM."""

    def run(fit: Any, *rest: Any) -> None:
        if fit.step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(fit, *rest)

    return run


def short_of_memory(room: float, peak: int) -> Callable[[], None]:
    """Leave this share of what the command before took. On a CPU, where nothing can be limited,
    rows of more than `room` tokens fail. Returns what undoes it."""
    if CUDA:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(room * peak / total)
        return lambda: torch.cuda.set_per_process_memory_fraction(1.0)
    real = step.StepSums.add

    def add(self: Any, task: Any, batch: Any, runtime: Any) -> None:
        if batch.input_ids.numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        real(self, task, batch, runtime)

    step.StepSums.add = add  # type: ignore[method-assign]
    return lambda: setattr(step.StepSums, "add", real)


def run(command: dict[str, Any], peak: int) -> dict[str, Any]:
    syncs.clear()
    after_step, undo = loop._after_step, lambda: None
    if "stop_after" in command:
        loop._after_step = stopping(after_step, command["stop_after"])
    if "room" in command:
        undo = short_of_memory(command["room"], peak)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    started, code = time.perf_counter(), 0
    try:
        main(command["words"])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        loop._after_step = after_step
        undo()
    found = {"code": code, "seconds": time.perf_counter() - started, "syncs": list(syncs)}
    found["peak"] = torch.cuda.max_memory_allocated() if CUDA else 0
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    if CUDA:
        loop._train_step = counted(loop._train_step)
    results: list[dict[str, Any]] = []
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        print(f"--- {' '.join(asked['words'])}", file=sys.stderr, flush=True)
        results.append(run(asked, results[-1]["peak"] if results else 0))
        Path(sys.argv[2]).write_text(json.dumps(results))
