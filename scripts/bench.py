#!/usr/bin/env python
"""Measure dpo-run against TRL (decoding: against transformers' generate) on this machine.

The same random weights of a published shape, the same token ids in the same order, the same
batch size and precision; every side of every round in a process of its own, in turn. What the
sides log in each step is compared: figures are only kept of equal work.

--json ends with one line, an object; of it these stay as they are:
  task, preset, device, precision, unit (pairs, examples or tokens)
  results: {side: {
    per_second            units a second, over the timed steps and devices together
    tokens_per_second     of prompt and response, padding left out; null when decoding
    tflops, mfu           of the work a step needs; mfu between 0 and 1
    peak_memory_mb        of the allocator; on a CPU, of the process
    reference_seconds     the pass over the reference before the first step
    startup_seconds       from the start of the process until the first step is done, without
                          the pass over the reference: imports, weights, kernels, compilation
    failure               null, or one line; then the others are null
  }}: medians over the rounds, null where it is not known. Sides: ours, trl-best, ...
  losses_agree: {agree, largest_loss_difference, ...}
  ratio_vs_trl_best, ratio_vs_trl_default: speed, ours / theirs; left out where one failed
  versions: of the packages in the measured processes
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_args
from bench_grow import grow, keep_curve
from bench_job import Job
from bench_keep import made_in, measured_in, work_of_ours
from bench_launch import Failed, Launch, Unavailable, say
from bench_prepare import Plan
from bench_report import Record, keep, ratio_rows, side_rows, step_tables, table
from bench_run import Failures, prepare, refuse_if_busy, run_what_runs, search
from bench_shapes import CHANGEABLE, Shape, resized
from bench_sides import (
    BEST,
    BEST_OF,
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
from bench_summary import Measured, circumstances, json_line, summary

GROW_RESPONSE = 64  # tokens
BASE = Side("ours", "bench_ours.py", {})


def make_plan(args: argparse.Namespace, shape: Shape, folder: Path) -> Plan:
    """Rows for exactly one epoch, and a model whose context holds them."""
    response, length = args.response_length, args.length
    if args.grow:
        response = response or GROW_RESPONSE
        length = max(args.grow_lengths) + response
    elif args.prompt_length and response:
        length = args.prompt_length + response
    generated = args.new_tokens if args.task == "decode" else 0
    plan = Plan(
        folder="", shape=shape, context=max(shape.context, length + generated),
        pairs=(args.warmup + args.steps) * args.batch, length=length, seed=args.seed,
        data=args.data, adapter=args.adapter, tokenizer=args.tokenizer,
        prompt_length=args.prompt_length, response_length=response,
        reward_model=args.task == "reward", r=None if args.lora == "none" else args.r,
        device=args.device, lengths=args.lengths_of,
    )  # fmt: skip
    return replace(plan, folder=str(made_in(folder, plan)))


def make_job(args: argparse.Namespace, plan: Plan) -> Job:
    return Job(
        task=args.task, model=str(plan.model), ids=str(plan.ids),
        overrides=plan.data_overrides(str(plan.rows)), batch=args.batch, warmup=args.warmup,
        steps=args.steps, lr=args.lr, precision=args.precision, device=args.device,
        threads=max(1, args.threads // args.devices), length=plan.length, samples=args.samples,
        new_tokens=args.new_tokens, lora=args.lora, r=args.r, devices=args.devices,
        adapter="" if args.lora == "none" else str(plan.adapter_start),
    )  # fmt: skip


def chosen_sides(
    args: argparse.Namespace, job: Job, folder: Path, launch: Launch, failures: Failures
) -> tuple[list[Side], list[dict[str, Any]]]:
    """The sides to measure, and the table of the search if there was one."""
    searched: list[dict[str, Any]] = []
    if args.candidate:
        found = named(args.task, args.candidate, args.precision, args.lora)
        sides = with_candidates(args.task, args.sides, found)
    else:
        best, searched = best_settings(args, job, folder, launch, failures)
        sides = select(sides_of(args.task, best), args.sides)
    ours = [with_settings(side, args.ours) for side in sides]
    also = [with_settings(variant(BASE, words.split()), args.ours) for words in args.also]
    at = sum(not is_peer(args.task, side) for side in ours)
    return [*ours[:at], *also, *ours[at:]], searched


def best_settings(
    args: argparse.Namespace, job: Job, folder: Path, launch: Launch, failures: Failures
) -> tuple[Settings, list[dict[str, Any]]]:
    """Of the other side, as far as is known or as a search finds."""
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
    """dpo-run's sides with `--ours`."""
    if side.worker != "bench_ours.py":
        return side
    return replace(side, settings=side.settings | dict(word.split("=", 1) for word in words))


def is_peer(task: str, side: Side) -> bool:
    return side.name.startswith(PEER[task])


def compare_sides(
    args: argparse.Namespace, name: str, plan: Plan, folder: Path, argv: Sequence[str]
) -> int:
    """All sides, all rounds; 1 if one of ours failed or the sides do not compute the same."""
    job, failures = make_job(args, plan), Failures()
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    launch = Launch(args.trl_python, until=until, goes_on=bool(args.keep))
    prepare(plan, args.threads, launch)
    here = measured_in(folder, job)
    sides, searched = chosen_sides(args, job, here, launch, failures)
    results = run_what_runs(job, sides, args.rounds, here, launch, failures)
    measured = Measured(sides, results, failures, searched, work_of_ours(here))
    record = summary(name, job, plan, measured, argv)
    ratios = [ratio_rows(record)] if record["ratios"] else []
    for rows in (*step_tables(record, failed=True), side_rows(record), *ratios):
        print("\n".join(table(rows)), end="\n\n")
    told(args, record, sides)
    if args.json:
        print(json_line(record))
    if not record["sides"]:
        raise SystemExit("nothing was measured: " + "; ".join(map(": ".join, failures.items())))
    ours = {side.name for side in sides if not is_peer(args.task, side)}
    return 0 if record["losses_agree"]["agree"] and not ours & failures.keys() else 1


def told(args: argparse.Namespace, record: Record, sides: Sequence[Side]) -> None:
    """Write the page of a comparison; say what failed."""
    for one in record["failed"]:
        say(f"FAILED  {one['name']}: {one['why']}")
    theirs = sum(is_peer(args.task, side) for side in sides)
    if record["sides"] and 0 < theirs < len(sides):
        print(f"written: {keep(record, args.out)}")
    elif record["sides"]:
        say("one side alone is no comparison: no page was written (with --keep FOLDER a command "
            "without --sides takes it from there)")  # fmt: skip


def grow_prompts(
    args: argparse.Namespace, name: str, plan: Plan, folder: Path, argv: Sequence[str]
) -> int:
    """Cost of a pair by prompt length, as a table and two curves."""
    curve, results = grow(
        make_job(args, plan), plan, args.grow_lengths, args.rounds, folder / "grow"
    )
    path = args.out / f"grow-prompts-{name}-{args.device}"
    facts = circumstances(results, argv)
    where = facts["machine"]["gpu"] or f"{facts['machine']['cpu']}, {args.threads} threads"
    title = (
        f"DPO, {name}, {args.precision}, batch {args.batch}, responses of "
        f"{plan.response_length} tokens; {where}; {facts['date']}"
    )
    keep_curve(curve, path, title)
    print(f"written: {path}.csv and .png")
    if args.json:
        print(json_line({"title": title, "curve": curve, **facts}))
    return 0


def main(argv: Sequence[str]) -> int:
    args = bench_args.parser(__doc__).parse_args(argv)
    if args.list_candidates:
        print(listing(args.task))
        return 0
    bench_args.check(args)
    name, shape = resized(args.preset, {key: getattr(args, key) for key in CHANGEABLE})
    busy = refuse_if_busy(args.busy_ok)
    say(
        f"{args.task}, {name}, {args.precision} on {args.device}, {args.threads} threads; "
        f"others keep {busy:.2f} cores busy"
    )
    kept: AbstractContextManager[str] = nullcontext(args.keep)
    made = tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work)
    with kept if args.keep else made as folder:
        plan = make_plan(args, shape, Path(folder))
        act = grow_prompts if args.grow else compare_sides
        return act(args, name, plan, Path(folder), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
