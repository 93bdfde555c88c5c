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

import bench_args
from bench_grow import grow, keep_curve
from bench_job import Job
from bench_keep import made_in, measured_in
from bench_launch import Launch, Unavailable, say
from bench_prepare import Plan
from bench_report import keep, ratio_rows, side_rows, step_tables, table
from bench_run import Results, prepare, refuse_if_busy, run_rounds, search
from bench_shapes import CHANGEABLE, Shape, resized
from bench_sides import BEST, BEST_OF, PEER, Side, best_side, candidates, select, sides_of
from bench_summary import circumstances, json_line, summary

GROW_RESPONSE = 64  # tokens


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
        device=args.device,
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
    args: argparse.Namespace, job: Job, folder: Path, launch: Launch
) -> tuple[list[Side], list]:
    """The sides to measure, and the table of the search if there was one."""
    known = candidates(args.task, args.device, args.precision, args.lora, args.devices, args.batch)
    best, searched = BEST_OF.get((args.task, args.preset), BEST[args.task]), []
    sides = select(sides_of(args.task, known[best]), args.sides)
    if args.search and peers(args.task, sides):
        tried = [replace(best_side(args.task, s), name=name) for name, s in known.items()]
        best, searched = search(job, tried, folder / "search", launch)
        sides = select(sides_of(args.task, known[best]), args.sides)
    return [with_settings(side, args.ours) for side in sides], searched


def with_settings(side: Side, words: Sequence[str]) -> Side:
    """dpo-run's sides with `--ours`."""
    if side.worker != "bench_ours.py":
        return side
    return replace(side, settings=side.settings | dict(word.split("=", 1) for word in words))


def peers(task: str, sides: Sequence[Side]) -> list[Side]:
    return [side for side in sides if side.name.startswith(PEER[task])]


def measure(
    args: argparse.Namespace, job: Job, folder: Path, launch: Launch
) -> tuple[list[Side], Results, list, str | None]:
    """The sides, their results, the search's table, and why the other side is missing."""
    try:
        sides, searched = chosen_sides(args, job, folder, launch)
        return sides, run_rounds(job, sides, args.rounds, folder, launch), searched, None
    except Unavailable as error:
        why = str(error)
    args.search = False
    sides, _ = chosen_sides(args, job, folder, launch)
    ours = [side for side in sides if side not in peers(args.task, sides)]
    if not ours:
        raise SystemExit(why)
    say(f"WARNING: {why}: dpo-run alone")
    return ours, run_rounds(job, ours, args.rounds, folder, launch), [], why


def compare_sides(
    args: argparse.Namespace, name: str, plan: Plan, folder: Path, argv: Sequence[str]
) -> int:
    """All sides, all rounds; 1 if they do not compute the same."""
    job = make_job(args, plan)
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    launch = Launch(args.trl_python, until=until)
    prepare(plan, args.threads, launch)
    sides, results, searched, why = measure(args, job, measured_in(folder, job), launch)
    record = summary(name, job, plan, sides, results, searched, argv, why)
    ratios = [ratio_rows(record)] if record["ratios"] else []
    for rows in (*step_tables(record), side_rows(record), *ratios):
        print("\n".join(table(rows)), end="\n\n")
    agree = record["losses_agree"]
    if not agree["agree"]:
        say(f"ERROR: the sides do not compute the same, nothing was written: {agree}")
    elif why or 0 < len(peers(args.task, sides)) < len(sides):
        print(f"written: {keep(record, args.out)} and .png")
    else:
        say("one side alone is no comparison: nothing was written (with --keep FOLDER a command "
            "without --sides takes it from there)")  # fmt: skip
    if args.json:
        print(json_line(record))
    return 0 if agree["agree"] else 1


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
