#!/usr/bin/env python
"""Measure dpo-run against TRL (decoding: against transformers' generate) on this machine.

The same random weights of a published shape, the same token ids in the same order, the same
batch size and precision; every side of every round in a process of its own, in turn. What the
sides log in each step is compared: figures are only kept of equal work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bench_args
from bench_grow import grow, keep_curve
from bench_job import Job
from bench_prepare import Plan
from bench_report import keep, ratio_rows, side_rows, step_tables, table
from bench_run import prepare, refuse_if_busy, run_rounds, say, search
from bench_shapes import CHANGEABLE, Shape, resized
from bench_sides import BEST, BEST_OF, Side, best_side, candidates, sides_of
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
    return Plan(
        folder=str(folder / "made"), shape=shape, context=max(shape.context, length + generated),
        pairs=(args.warmup + args.steps) * args.batch, length=length, seed=args.seed,
        data=args.data, adapter=args.adapter, tokenizer=args.tokenizer,
        prompt_length=args.prompt_length, response_length=response,
        reward_model=args.task == "reward",
    )  # fmt: skip


def make_job(args: argparse.Namespace, plan: Plan) -> Job:
    return Job(
        task=args.task, model=str(plan.model), ids=str(plan.ids),
        overrides=plan.data_overrides(str(plan.rows)), batch=args.batch, warmup=args.warmup,
        steps=args.steps, lr=args.lr, precision=args.precision, device=args.device,
        threads=args.threads, length=plan.length, samples=args.samples,
        new_tokens=args.new_tokens,
    )  # fmt: skip


def chosen_sides(args: argparse.Namespace, job: Job, folder: Path) -> tuple[list[Side], list]:
    """The sides to measure, and the table of the search if there was one."""
    known = candidates(args.task, args.device, args.precision)
    best, searched = BEST_OF.get((args.task, args.preset), BEST[args.task]), []
    if args.search:
        tried = [replace(best_side(args.task, s), name=name) for name, s in known.items()]
        best, searched = search(job, tried, folder / "search", args.trl_python)
    sides = sides_of(args.task, known[best])
    wanted = args.sides.split(",") if args.sides else [side.name for side in sides]
    if unknown := set(wanted) - {side.name for side in sides}:
        there = ", ".join(side.name for side in sides)
        raise SystemExit(f"--sides: no {', '.join(sorted(unknown))}; there are {there}")
    return [side for side in sides if side.name in wanted], searched


def compare_sides(
    args: argparse.Namespace, name: str, plan: Plan, folder: Path, argv: Sequence[str]
) -> int:
    """All sides, all rounds; 1 if they do not compute the same."""
    job = make_job(args, plan)
    prepare(plan, args.threads)
    sides, searched = chosen_sides(args, job, folder)
    results = run_rounds(job, sides, args.rounds, folder / "rounds", args.trl_python)
    record = summary(name, job, plan, sides, results, searched, argv)
    for rows in (*step_tables(record), side_rows(record), ratio_rows(record)):
        print("\n".join(table(rows)), end="\n\n")
    agree = record["losses_agree"]
    if agree["agree"]:
        print(f"written: {keep(record, args.out)} and .png")
    else:
        say(f"ERROR: the sides do not compute the same, nothing was written: {agree}")
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
    with tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work) as folder:
        plan = make_plan(args, shape, Path(folder))
        act = grow_prompts if args.grow else compare_sides
        return act(args, name, plan, Path(folder), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
