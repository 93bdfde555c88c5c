"""Runs the workers of `bench.py`, each in a process of its own, and sums up what they answer."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_job import Job, busy_cpu_seconds
from bench_prepare import Plan
from bench_sides import UNITS, Side

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
BUSY_SHARE = 0.15  # of the cores that others may keep busy
# precision -> (difference of losses and rewards, relative difference of log-probabilities)
TOLERANCE = {
    "fp32": (1e-3, 1e-4),
    "bf16": (3e-2, 3e-3),
}
Results = dict[str, list[dict[str, Any]]]  # side -> its result in each round


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


def prepare(plan: Plan, threads: int) -> None:
    """Model and rows, unless they are there."""
    Path(plan.folder).mkdir(parents=True, exist_ok=True)
    path = Path(plan.folder) / "plan.json"
    plan.save(path)
    run_python("bench_prepare.py", [path], Path(plan.folder) / f"make-{plan.ids.stem}", threads)


def run_python(
    script: str, arguments: Sequence[Path], scratch: Path, threads: int, python: str = ""
) -> None:
    """A worker script; exits with the end of what it wrote if it fails."""
    scratch.mkdir(parents=True)
    env = os.environ | OFFLINE | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HOME": str(scratch / "hf"),
        "DPO_RUN_CACHE": str(scratch / "cache"), "TMPDIR": str(scratch),
    }  # fmt: skip
    command = [python or sys.executable, str(HERE / script), *map(str, arguments)]
    with (scratch / "log.txt").open("w+") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=log, check=False)
        if done.returncode:
            log.seek(0)
            say(log.read()[-4000:])
            raise SystemExit(f"{script} failed with exit code {done.returncode}, see above")


def run_side(side: Side, job: Job, scratch: Path, trl_python: str = "") -> dict[str, Any]:
    """One side once."""
    scratch.mkdir(parents=True)
    files = scratch / "job.json", scratch / "result.json"
    replace(job, settings=side.settings, scratch=str(scratch / "own")).save(files[0])
    python = trl_python if side.worker == "bench_trl.py" else ""
    run_python(side.worker, files, scratch / "own", job.threads, python)
    result: dict[str, Any] = json.loads(files[1].read_text())
    return result | {"per_second": per_second(job, result["seconds"])}


def per_second(job: Job, seconds: float) -> float:
    """Pairs, examples or tokens."""
    per_example = job.samples * job.new_tokens if job.task == "decode" else 1
    return job.steps * job.batch * per_example / seconds


def run_rounds(
    job: Job, sides: Sequence[Side], rounds: int, folder: Path, trl_python: str = ""
) -> Results:
    """Every side once a round, in turn, so that a change of the machine's mood hits all."""
    results: Results = {side.name: [] for side in sides}
    for number in range(rounds):
        for index, side in enumerate(sides):
            result = run_side(side, job, folder / f"{number}-{index}", trl_python)
            results[side.name].append(result)
            unit = UNITS[job.task]
            others = result["others_cpu"]
            note = f"  (others kept {others:.1f} cores busy)" if others > 0.1 else ""
            say(f"round {number + 1}/{rounds}  {side.name:14} {result['per_second']:10.3f} "
                f"{unit}/s {result['peak_memory_mb']:8.0f} MB{note}")  # fmt: skip
    return results


def search(
    job: Job, sides: Iterable[Side], folder: Path, trl_python: str = ""
) -> tuple[str, list[dict[str, Any]]]:
    """Each candidate once; the name of the fastest that computes what the first one does."""
    table: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for index, side in enumerate(sides):
        result = run_side(side, job, folder / str(index), trl_python)
        first = first or result
        agrees = compare(first, result, job.precision)["agree"]
        table.append({"name": side.name, "per_second": result["per_second"],
                      "peak_memory_mb": result["peak_memory_mb"], "agrees": agrees})  # fmt: skip
        note = "" if agrees else "  (other losses: left out)"
        say(f"search  {side.name:44} {result['per_second']:10.3f} {UNITS[job.task]}/s "
            f"{result['peak_memory_mb']:8.0f} MB{note}")  # fmt: skip
    usable = [row for row in table if row["agrees"]]
    return max(usable, key=lambda row: row["per_second"])["name"], table


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


def agreement(results: Results, precision: str) -> dict[str, Any]:
    """Every side and round against the other side's defaults, in the worst case."""
    baseline = next((name for name in results if name.endswith("-default")), next(iter(results)))
    pairs = [compare(results[baseline][0], r, precision) for rows in results.values() for r in rows]
    return {
        "agree": all(p["agree"] for p in pairs),
        "baseline": baseline,
        "largest_loss_difference": max(p["loss"] for p in pairs),
        "largest_relative_logps_difference": max(p["logps_relative"] for p in pairs),
        "allowed": dict(zip(("loss", "logps_relative"), TOLERANCE[precision], strict=True)),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(results: Results, ours: str, other: str, key: str) -> dict[str, float]:
    """Of the two sides within each round."""
    pairs = zip(results[ours], results[other], strict=True)
    return spread([a[key] / b[key] for a, b in pairs])
