"""Measure dpo-run against TRL (decoding: against transformers' generate) on this machine.

The same random weights of a published shape, the same token ids in the same order, the same
batch size and precision; every side of every round in a separate process, in turn. The sides'
logs of each step are compared, and only results for equal work are kept.

--json ends with one line, an object; these keys are stable:
  task, preset, device, precision, unit (pairs, examples or tokens)
  results: {side: {
    per_second            units per second, over the timed steps and all devices
    tokens_per_second     of prompt and response, without padding; null when decoding
    tflops, mfu           of the work a step needs; mfu between 0 and 1
    peak_memory_mb        of the allocator; on a CPU, of the process
    reference_seconds     the pass over the reference before the first step
    startup_seconds       from the start of the process until the first step is done, without
                          the pass over the reference: imports, weights, kernels, compilation
    failure               null, or one line; then the others are null
  }}: medians over the rounds, null if unknown. Sides: ours, trl-best, ...
  losses_agree: {agree, largest_loss_difference, ...}
  ratio_vs_trl_best, ratio_vs_trl_default: speed, ours / theirs; missing if one failed
  versions: of the packages in the measured processes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench import options
from scripts.bench.equal import Failures
from scripts.bench.job import Job
from scripts.bench.launch import Failed, Launch, Unavailable, say
from scripts.bench.page import table
from scripts.bench.plan import Plan, make_job, make_plan, results_folder, shape_of, work_of_ours
from scripts.bench.report import PAGE, name_of, ratio_rows, side_rows, step_tables
from scripts.bench.run import run_rounds, search, workplace
from scripts.bench.sides import (
    BEST,
    BEST_OF,
    OURS,
    PEER,
    Settings,
    Side,
    best_side,
    candidates,
    listing,
    named,
    select,
    sides_of,
    variant,
    with_candidates,
)
from scripts.bench.summary import Measured, Record, json_line, summary


def chosen_sides(
    args: argparse.Namespace, job: Job, folder: Path, launch: Launch, failures: Failures
) -> tuple[list[Side], list[dict[str, Any]]]:
    """The sides to measure, and the table of the search if there was one."""
    searched: list[dict[str, Any]] = []
    if args.candidate:
        candidates = named(args.task, args.candidate, args.precision, args.lora)
        sides = with_candidates(args.task, args.sides, candidates)
    else:
        best, searched = best_settings(args, job, folder, launch, failures)
        sides = select(sides_of(args.task, best), args.sides)
    ours = [with_settings(side, args.ours) for side in sides]
    also = [with_settings(variant(OURS, words.split()), args.ours) for words in args.also]
    at = sum(not is_peer(args.task, side) for side in ours)
    return [*ours[:at], *also, *ours[at:]], searched


def best_settings(
    args: argparse.Namespace, job: Job, folder: Path, launch: Launch, failures: Failures
) -> tuple[Settings, list[dict[str, Any]]]:
    """The peer's best settings, known or from a search, and the table of the search."""
    start = BEST_OF.get((args.task, args.preset), BEST[args.task])
    known = candidates(args.task, args.device, args.precision, args.lora, args.devices, args.batch)
    first = named(args.task, [start], args.precision, args.lora)[start]
    sides = select(sides_of(args.task, first), args.sides)
    if not (args.search and any(is_peer(args.task, side) for side in sides)):
        return first, []
    tried = [replace(best_side(args.task, s), name=name) for name, s in known.items()]
    try:
        best, searched = search(job, tried, folder / "search", launch)
    except Failed as error:
        say(f"FAILED  {error}")
        gone = {side.name for side in sides if is_peer(args.task, side)}
        missing = gone if isinstance(error, Unavailable) else gone - {f"{PEER[args.task]}-default"}
        failures |= dict.fromkeys(sorted(missing), error.why)
        return first, []
    return known[best], searched


def with_settings(side: Side, words: Sequence[str]) -> Side:
    """Add the settings of `--ours` to dpo-run's sides."""
    if side.worker != "ours":
        return side
    return replace(side, settings=side.settings | dict(word.split("=", 1) for word in words))


def is_peer(task: str, side: Side) -> bool:
    return side.name.startswith(PEER[task])


def compare_sides(
    args: argparse.Namespace, name: str, plan: Plan, folder: Path, argv: Sequence[str]
) -> int:
    """Run all rounds of all sides; returns 1 if one of ours failed or the results differ."""
    job, failures = make_job(args, plan), Failures()
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    launch = Launch(args.trl_python, until=until, goes_on=bool(args.keep))
    plan.prepare(args.threads, launch)
    here = results_folder(folder, job)
    sides, searched = chosen_sides(args, job, here, launch, failures)
    results = run_rounds(job, sides, args.rounds, here, launch, failures)
    measured = Measured(sides, results, failures, searched, work_of_ours(here))
    record = summary(name, job, plan, measured, argv)
    publish(args, record, sides)
    if not record["sides"]:
        raise SystemExit("nothing was measured: " + "; ".join(map(": ".join, failures.items())))
    ours = {side.name for side in sides if not is_peer(args.task, side)}
    return 0 if record["losses_agree"]["agree"] and not ours & failures.keys() else 1


def publish(args: argparse.Namespace, record: Record, sides: Sequence[Side]) -> None:
    """Print the results, write the page of the comparison and report failures."""
    ratios = [ratio_rows(record)] if record["ratios"] else []
    for rows in (*step_tables(record, failed=True), side_rows(record), *ratios):
        print("\n".join(table(rows)), end="\n\n")
    for one in record["failed"]:
        say(f"FAILED  {one['name']}: {one['why']}")
    theirs = sum(is_peer(args.task, side) for side in sides)
    if record["sides"] and 0 < theirs < len(sides):
        print(f"written: {PAGE.keep(record, args.out, name_of(record))}")
    elif record["sides"]:
        say("one side alone is no comparison: no page was written (with --keep FOLDER, a command "
            "without --sides continues from there)")  # fmt: skip
    if args.json:
        print(json_line(record))


def main(argv: Sequence[str]) -> int:
    """Compare the selected sides; returns an exit code."""
    args = options.parse(options.parser(__doc__), argv)
    if args.list_candidates:
        print(listing(args.task))
        return 0
    name, shape = shape_of(args)
    with workplace(args, f"{args.task}, {name}") as folder:
        return compare_sides(args, name, make_plan(args, shape, folder), folder, argv)
