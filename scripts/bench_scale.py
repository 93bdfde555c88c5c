#!/usr/bin/env python
"""How the cost of a pair and the peak memory of dpo-run's DPO grow, one size at a time.

  lengths  tokens of prompt and response together, two thirds of them prompt: 64 to 2048
  batches  pairs a step: 1 to 32
  models   presets, or LAYERSxWIDTH for a GPT-2 with heads of 64: tiny4x256, 8x512, gpt2

Every other size stays at --preset, --length and --batch. Pairs are synthetic and all of one
length, so that nothing but the named size changes. Every point of every round is a process
of its own, points in turn; a point that several curves share is measured once. Results go to
<out>/scale-<preset>-<device>.md and .png. For ours beside the plain padded way, by prompt
length, there is `bench.py --grow prompts`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import make_job, make_plan
from bench_args import lengths as numbers
from bench_common import (
    Page,
    add_measurement,
    add_output,
    facts_of,
    parse,
    parser,
    threads_of,
)
from bench_job import Job
from bench_prepare import Plan
from bench_report import BLUE, INK, Record, ranged, short, table
from bench_run import Results, prepare, refuse_if_busy, run_side, say, spread
from bench_shapes import CHANGEABLE, PRESETS, Shape, resized
from bench_sides import Side
from bench_summary import json_line

OURS = Side("ours", "bench_ours.py", {})
HEAD_WIDTH = 64
CURVES = {"lengths": "tokens of a sequence", "batches": "pairs a step", "models": "model"}
MODEL = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Point:
    """What one process measures."""

    model: str
    length: int
    batch: int


def curves_of(args: argparse.Namespace, model: str) -> dict[str, list[Point]]:
    """Each curve changes one size of the same point."""
    middle = Point(model, args.length, args.batch)
    found = {
        "lengths": [replace(middle, length=length) for length in args.lengths],
        "batches": [replace(middle, batch=batch) for batch in args.batches],
        "models": [replace(middle, model=model) for model in args.models],
    }
    return {name: found[name] for name in args.curves}


def shape_of(model: str) -> Shape:
    if model in PRESETS:
        return PRESETS[model]
    found = MODEL.fullmatch(model)
    if found is None:
        raise SystemExit(f"--models: no {model}; give LAYERSxWIDTH or one of {', '.join(PRESETS)}")
    layers, width = map(int, found.groups())
    return resized("gpt2", {"layers": layers, "width": width,
                            "heads": max(1, width // HEAD_WIDTH)})[1]  # fmt: skip


def prompt_of(length: int) -> int:
    """Tokens of the prompt."""
    return length - length // 3


def plans_of(
    args: argparse.Namespace, shapes: dict[str, Shape], points: Sequence[Point], folder: Path
) -> dict[Point, tuple[Plan, Job]]:
    """A folder a model, whose context holds its longest sequences."""
    made = {}
    for point in points:
        there = folder / point.model
        longest = max(p.length for p in points if p.model == point.model)
        here = argparse.Namespace(**vars(args) | {
            "batch": point.batch, "length": point.length,
            "prompt_length": prompt_of(point.length),
            "response_length": point.length - prompt_of(point.length),
        })  # fmt: skip
        plan = make_plan(here, shapes[point.model], there)
        plan = replace(plan, context=max(plan.shape.context, longest))
        made[point] = plan, make_job(here, plan)
    return made


def measure(
    made: dict[Point, tuple[Plan, Job]], rounds: int, folder: Path
) -> dict[Point, list[Record]]:
    """The results of every point in each round."""
    for plan, job in made.values():
        prepare(plan, job.threads)
    found: dict[Point, list[Record]] = {point: [] for point in made}
    for number in range(rounds):
        for index, (point, (_, job)) in enumerate(made.items()):
            result = run_side(OURS, job, folder / f"{number}-{index}")
            if not all(map(math.isfinite, result["figures"]["loss"])):
                raise SystemExit(f"{point}: the loss is not finite: {result['figures']['loss']}")
            found[point].append(result)
            say(f"round {number + 1}/{rounds}  {point.model} length {point.length} batch "
                f"{point.batch}  {result['per_second']:.3f} pairs/s "
                f"{result['peak_memory_mb']:.0f} MB")  # fmt: skip
    return found


def point_facts(point: Point, plan: Plan, results: Sequence[Record]) -> Record:
    """`tokens_per_pair` counts its prompt once, as it is computed."""
    weights = sum(path.stat().st_size for path in plan.model.glob("*.safetensors")) / 4  # float32
    return {
        "model": point.model, "length": point.length, "batch": point.batch,
        "parameters": int(weights),
        "seconds_per_pair": spread([1.0 / r["per_second"] for r in results]),
        "tokens_per_pair": 2 * point.length - prompt_of(point.length),
        "peak_memory_mb": spread([r["peak_memory_mb"] for r in results]),
        "memory_before_the_model_mb": spread([r["start_memory_mb"] for r in results]),
    }  # fmt: skip


def record_of(
    args: argparse.Namespace,
    name: str,
    curves: dict[str, list[Point]],
    made: dict[Point, tuple[Plan, Job]],
    found: dict[Point, list[Record]],
    argv: Sequence[str],
) -> Record:
    results: Results = {str(point): rows for point, rows in found.items()}
    keys = ("batch", "length", "warmup", "steps", "rounds", "lr", "threads", "seed")
    return {
        "preset": name,
        "device": args.device,
        "precision": args.precision,
        "curves": {
            curve: [point_facts(point, made[point][0], found[point]) for point in points]
            for curve, points in curves.items()
        },
        "settings": {key: getattr(args, key) for key in keys},
        **facts_of(results, "bench_scale.py", argv),
    }


def heading(record: Record) -> str:
    settings, curves = record["settings"], ", ".join(record["curves"])
    return (
        f"{record['precision']}, by {curves}; else {settings['length']} tokens, batch "
        f"{settings['batch']}{threads_of(record)}"
    )


def size_of(point: Record, curve: str) -> str:
    return str(point[{"lengths": "length", "batches": "batch", "models": "model"}[curve]])


def curve_rows(record: Record, curve: str) -> list[list[str]]:
    rows = [[CURVES[curve], "ms a pair", "pairs/s", "tokens/s", "peak memory, MB"]]
    for point in record["curves"][curve]:
        size, seconds = size_of(point, curve), point["seconds_per_pair"]
        if curve == "models":
            size += f" ({point['parameters'] / 1e6:,.1f}M weights)"
        ms = {key: 1e3 * value for key, value in seconds.items()}
        tokens = point["tokens_per_pair"] / seconds["median"]
        rows.append([size, ranged(ms), short(1.0 / seconds["median"]), short(tokens),
                     ranged(point["peak_memory_mb"])])  # fmt: skip
    return rows


def section(record: Record) -> list[str]:
    settings = record["settings"]
    tables = [
        line for curve in record["curves"] for line in (*table(curve_rows(record, curve)), "")
    ]
    return [
        *tables,
        f"{settings['rounds']} rounds of {settings['steps']} steps after {settings['warmup']} to "
        "warm up, every point in a process of its own. A pair's tokens count its prompt once. "
        "Two thirds of a sequence are its prompt.", "",
    ]  # fmt: skip


def draw(figure: Any, record: Record) -> None:
    """Cost above, memory below; a column a curve."""
    panels = figure.subplots(2, len(CURVES), squeeze=False)
    for column, curve in zip(panels.T, record["curves"], strict=False):
        points = record["curves"][curve]
        costs = [{k: 1e3 * v for k, v in p["seconds_per_pair"].items()} for p in points]
        draw_curve(column[0], curve, points, costs)
        draw_curve(column[1], curve, points, [p["peak_memory_mb"] for p in points])
    for row, label in zip(panels, ("ms a pair", "peak memory, MB"), strict=True):
        row[0].set_ylabel(label, fontsize=8, color=INK)
        for panel in row[len(record["curves"]) :]:
            panel.set_axis_off()


def draw_curve(axes: Any, curve: str, points: Sequence[Record], values: Sequence[Record]) -> None:
    """Numbers on a linear axis, so that a straight line is a constant price; models as names."""
    named = curve == "models"
    places = list(range(len(points))) if named else [int(size_of(p, curve)) for p in points]
    middle = [value["median"] for value in values]
    axes.fill_between(places, [v["min"] for v in values], [v["max"] for v in values],
                      color=BLUE, alpha=0.2, linewidth=0)  # fmt: skip
    axes.plot(places, middle, "o-", color=BLUE, markersize=4)
    axes.set_ylim(0, 1.15 * max(value["max"] for value in values))
    if named:
        axes.set_xticks(places, [p["model"] for p in points])
        axes.set_xlim(-0.4, len(points) - 0.6)
    else:
        axes.set_xlim(0, 1.05 * max(places))
        axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(CURVES[curve], fontsize=8, color=INK)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


PAGE = Page(
    "Cost of a pair and peak memory of dpo-run's DPO, as one size grows. Medians over the "
    "rounds, lowest and highest in brackets. Written by `scripts/bench_scale.py`.",
    heading, section, draw, size=(10.5, 4.6),
)  # fmt: skip


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def own_parser() -> argparse.ArgumentParser:
    p = parser(__doc__)
    what = p.add_argument_group("sizes")
    what.add_argument("--preset", choices=PRESETS, default="tiny4x256", help="of lengths, batches")
    for name in CHANGEABLE:
        what.add_argument(f"--{name}", type=int, help="instead of the preset's")
    what.add_argument("--length", type=int, default=192, help="tokens, for batches and models")
    what.add_argument("--curves", type=names, default=tuple(CURVES), metavar="A,B",
                      help="only these of " + ",".join(CURVES))  # fmt: skip
    what.add_argument("--lengths", type=numbers, default=(64, 128, 256, 512, 1024, 2048),
                      metavar="64,128,...")  # fmt: skip
    what.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16, 32), metavar="1,2,...")
    what.add_argument("--models", type=names, default=("tiny4x256", "8x512", "gpt2"),
                      metavar="A,B,...")  # fmt: skip
    add_measurement(p, steps=6)
    add_output(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Exit with what is wrong with the sizes."""
    if unknown := set(args.curves) - set(CURVES):
        raise SystemExit(f"--curves: no {', '.join(sorted(unknown))}; give {', '.join(CURVES)}")
    if min(args.length, *args.lengths) < 6:
        raise SystemExit("--length, --lengths: must be at least 6 tokens")
    if len({prompt_of(length) for length in args.lengths}) < len(args.lengths):
        raise SystemExit("--lengths: two of them round to the same prompt")
    if min(args.batches) < 1:
        raise SystemExit("--batches: must be at least 1")


def main(argv: Sequence[str]) -> int:
    args = parse(own_parser(), argv)
    check(args)
    name, shape = resized(args.preset, {key: getattr(args, key) for key in CHANGEABLE})
    curves = curves_of(args, name)
    points = list(dict.fromkeys(point for curve in curves.values() for point in curve))
    shapes = {p.model: shape if p.model == name else shape_of(p.model) for p in points}
    busy = refuse_if_busy(args.busy_ok)
    say(f"{len(points)} points, {args.precision} on {args.device}; others keep {busy:.2f} cores "
        "busy")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work) as folder:
        made = plans_of(args, shapes, points, Path(folder))
        found = measure(made, args.rounds, Path(folder) / "rounds")
        record = record_of(args, name, curves, made, found, argv)
    for curve in curves:
        print("\n".join(table(curve_rows(record, curve))), end="\n\n")
    print(f"written: {PAGE.keep(record, args.out, f'scale-{name}-{args.device}')} and .png")
    if args.json:
        print(json_line(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
