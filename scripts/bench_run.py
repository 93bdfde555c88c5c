"""Runs the workers of `bench.py`, each in a process of its own, and sums up what they answer."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_job import Job, busy_cpu_seconds
from bench_launch import PLAIN, Failed, Launch, TimeIsUp, Unavailable, run_python, say
from bench_prepare import Plan
from bench_sides import UNITS, Side

LATE = "not finished within its share of --minutes"
BUSY_SHARE = 0.15  # of the cores that others may keep busy
# precision -> (difference of losses and rewards, relative difference of log-probabilities)
TOLERANCE = {
    "fp32": (1e-3, 1e-4),
    "bf16": (3e-2, 3e-3),
}
Results = dict[str, list[dict[str, Any]]]  # side -> its result in each round
Failures = dict[str, str]  # side -> why it has none


def refuse_if_busy(allowed: bool, seconds: float = 1.0) -> float:
    """Cores that other processes keep busy just now; exits if they are too many.

    The load average still counts what ended a minute ago, so it only decides where the
    system does not tell how busy the processors are.
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
        raise SystemExit(f"{text}; wait for them, or measure all the same with --busy-ok")
    say(f"WARNING: {text}. Do not publish them.")
    return busy


def prepare(plan: Plan, threads: int, launch: Launch = PLAIN) -> None:
    """Model and rows, unless they are there."""
    if made(plan):
        return
    Path(plan.folder).mkdir(parents=True, exist_ok=True)
    path = Path(plan.folder) / "plan.json"
    plan.save(path)
    scratch = Path(plan.folder) / f"make-{plan.ids.stem}"
    shutil.rmtree(scratch, ignore_errors=True)
    run_python("bench_prepare.py", [path], scratch, threads, launch)


def made(plan: Plan) -> bool:
    return plan.ids.is_file() and (plan.r is None or plan.adapter_start.is_dir())


def run_side(
    side: Side,
    job: Job,
    scratch: Path,
    launch: Launch = PLAIN,
) -> dict[str, Any]:
    """One side once; or what it answered, where it has been asked exactly this before."""
    files = scratch / "job.json", scratch / "result.json"
    asked = replace(job, settings=side.settings, scratch=str(scratch / "own")).text()
    if not (files[1].is_file() and files[0].read_text() == asked):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        files[0].write_text(asked)
        launch = replace(launch, devices=job.devices)
        run_python(side.worker, files, scratch / "own", job.threads, launch)
    result: dict[str, Any] = json.loads(files[1].read_text())
    return result | {"per_second": per_second(job, result["seconds"])}


def per_second(job: Job, seconds: float) -> float:
    """Pairs, examples or tokens."""
    per_example = job.samples * job.new_tokens if job.task == "decode" else 1
    return job.steps * job.batch * per_example / seconds


def run_rounds(
    job: Job,
    sides: Sequence[Side],
    rounds: int,
    folder: Path,
    launch: Launch = PLAIN,
) -> Results:
    """Every side once a round, in turn, so that a change of the machine's mood hits all."""
    results: Results = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            result = run_side(side, job, folder / own_folder(number, side), launch)
            results[side.name].append(result)
            tell(f"round {number + 1}/{rounds}  {side.name:14}", job, result)
    return results


def own_folder(number: int, side: Side) -> str:
    """A name without `=` and `,`, which mean something in dpo-run's words."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9._-]', '_', side.name)}"


def run_what_runs(
    job: Job, sides: Sequence[Side], rounds: int, folder: Path, launch: Launch, failures: Failures
) -> Results:
    """As `run_rounds`, of the sides that do not fail; why the others did is put in `failures`.

    Where time is limited and no other command goes on, a process gets at most half of what is
    left, the last side all of it, and only the rounds count that every side has finished.
    """
    results: Results = {side.name: [] for side in sides}
    for number, side in ((number, side) for number in range(rounds) for side in sides):
        if side.name in failures:
            continue
        try:
            share = launch if launch.goes_on or side is sides[-1] else launch.half()
            result = run_side(side, job, folder / own_folder(number, side), share)
        except Failed as error:
            note_failure(side, sides, error, failures)
            continue
        except TimeIsUp:
            if launch.goes_on:
                raise
            if number:
                break
            note_failure(side, sides, Failed(LATE), failures)
            continue
        results[side.name].append(result)
        tell(f"round {number + 1}/{rounds}  {side.name:14}", job, result)
    kept = {name: rows for name, rows in results.items() if name not in failures}
    whole = min(map(len, kept.values()), default=0)
    return {name: rows[:whole] for name, rows in kept.items()}


def note_failure(side: Side, sides: Sequence[Side], error: Failed, failures: Failures) -> None:
    """Of one side; where TRL cannot be imported, of all its sides."""
    same = [s for s in sides if s.worker == side.worker]
    for other in same if isinstance(error, Unavailable) else [side]:
        failures[other.name] = error.why
    say(f"FAILED  {side.name}: {error.why}")


def tell(start: str, job: Job, result: Mapping[str, Any]) -> None:
    others = result["others_cpu"]
    note = f"  (others kept {others:.1f} cores busy)" if others > 0.1 else ""
    say(f"{start} {result['per_second']:10.3f} {UNITS[job.task]}/s "
        f"{result['peak_memory_mb']:8.0f} MB{note}")  # fmt: skip


def search(
    job: Job,
    sides: Iterable[Side],
    folder: Path,
    launch: Launch = PLAIN,
) -> tuple[str, list[dict[str, Any]]]:
    """Each candidate once; the name of the fastest that computes what the first one does. One
    that fails, such as for lack of memory, is left out."""
    table: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for index, side in enumerate(sides):
        result = tried(side, job, folder / str(index), launch)
        if isinstance(result, str):
            say(f"search  {side.name:24} failed: left out")
            table.append({"name": side.name, "failed": True, "why": result, "agrees": False})
            continue
        first = first or result
        agrees = compare(first, result, job.precision)["agree"]
        table.append({"name": side.name, "per_second": result["per_second"],
                      "peak_memory_mb": result["peak_memory_mb"], "agrees": agrees})  # fmt: skip
        note = "" if agrees else "  (other losses: left out)"
        say(f"search  {side.name:24} {result['per_second']:10.3f} {UNITS[job.task]}/s "
            f"{result['peak_memory_mb']:8.0f} MB{note}")  # fmt: skip
    usable = [row for row in table if row["agrees"]]
    if not usable:
        raise Failed("--search: none of the other side's settings runs here, see above")
    return max(usable, key=lambda row: row["per_second"])["name"], table


def tried(side: Side, job: Job, scratch: Path, launch: Launch) -> dict[str, Any] | str:
    """A candidate's answer, or why it fails: once, and a later command does not try again."""
    failed = scratch / "failed"
    if failed.exists():
        return failed.read_text()
    try:
        return run_side(side, job, scratch, launch)
    except Unavailable:
        raise
    except Failed as error:
        failed.write_text(error.why)
        return error.why


def compare(a: Mapping[str, Any], b: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Largest differences of what two results logged, step by step."""
    loss_limit, logps_limit = TOLERANCE[precision]
    loss = logps = 0.0
    same = a["figures"].keys() == b["figures"].keys()
    finite = all(math.isfinite(x) for r in (a, b) for xs in r["figures"].values() for x in xs)
    for name in a["figures"].keys() & b["figures"].keys():
        for x, y in zip(a["figures"][name], b["figures"][name], strict=True):
            if not name.startswith("logps/"):
                loss = max(loss, abs(x - y))
            else:
                logps = max(logps, abs(x - y) / max(1.0, abs(x)))
    agree = same and finite and loss <= loss_limit and logps <= logps_limit
    return {"agree": agree, "loss": loss, "logps_relative": logps}


def baseline_of(results: Results, precision: str) -> str:
    """The side that computes what most others do; of several the other side's defaults, then
    another of its sides: of two that differ, ours is the one in doubt."""

    def rank(name: str) -> tuple[int, bool, bool]:
        one = results[name][0]
        agreeing = sum(compare(one, rows[0], precision)["agree"] for rows in results.values())
        return agreeing, name.endswith("-default"), not name.startswith("ours")

    return max(results, key=rank)


def drop_unequal(results: Results, precision: str, failures: Failures) -> Results:
    """Without the sides that compute something else than the baseline."""
    if not results:
        return {}
    baseline = baseline_of(results, precision)
    for name, rows in results.items():
        worst = [c for r in rows if not (c := compare(results[baseline][0], r, precision))["agree"]]
        if worst:
            failures[name] = (
                f"does not compute what {baseline} does: losses differ by {worst[0]['loss']:.2g}, "
                f"log-probabilities by {worst[0]['logps_relative']:.2g} of their value"
            )
    return {name: rows for name, rows in results.items() if name not in failures}


def agreement(results: Results, precision: str) -> dict[str, Any]:
    """Every side and round against the baseline, in the worst case."""
    baseline = baseline_of(results, precision) if results else None
    every = [row for rows in results.values() for row in rows]
    pairs = [compare(results[baseline][0], row, precision) for row in every] if baseline else []
    return {
        "agree": all(p["agree"] for p in pairs),
        "baseline": baseline,
        "largest_loss_difference": max((p["loss"] for p in pairs), default=0.0),
        "largest_relative_logps_difference": max((p["logps_relative"] for p in pairs), default=0.0),
        "allowed": allowed(precision),
    }


def allowed(precision: str) -> dict[str, float]:
    return dict(zip(("loss", "logps_relative"), TOLERANCE[precision], strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(results: Results, ours: str, other: str, key: str) -> dict[str, float]:
    """Of the two sides within each round."""
    pairs = zip(results[ours], results[other], strict=True)
    return spread([a[key] / b[key] for a, b in pairs])
