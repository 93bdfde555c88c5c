#!/usr/bin/env python
"""Where dpo-run's training step spends its time, and how far that is from the machine's limit.

Measured are DPO steps as `dpo-run` takes them: in one process as they are, in another with
clocks around the functions that a step goes through (on CUDA the device is waited for at
each clock, so the first process tells what the clocks cost), in a third under torch.profiler.
The limit is the fastest product of two square matrices in the same process, in the same
precision. FLOPs are those that the model needs (see dpo_cli/train/flops.py): 2 a weight and token
forward, twice that backward, attention between tokens that see each other, the head at
scored tokens only. Results go to <out>/profile-<preset>-<device>.md and .png.
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
from bench_report import BLUE, INK, Record, ranged, short, table
from bench_run import (
    Results,
    agreement,
    prepare,
    refuse_if_busy,
    run_rounds,
    run_side,
    say,
    spread,
)
from bench_shapes import CHANGEABLE, resized
from bench_sides import Side
from bench_summary import data_digest, data_label, json_line, row_facts

OURS = Side("ours", "bench_ours.py", {})
PARTS = Side("parts", "bench_parts.py", {"watch": "parts"})
OPERATORS = Side("operators", "bench_parts.py", {"watch": "operators"})
LABELS = {
    "packing": "packing",
    "forward": "backbone forward",
    "attention forward": "  of it attention",
    "head and loss": "head and loss, forward and gradients",
    "backward": "backbone backward",
    "attention backward": "  of it attention",
    "optimiser": "optimiser (clip, step)",
    "the rest": "the rest",
    "step": "step, with the clocks",
    "ours": "step",
}
COLOURS = {  # of the stacked bar, where attention stands beside its forward and backward
    "packing": "#777777",
    "forward": "#0072B2",
    "attention forward": "#56B4E9",
    "head and loss": "#E69F00",
    "backward": "#009E73",
    "attention backward": "#7FCFB4",
    "optimiser": "#D55E00",
    "the rest": "#CCCCCC",
}
DARK = ("packing", "forward", "backward", "optimiser")


def look(job: Job, rounds: int, folder: Path) -> tuple[Results, list[Record]]:
    """All results, and the operators of one process under the profiler."""
    results = run_rounds(job, (OURS, PARTS), rounds, folder / "rounds")
    profiled = run_side(OPERATORS, job, folder / "operators")
    return results | {"operators": [profiled]}, profiled["operators"]


def part_facts(job: Job, results: Results) -> dict[str, Record]:
    """Part -> seconds a step; where its FLOPs are known, its speed and share of the peak."""
    rounds = [
        (r["parts"] | {"ours": ours["seconds"] / job.steps},
         r["flops"] | {"ours": r["flops"]["step"]},
         r["peaks"][job.precision]["flops_per_second"])
        for ours, r in zip(results["ours"], results["parts"], strict=True)
    ]  # fmt: skip
    facts: dict[str, Record] = {}
    for name in (name for name in LABELS if name in rounds[0][0]):
        facts[name] = {"seconds": spread([seconds[name] for seconds, _, _ in rounds])}
        if name in rounds[0][1]:
            rates = [flops[name] / seconds[name] for seconds, flops, _ in rounds]
            peaks = [peak for _, _, peak in rounds]
            shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
            facts[name] |= {"flops": rounds[0][1][name], "flops_per_second": spread(rates),
                            "share_of_peak": spread(shares)}  # fmt: skip
    return facts


def peak_facts(results: Results) -> dict[str, Record]:
    """Precision -> FLOP/s over the rounds; size and kernel of the fastest."""
    found = {}
    for precision in results["parts"][0]["peaks"]:
        peaks = [result["peaks"][precision] for result in results["parts"]]
        fastest = max(peaks, key=lambda peak: peak["flops_per_second"])
        found[precision] = fastest | {
            "flops_per_second": spread([peak["flops_per_second"] for peak in peaks])
        }
    return found


def record_of(
    name: str, job: Job, plan: Plan, results: Results, operators: list[Record], argv: Sequence[str]
) -> Record:
    return {
        "preset": name,
        "device": job.device,
        "precision": job.precision,
        "losses_agree": agreement(results, job.precision),
        "parts": part_facts(job, results),
        "peaks": peak_facts(results),
        "work": results["parts"][0]["work"],
        "sizes": results["parts"][0]["sizes"],
        "operators": operators,
        "data": {"label": data_label(plan), "sha256": data_digest(plan), **row_facts(job)},
        "shape": vars(plan.shape) | {"context": plan.context},
        "settings": {key: getattr(job, key) for key in (
            "batch", "warmup", "steps", "lr", "threads", "length")}
            | {"rounds": len(results["parts"]), "seed": plan.seed},
        **facts_of(results, "bench_profile.py", argv),
    }  # fmt: skip


def heading(record: Record) -> str:
    batch, label = record["settings"]["batch"], record["data"]["label"]
    return f"{record['precision']}, batch {batch}, {label}{threads_of(record)}"


def scaled(value: Record, factor: float) -> str:
    return ranged({key: factor * number for key, number in value.items()})


def part_rows(record: Record) -> list[list[str]]:
    rows = [["part", "ms a step", "share", "GFLOP", "GFLOP/s", "share of matmul peak"]]
    whole = record["parts"]["step"]["seconds"]["median"]
    for name, part in record["parts"].items():
        share = f"{part['seconds']['median'] / whole:.0%}" if name != "ours" else ""
        row = [LABELS[name], scaled(part["seconds"], 1e3), share]
        if "flops" in part:
            row += [f"{part['flops'] / 1e9:,.4g}", scaled(part["flops_per_second"], 1e-9),
                    scaled(part["share_of_peak"], 100) + " %"]  # fmt: skip
        rows.append(row + [""] * (6 - len(row)))
    return rows


def operator_rows(record: Record) -> list[list[str]]:
    rows = [["operator", "ms a step", "share", "calls a step"]]
    for one in record["operators"]:
        rows.append([f"`{one['operator']}`", f"{one['ms']:.3g}", f"{one['share']:.1%}",
                     f"{one['calls']:,.4g}"])  # fmt: skip
    return rows


def peak_lines(record: Record) -> list[str]:
    return [
        f"{precision}: {scaled(peak['flops_per_second'], 1e-9)} GFLOP/s "
        f"({peak['kernel']}, {peak['size']} x {peak['size']})"
        for precision, peak in record["peaks"].items()
    ]


def section(record: Record) -> list[str]:
    settings, work = record["settings"], record["work"]
    return [
        *table(part_rows(record)), "",
        f"Matmul peak in the same process: {'; '.join(peak_lines(record))}. A step holds "
        f"{work['tokens']:,.0f} tokens, {work['scored']:,.0f} of them scored. Medians of "
        f"{settings['rounds']} rounds of {settings['steps']} steps after {settings['warmup']} to "
        "warm up.", "",
        f"The {len(record['operators'])} operators that took longest by themselves, under "
        "torch.profiler in a process of its own:", "",
        *table(operator_rows(record)), "",
    ]  # fmt: skip


def draw(figure: Any, record: Record) -> None:
    axes = figure.subplots(1, 2, width_ratios=(1.6, 1.0))
    draw_parts(axes[0], record["parts"])
    draw_shares(axes[1], record["parts"])


def draw_parts(axes: Any, parts: dict[str, Record]) -> None:
    """One stacked bar; a number where it fits."""
    left, whole = 0.0, parts["step"]["seconds"]["median"] * 1e3
    for name, colour in COLOURS.items():
        if name not in parts:
            continue
        inner = parts.get(f"attention {name}")
        seconds = parts[name]["seconds"]["median"] - (inner["seconds"]["median"] if inner else 0.0)
        value = max(0.0, seconds * 1e3)
        axes.barh([0], [value], left=left, color=colour, label=name, height=0.5)
        if value > 0.06 * whole:
            ink, middle = "white" if name in DARK else INK, left + value / 2
            axes.text(middle, 0, short(value), ha="center", va="center", fontsize=8, color=ink)
        left += value
    axes.set_ylim(-0.4, 0.4)
    axes.set_xlim(0, left)
    axes.set_yticks([])
    axes.set_xlabel("ms a step, attention apart from the rest of its pass", fontsize=8, color=INK)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_shares(axes: Any, parts: dict[str, Record]) -> None:
    """Of the matmul peak, for the parts whose FLOPs are known."""
    known = {n: p["share_of_peak"]["median"] for n, p in parts.items() if "flops" in p}
    known.pop("step")
    names = {"ours": "whole step"} | {name: name for name in known if name != "ours"}
    values = [100.0 * known[name] for name in names]
    axes.barh(list(names.values()), values, color=BLUE)
    for place, value in enumerate(values):
        axes.text(value, place, f"  {value:.3g}", va="center", fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(values))
    axes.set_xlabel("% of the matmul peak", fontsize=8, color=INK)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


PAGE = Page(
    "The parts of one DPO step of dpo-run. Medians over the rounds, lowest and highest in "
    "brackets. FLOPs are those that the model needs, without padding. Written by "
    "`scripts/bench_profile.py`.",
    heading, section, draw, size=(10.5, 2.8),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    p = parser(__doc__, bench_args.DATA)
    bench_args.add_model_and_data(p)
    add_measurement(p, steps=10)
    add_output(p)
    args = parse(p, argv)
    name, shape = resized(args.preset, {key: getattr(args, key) for key in CHANGEABLE})
    busy = refuse_if_busy(args.busy_ok)
    say(f"{name}, {args.precision} on {args.device}; others keep {busy:.2f} cores busy")
    with tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work) as folder:
        plan = make_plan(args, shape, Path(folder))
        job = make_job(args, plan)
        prepare(plan, args.threads)
        results, operators = look(job, args.rounds, Path(folder))
        record = record_of(name, job, plan, results, operators, argv)
    for rows in (part_rows(record), operator_rows(record)):
        print("\n".join(table(rows)), end="\n\n")
    print("matmul peak: " + "; ".join(peak_lines(record)))
    agree = record["losses_agree"]
    if agree["agree"]:
        print(f"written: {PAGE.keep(record, args.out, f'profile-{name}-{args.device}')} and .png")
    else:
        say(f"ERROR: the clocks change what is computed, nothing was written: {agree}")
    if args.json:
        print(json_line(record))
    return 0 if agree["agree"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
