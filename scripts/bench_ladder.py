#!/usr/bin/env python
"""What each technique of dpo-run buys: DPO on the same model, pairs and batch, rung by rung.

  plain    chosen and rejected in one padded batch, full logits, the reference in every step
  cached   + the reference computed once, before the first step
  scored   + logits at the responses' tokens only
  packed   + rows without padding, every response behind a prompt of its own
  shared   + the prompt once for both responses
  fused    + the head in chunks that form their gradients in the forward: dpo-run's own path
  extras   + what dpo-run does on a CPU: fused GELU, freed memory kept, ...
  bf16     + bfloat16; the rungs before it are in float32

Padded rungs are a loop written out; from `packed` on it is dpo-run itself, with what a rung
does not have yet taken out. Every rung of every round runs in a process of its own, in turn.
What the rungs log in each step is compared: figures are only kept of equal work. Results go
to <out>/ladder-<preset>-<device>.md and .png.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_args
from bench import make_job, make_plan
from bench_common import Page, add_measurement, add_output, facts_of, parse, parser, threads_of
from bench_job import Job
from bench_prepare import Plan
from bench_ratios import one_epoch
from bench_report import BLUE, GREY, Record, bars, ranged, table
from bench_run import Results, compare, prepare, ratio, refuse_if_busy, run_rounds, say, spread
from bench_shapes import CHANGEABLE, resized
from bench_sides import Side
from bench_summary import data_digest, data_label, json_line, row_facts

LABELS = {
    "plain": "plain padded",
    "cached": "+ reference computed once",
    "scored": "+ logits of responses only",
    "packed": "+ packed, no padding",
    "shared": "+ prompt shared",
    "fused": "+ fused head (dpo-run, fp32)",
    "extras": "+ CPU extras",
    "bf16": "+ bf16",
}
PRECISION = {name: "bf16" if name == "bf16" else "fp32" for name in LABELS}


def climb(job: Job, rounds: int, folder: Path) -> Results:
    """The results of every rung in each round."""
    sides = [Side(name, "bench_rung.py", {"rung": name}) for name in LABELS]
    return run_rounds(job, sides, rounds, folder)


def agreement(results: Results) -> Record:
    """Every rung and round against the plain one; a rung is judged by its own precision."""
    found = {
        name: [compare(results["plain"][0], result, PRECISION[name]) for result in rounds]
        for name, rounds in results.items()
    }
    return {
        "agree": all(one["agree"] for rounds in found.values() for one in rounds),
        "differences": {
            name: {key: max(one[key] for one in rounds) for key in ("loss", "logps_relative")}
            for name, rounds in found.items()
        },
    }


def rung_facts(job: Job, results: Results) -> dict[str, Record]:
    """Rung -> its figures, and its speed over the rung below and over the first."""
    rungs: dict[str, Record] = {}
    below = "plain"
    for name, rounds in results.items():
        rungs[name] = {
            "adds": LABELS[name],
            "precision": PRECISION[name],
            **{key: spread([r[key] for r in rounds]) for key in ("per_second", "peak_memory_mb")},
            "per_second_one_epoch": spread([one_epoch(job, r) for r in rounds]),
            "speed_to_rung_below": ratio(results, name, below, "per_second"),
            "speed_to_plain": ratio(results, name, "plain", "per_second"),
            "memory_before_the_model_mb": spread([r["start_memory_mb"] for r in rounds]),
            "switched_off": rounds[0].get("switched_off", []),
            "figures_by_step": rounds[0]["figures"],
        }
        below = name
    return rungs


def record_of(
    name: str, job: Job, plan: Plan, rounds: int, results: Results, argv: Sequence[str]
) -> Record:
    return {
        "preset": name,
        "device": job.device,
        "losses_agree": agreement(results),
        "rungs": rung_facts(job, results),
        "data": {"label": data_label(plan), "sha256": data_digest(plan), **row_facts(job)},
        "shape": vars(plan.shape) | {"context": plan.context},
        "settings": {key: getattr(job, key) for key in (
            "batch", "warmup", "steps", "lr", "threads", "length")}
            | {"rounds": rounds, "seed": plan.seed},
        **facts_of(results, "bench_ladder.py", argv),
    }  # fmt: skip


def heading(record: Record) -> str:
    return f"batch {record['settings']['batch']}, {record['data']['label']}{threads_of(record)}"


def rung_rows(record: Record) -> list[list[str]]:
    rows = [["rung", "pairs/s", "x the rung below", "x plain", "pairs/s over one epoch",
             "peak memory, MB"]]  # fmt: skip
    keys = ("per_second", "speed_to_rung_below", "speed_to_plain", "per_second_one_epoch",
            "peak_memory_mb")  # fmt: skip
    for rung in record["rungs"].values():
        rows.append([rung["adds"], *(ranged(rung[key]) for key in keys)])
    rows[1][2] = ""
    return rows


def section(record: Record) -> list[str]:
    settings, differences = record["settings"], record["losses_agree"]["differences"]
    fp32 = [d for name, d in differences.items() if PRECISION[name] == "fp32"]
    off = ", ".join(f"`{name}`" for name in record["rungs"]["fused"]["switched_off"])
    shares = (
        f"{record['data']['real_to_padded']:.2f} of a padded batch is no padding, "
        f"{record['data']['unique_to_padded']:.2f} with the prompt counted once, "
        f"{record['data']['scored_to_padded']:.2f} is scored."
    )
    return [
        *table(rung_rows(record)), "",
        f"{settings['rounds']} rounds of {settings['steps']} steps after {settings['warmup']} to "
        f"warm up, every rung in a process of its own. {shares}", "",
        f"Every rung logged what the plain one did in every step: in fp32 losses within "
        f"{max(d['loss'] for d in fp32):.1e} and log-probabilities within "
        f"{max(d['logps_relative'] for d in fp32):.1e} of their value, in bf16 "
        f"{differences['bf16']['loss']:.1e} and {differences['bf16']['logps_relative']:.1e}. "
        f"CPU extras, off in the rungs before: {off}.", "",
    ]  # fmt: skip


def draw(figure: Any, record: Record) -> None:
    axes = figure.subplots(1, 2)
    sides = {rung["adds"]: rung for rung in record["rungs"].values()}
    colours = [GREY if name == "plain" else BLUE for name in record["rungs"]]
    bars(axes[0], {"sides": sides}, "per_second", "pairs/s (more is better)", colours)
    memory = "peak memory, MB (less is better)"
    bars(axes[1], {"sides": sides}, "peak_memory_mb", memory, colours)
    axes[1].set_yticks([])


PAGE = Page(
    "DPO with one technique of dpo-run more in every row. Medians over the rounds, lowest and "
    "highest in brackets. Written by `scripts/bench_ladder.py`.",
    heading, section, draw, size=(10.5, 3.3),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    p = parser(__doc__, bench_args.DATA)
    bench_args.add_model_and_data(p)
    add_measurement(p, steps=10, precision=False)
    add_output(p)
    args = parse(p, argv)
    name, shape = resized(args.preset, {key: getattr(args, key) for key in CHANGEABLE})
    busy = refuse_if_busy(args.busy_ok)
    say(f"{len(LABELS)} rungs, {name} on {args.device}; others keep {busy:.2f} cores busy")
    with tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work) as folder:
        plan = make_plan(args, shape, Path(folder))
        job = make_job(args, plan)
        prepare(plan, args.threads)
        results = climb(job, args.rounds, Path(folder) / "rounds")
        record = record_of(name, job, plan, args.rounds, results, argv)
    print("\n".join(table(rung_rows(record))), end="\n\n")
    agree = record["losses_agree"]
    if agree["agree"]:
        print(f"written: {PAGE.keep(record, args.out, f'ladder-{name}-{args.device}')} and .png")
    else:
        say(f"ERROR: the rungs do not compute the same, nothing was written: {agree}")
    if args.json:
        print(json_line(record))
    return 0 if agree["agree"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
