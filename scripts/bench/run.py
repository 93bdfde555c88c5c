"""Run the sides of a measurement in turn, each in a separate process."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from scripts.bench.equal import Failures, Results, compare
from scripts.bench.job import Job, busy_cpu_seconds
from scripts.bench.launch import PLAIN, Failed, Launch, TimeIsUp, Unavailable, run_worker, say
from scripts.bench.sides import UNITS, Side

LATE = "not finished within its share of --minutes"
BUSY_SHARE = 0.15  # fraction of the cores that other processes may keep busy


def refuse_if_busy(allowed: bool, seconds: float = 1.0) -> float:
    """Exit if other processes keep too many cores busy.

    The load average includes processes that ended a minute ago, so it is used only if the system
    does not report processor time.
    """
    before, cores = busy_cpu_seconds(), os.cpu_count() or 1
    time.sleep(seconds)
    busy = (busy_cpu_seconds() - before) / seconds if before else os.getloadavg()[0]
    if busy <= BUSY_SHARE * cores:
        return busy
    text = (
        f"other processes keep {busy:.1f} of {cores} cores busy "
        f"(load average {os.getloadavg()[0]:.1f}): the figures would be wrong"
    )
    if not allowed:
        raise SystemExit(f"{text}; wait for them, or use --busy-ok")
    say(f"WARNING: {text}. Do not publish them.")
    return busy


@contextmanager
def workplace(args: Any, subject: str = "", timed: bool = True) -> Iterator[Path]:
    """The folder of a measurement: that of --keep, or a temporary one. For timings, exits unless
    the machine is idle enough."""
    if timed:
        busy = refuse_if_busy(args.busy_ok)
        say(f"{subject}, {args.precision} on {args.device}, {args.threads} threads; others keep "
            f"{busy:.2f} cores busy")  # fmt: skip
    if args.keep:
        yield Path(args.keep)
        return
    with tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work) as folder:
        yield Path(folder)


def run_side(side: Side, job: Job, scratch: Path, launch: Launch = PLAIN) -> dict[str, Any]:
    """Run a side once, or return the result of an earlier identical run."""
    files = scratch / "job.json", scratch / "result.json"
    job_text = replace(job, settings=side.settings, scratch=str(scratch / "own")).text()
    if not (files[1].is_file() and files[0].read_text() == job_text):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        files[0].write_text(job_text)
        launch = replace(launch, devices=job.devices)
        run_worker(side.worker, files, scratch / "own", job.threads, launch)
    result: dict[str, Any] = json.loads(files[1].read_text())
    return result | {"per_second": per_second(job, result["seconds"])}


def per_second(job: Job, seconds: float) -> float:
    """Pairs, examples or tokens per second."""
    per_example = job.samples * job.new_tokens if job.task == "decode" else 1
    return job.steps * job.batch * per_example / seconds


def folder_name(number: int, side: Side) -> str:
    """A folder name without `=` and `,`, which are special in overrides."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9._-]', '_', side.name)}"


def run_rounds(
    job: Job, sides: Sequence[Side], rounds: int, folder: Path, launch: Launch = PLAIN,
    failures: Failures | None = None,
) -> Results:  # fmt: skip
    """Run every side once per round, in turn, so that changes in machine load affect all of them.

    failures: collects the reasons of failed sides, which are then left out; without it a failure
    ends the measurement. With a time limit and no continuing command, a process gets at most half
    of the remaining time, the last side all of it, and only rounds completed by all sides count.
    """
    results: Results = {side.name: [] for side in sides}
    failed = {} if failures is None else failures
    for number, side in product(range(rounds), sides):
        if side.name in failed:
            continue
        try:
            share = launch if launch.goes_on or side is sides[-1] else launch.half()
            result = run_side(side, job, folder / folder_name(number, side), share)
        except Failed as error:
            if failures is None:
                raise
            note_failure(side, sides, error, failed)
            continue
        except TimeIsUp:
            if launch.goes_on:
                raise
            if number:
                break
            note_failure(side, sides, Failed(LATE), failed)
            continue
        results[side.name].append(result)
        tell(f"round {number + 1}/{rounds}  {side.name:14}", job, result)
    complete = {name: rows for name, rows in results.items() if name not in failed}
    rounds_done = min(map(len, complete.values()), default=0)
    return {name: rows[:rounds_done] for name, rows in complete.items()}


def note_failure(side: Side, sides: Sequence[Side], error: Failed, failures: Failures) -> None:
    """Record a side's failure; if TRL cannot be imported, that of all its sides."""
    same = [s for s in sides if s.worker == side.worker]
    for other in same if isinstance(error, Unavailable) else [side]:
        failures[other.name] = error.why
    say(f"FAILED  {side.name}: {error.why}")


def tell(start: str, job: Job, result: Mapping[str, Any], note: str = "") -> None:
    if (others := result.get("others_cpu", 0.0)) > 0.1:
        note += f"  (other processes kept {others:.1f} cores busy)"
    say(f"{start} {result['per_second']:10.3f} {UNITS[job.task]}/s "
        f"{result['peak_memory_mb']:8.0f} MB{note}")  # fmt: skip


def search(
    job: Job, sides: Iterable[Side], folder: Path, launch: Launch = PLAIN
) -> tuple[str, list[dict[str, Any]]]:
    """Run each candidate once; returns the fastest that computes the same as the first. A failed
    one, such as out of memory, is left out, and later commands do not try it again."""
    table: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for index, side in enumerate(sides):
        scratch = folder / str(index)
        failed = scratch / "failed"
        try:
            if failed.exists():
                raise Failed(failed.read_text())
            result = run_side(side, job, scratch, launch)
        except Unavailable:
            raise
        except Failed as error:
            failed.write_text(error.why)
            say(f"search  {side.name:24} failed: left out")
            table.append({"name": side.name, "failed": True, "why": error.why, "agrees": False})
            continue
        first = first or result
        agrees = compare(first, result, job.precision)["agree"]
        table.append({"name": side.name, "per_second": result["per_second"],
                      "peak_memory_mb": result["peak_memory_mb"], "agrees": agrees})  # fmt: skip
        tell(
            f"search  {side.name:24}",
            job,
            result,
            "" if agrees else "  (different losses: left out)",
        )
    usable = [row for row in table if row["agrees"]]
    if not usable:
        raise Failed("--search: none of the other side's settings runs here, see above")
    return max(usable, key=lambda row: row["per_second"])["name"], table
