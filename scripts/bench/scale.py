"""How dpo-run's cost per pair and peak memory in DPO grow with one size at a time.

  lengths  tokens of prompt and response together, two thirds of them prompt: 64 to 2048
  batches  pairs per step: 1 to 32
  models   presets, or LAYERSxWIDTH for a GPT-2 with heads of 64: tiny4x256, 8x512, gpt2

The other sizes stay at --preset, --length and --batch. Pairs are synthetic and of equal length, so
that only one size changes. Every point of every round is a separate process, points in turn; a
point of several curves is measured once. Results go to <out>/scale-<preset>-<device>.md and .png.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.bench import options, page
from scripts.bench.job import Job
from scripts.bench.launch import say
from scripts.bench.page import Page, Rows
from scripts.bench.plan import Plan, make_job, make_plan, shape_of
from scripts.bench.ratios import over, spread
from scripts.bench.run import run_side, workplace
from scripts.bench.shapes import CHANGEABLE, PRESETS, Shape, resized
from scripts.bench.sides import OURS
from scripts.bench.summary import Record, circumstances

HEAD_WIDTH = 64
CURVES = {"lengths": "tokens of a sequence", "batches": "pairs per step", "models": "model"}
CHANGED = {"lengths": "length", "batches": "batch", "models": "model"}  # of a point
MODEL = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Point:
    """The sizes measured by one process."""

    model: str
    length: int
    batch: int


def curves_of(args: argparse.Namespace, model: str) -> dict[str, list[Point]]:
    """Curves, each of which varies one size of the same point."""
    middle = Point(model, args.length, args.batch)
    curves = {
        "lengths": [replace(middle, length=length) for length in args.lengths],
        "batches": [replace(middle, batch=batch) for batch in args.batches],
        "models": [replace(middle, model=model) for model in args.models],
    }
    return {name: curves[name] for name in args.curves}


def model_shape(model: str) -> Shape:
    if model in PRESETS:
        return PRESETS[model]
    match = MODEL.fullmatch(model)
    if match is None:
        raise SystemExit(f"--models: no {model}; give LAYERSxWIDTH or one of {', '.join(PRESETS)}")
    layers, width = map(int, match.groups())
    return resized("gpt2", {"layers": layers, "width": width,
                            "heads": max(1, width // HEAD_WIDTH)})[1]  # fmt: skip


def prompt_of(length: int) -> int:
    """Number of prompt tokens."""
    return length - length // 3


def plans_of(
    args: argparse.Namespace, shapes: dict[str, Shape], points: Sequence[Point], folder: Path
) -> dict[Point, tuple[Plan, Job]]:
    """One folder per model, with a context for its longest sequences."""
    plans = {}
    for point in points:
        longest = max(p.length for p in points if p.model == point.model)
        here = argparse.Namespace(**vars(args) | {
            "batch": point.batch, "length": point.length,
            "prompt_length": prompt_of(point.length),
            "response_length": point.length - prompt_of(point.length),
        })  # fmt: skip
        plan = make_plan(here, shapes[point.model], folder / point.model)
        plan = replace(plan, context=max(plan.shape.context, longest),
                       folder=str(folder / point.model))  # fmt: skip
        plans[point] = plan, make_job(here, plan)
    return plans


def measure(
    plans: dict[Point, tuple[Plan, Job]], rounds: int, folder: Path
) -> dict[Point, list[Record]]:
    """The results of every point in each round."""
    for plan, job in plans.values():
        plan.prepare(job.threads)
    results: dict[Point, list[Record]] = {point: [] for point in plans}
    for number in range(rounds):
        for index, (point, (_, job)) in enumerate(plans.items()):
            result = run_side(OURS, job, folder / f"{number}-{index}")
            if not all(map(math.isfinite, result["figures"]["loss"])):
                raise SystemExit(f"{point}: the loss is not finite: {result['figures']['loss']}")
            results[point].append(result)
            say(f"round {number + 1}/{rounds}  {point.model} length {point.length} batch "
                f"{point.batch}  {result['per_second']:.3f} pairs/s "
                f"{result['peak_memory_mb']:.0f} MB")  # fmt: skip
    return results


def point_facts(point: Point, plan: Plan, results: Sequence[Record]) -> Record:
    """`tokens_per_pair` counts the prompt once, as it is computed once."""
    weights = sum(path.stat().st_size for path in plan.model.glob("*.safetensors")) / 4  # float32
    return {
        **vars(point),
        "parameters": int(weights),
        "seconds_per_pair": spread([1.0 / r["per_second"] for r in results]),
        "tokens_per_pair": 2 * point.length - prompt_of(point.length),
        "peak_memory_mb": over(results, "peak_memory_mb"),
        "memory_before_the_model_mb": over(results, "start_memory_mb"),
    }


def heading(record: Record) -> str:
    settings, curves = record["settings"], ", ".join(record["curves"])
    return (
        f"{record['precision']}, by {curves}; else {settings['length']} tokens, batch "
        f"{settings['batch']}{page.threads_of(record)}"
    )


def curve_rows(record: Record, curve: str) -> Rows:
    rows = [[CURVES[curve], "ms per pair", "pairs/s", "tokens/s", "peak memory, MB"]]
    for point in record["curves"][curve]:
        size, seconds = str(point[CHANGED[curve]]), point["seconds_per_pair"]
        if curve == "models":
            size += f" ({point['parameters'] / 1e6:,.1f}M weights)"
        tokens = point["tokens_per_pair"] / seconds["median"]
        speeds = (page.short(x) for x in (1.0 / seconds["median"], tokens))
        memory = page.ranged(point["peak_memory_mb"])
        rows.append([size, page.ranged(seconds, 1e3), *speeds, memory])
    return rows


def section(record: Record) -> list[str]:
    tables = [
        line for curve in record["curves"] for line in (*page.table(curve_rows(record, curve)), "")
    ]
    return [
        *tables,
        f"{page.rounds_line(record, 'point')} A pair's tokens count its prompt once. Two thirds "
        "of a sequence are its prompt.", "", *page.where_and_when(record),
    ]  # fmt: skip


def draw(axes: Any, record: Record) -> None:
    """Plot cost and peak memory of each curve: sizes on a linear axis, on which a constant cost per
    unit is a straight line; models by name."""
    kinds = (("seconds_per_pair", 1e3, "ms per pair"), ("peak_memory_mb", 1.0, "peak memory, MB"))
    panels = iter(axes)
    for curve, points in record["curves"].items():
        places = [p[CHANGED[curve]] for p in points]
        for key, factor, label in kinds:
            panel, values = next(panels), [p[key] for p in points]
            low, middle, high = ([factor * v[k] for v in values] for k in ("min", "median", "max"))
            panel.fill_between(places, low, high, color=page.BLUE, alpha=0.2, linewidth=0)
            panel.plot(places, middle, "o-", color=page.BLUE, markersize=4)
            panel.set_ylim(0, 1.15 * max(high))
            panel.set_xlabel(f"{CURVES[curve]}: {label}", fontsize=8, color=page.INK)
    for unused in panels:
        unused.set_axis_off()


PAGE = Page(
    f"Cost of a pair and peak memory of dpo-run's DPO, as one size grows. {page.MEDIANS} Written "
    "by `scripts/bench.py scale`.", heading, section, draw, grid=(2, len(CURVES)), height=4.6,
)  # fmt: skip


def own_parser() -> argparse.ArgumentParser:
    model = options.OPTIONS["model"]
    sizes = {
        **{word: model[word] for word in ("preset", *CHANGEABLE)},
        "length": {"type": int, "default": 192, "help": "tokens, for batches and models"},
        "curves": {"type": options.names, "default": tuple(CURVES), "metavar": "A,B",
                   "help": "only these of " + ",".join(CURVES)},
        "lengths": {"type": options.numbers, "default": (64, 128, 256, 512, 1024, 2048),
                    "metavar": "64,128,..."},
        "batches": {"type": options.numbers, "default": (1, 2, 4, 8, 16, 32),
                    "metavar": "1,2,..."},
        "models": {"type": options.names, "default": ("tiny4x256", "8x512", "gpt2"),
                   "metavar": "A,B,..."},
    }  # fmt: skip
    return options.parser(__doc__, groups=("measurement", "output"), more=sizes, steps=6)


def check(args: argparse.Namespace) -> None:
    """Exit with the problem of invalid sizes."""
    options.refuse_unknown("curves", args.curves, list(CURVES))
    if min(args.length, *args.lengths) < 6:
        raise SystemExit("--length, --lengths: must be at least 6 tokens")
    if len({prompt_of(length) for length in args.lengths}) < len(args.lengths):
        raise SystemExit("--lengths: two of them round to the same prompt")
    if min(args.batches) < 1:
        raise SystemExit("--batches: must be at least 1")


def main(argv: Sequence[str]) -> int:
    """Measure the selected curves; returns an exit code."""
    args = options.parse(own_parser(), argv)
    check(args)
    name, shape = shape_of(args)
    curves = curves_of(args, name)
    points = list(dict.fromkeys(point for curve in curves.values() for point in curve))
    shapes = {p.model: shape if p.model == name else model_shape(p.model) for p in points}
    with workplace(args, f"{len(points)} points") as folder:
        plans = plans_of(args, shapes, points, folder)
        results = measure(plans, args.rounds, folder / "rounds")
        facts = {p: point_facts(p, plans[p][0], results[p]) for p in points}
    keys = ("batch", "length", "warmup", "steps", "rounds", "lr", "threads", "seed")
    record = {
        "preset": name,
        "device": args.device,
        "precision": args.precision,
        "curves": {curve: [facts[p] for p in of_curve] for curve, of_curve in curves.items()},
        "settings": {key: getattr(args, key) for key in keys},
        **circumstances({str(p): rows for p, rows in results.items()}, "bench.py scale", argv),
    }
    tables = [curve_rows(record, curve) for curve in curves]
    return PAGE.publish(record, args, f"scale-{name}-{args.device}", tables)
