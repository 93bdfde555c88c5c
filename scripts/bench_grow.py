"""`bench.py --grow prompts`: seconds a pair as prompts grow, ours and the plain padded way."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_job import Job
from bench_prepare import Plan
from bench_report import BLUE, GREY, INK
from bench_run import Results, compare, prepare, run_rounds, say, spread
from bench_sides import Side

SIDES = (Side("ours", "bench_ours.py", {}), Side("plain", "bench_plain.py", {}))
COLUMNS = ("prompt_tokens", "response_tokens", "side", "seconds_per_pair", "lowest", "highest",
           "peak_memory_mb")  # fmt: skip


def grow(
    job: Job, plan: Plan, prompt_lengths: Sequence[int], rounds: int, folder: Path
) -> tuple[list[dict[str, Any]], Results]:
    """One row a prompt length and side, and all results; exits if the losses differ."""
    assert plan.response_length is not None
    curve: list[dict[str, Any]] = []
    every: Results = {}
    for length in prompt_lengths:
        here = replace(plan, prompt_length=length, length=length + plan.response_length)
        prepare(here, job.threads)
        say(f"prompts of {length} tokens")
        there = replace(
            job, ids=str(here.ids), length=here.length,
            overrides=here.data_overrides(str(here.rows)),
        )  # fmt: skip
        results = run_rounds(there, SIDES, rounds, folder / str(length))
        curve += rows_of(results, there, here)
        every |= {f"{side} {length}": found for side, found in results.items()}
    return curve, every


def rows_of(results: Results, job: Job, plan: Plan) -> list[dict[str, Any]]:
    difference = compare(results["plain"][0], results["ours"][0], job.precision)
    if not difference["agree"]:
        raise SystemExit(f"prompts of {plan.prompt_length}: the losses differ: {difference}")
    rows = []
    for name, found in results.items():
        seconds = spread([1.0 / result["per_second"] for result in found])
        memory = spread([result["peak_memory_mb"] for result in found])["median"]
        values = (plan.prompt_length, plan.response_length, name, *seconds.values(), memory)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def keep_curve(curve: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """`path` with .csv and .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
    draw_curve(curve, path.with_suffix(".png"), title)


def draw_curve(curve: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    labels = {"seconds_per_pair": "seconds a pair", "peak_memory_mb": "peak memory, MB"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for side, colour in (("ours", BLUE), ("plain", GREY)):
            rows = [row for row in curve if row["side"] == side]
            prompts = [row["prompt_tokens"] for row in rows]
            axes.plot(prompts, [row[key] for row in rows], "o-", color=colour, label=side)
            if key == "seconds_per_pair":
                low, high = ([row[k] for row in rows] for k in ("lowest", "highest"))
                axes.fill_between(prompts, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_ylim(0, 1.1 * max(row[key] for row in curve))
        axes.set_xlabel("prompt tokens", fontsize=9)
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    figure.tight_layout()
    figure.savefig(path)
