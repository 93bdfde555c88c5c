"""Where dpo-run's training step spends its time, and how far that is from the hardware's limit.

DPO steps are measured as `dpo-run` runs them: in one process unchanged, in another with clocks
around the functions of a step (on CUDA each clock synchronizes, so the first process shows the
clocks' overhead), in a third under torch.profiler. The limit is the fastest product of two square
matrices in the same process and precision. FLOPs are those the model needs (see
dpo_cli/train/flops.py): 2 per weight and token in the forward, twice that in the backward,
attention between tokens that see each other, the head at scored tokens only. Results go to
<out>/profile-<preset>-<device>.md and .png.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.bench import options, page
from scripts.bench.equal import Results, agreement
from scripts.bench.job import Job
from scripts.bench.page import Page, Rows
from scripts.bench.plan import make_job, make_plan, shape_of
from scripts.bench.ratios import over, spread
from scripts.bench.run import run_rounds, run_side, workplace
from scripts.bench.sides import OURS, Side
from scripts.bench.summary import Record, circumstances, conditions_of

PARTS = Side("parts", "parts", {"watch": "parts"})
OPERATORS = Side("operators", "parts", {"watch": "operators"})
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


def part_facts(job: Job, results: Results) -> dict[str, Record]:
    """Part -> seconds per step; with known FLOPs, also its speed and share of the peak."""
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
            rates = [(flops[name] / seconds[name], peak) for seconds, flops, peak in rounds]
            facts[name] |= {"flops": rounds[0][1][name],
                            "flops_per_second": spread([rate for rate, _ in rates]),
                            "share_of_peak": spread([rate / peak for rate, peak in rates]),
                            }  # fmt: skip
    return facts


def peak_facts(results: Results) -> dict[str, Record]:
    """Precision -> FLOP/s over the rounds; size and kernel of the fastest."""
    fastest_of = {}
    for precision in results["parts"][0]["peaks"]:
        peaks = [result["peaks"][precision] for result in results["parts"]]
        fastest = max(peaks, key=lambda peak: peak["flops_per_second"])
        fastest_of[precision] = fastest | {"flops_per_second": over(peaks, "flops_per_second")}
    return fastest_of


def heading(record: Record) -> str:
    batch, label = record["settings"]["batch"], record["data"]["label"]
    return f"{record['precision']}, batch {batch}, {label}{page.threads_of(record)}"


def part_rows(record: Record) -> Rows:
    rows = [["part", "ms per step", "share", "GFLOP", "GFLOP/s", "share of matmul peak"]]
    step_seconds = record["parts"]["step"]["seconds"]["median"]
    for name, part in record["parts"].items():
        share = f"{part['seconds']['median'] / step_seconds:.0%}" if name != "ours" else ""
        row = [LABELS[name], page.ranged(part["seconds"], 1e3), share]
        if "flops" in part:
            row += [f"{part['flops'] / 1e9:,.4g}", page.ranged(part["flops_per_second"], 1e-9),
                    page.ranged(part["share_of_peak"], 100) + " %"]  # fmt: skip
        rows.append(row + [""] * (6 - len(row)))
    return rows


def operator_rows(record: Record) -> Rows:
    rows = [["operator", "ms per step", "share", "calls per step"]]
    for one in record["operators"]:
        rows.append([f"`{one['operator']}`", f"{one['ms']:.3g}", f"{one['share']:.1%}",
                     f"{one['calls']:,.4g}"])  # fmt: skip
    return rows


def section(record: Record) -> list[str]:
    work = record["work"]
    peaks = "; ".join(
        f"{precision}: {page.ranged(peak['flops_per_second'], 1e-9)} GFLOP/s "
        f"({peak['kernel']}, {peak['size']} x {peak['size']})"
        for precision, peak in record["peaks"].items()
    )
    return [
        *page.table(part_rows(record)), "",
        f"Matmul peak in the same process: {peaks}. A step has {work['tokens']:,.0f} tokens, "
        f"{work['scored']:,.0f} of them scored. {page.rounds_line(record)}", "",
        f"The {len(record['operators'])} operators with the longest self time, under "
        "torch.profiler in a separate process:", "",
        *page.table(operator_rows(record)), "", *page.where_and_when(record),
    ]  # fmt: skip


def draw(axes: Any, record: Record) -> None:
    """Plot milliseconds of each part, and the share of the peak of those with known FLOPs."""
    parts = {("whole step" if name == "ours" else name): part
             for name, part in record["parts"].items() if name != "step"}  # fmt: skip
    for panel, key, factor, label in (
        (axes[0], "seconds", 1e3, "ms per step"),
        (axes[1], "share_of_peak", 100.0, "% of the matmul peak"),
    ):
        values = {name: {k: factor * v for k, v in part[key].items()}
                  for name, part in parts.items() if key in part}  # fmt: skip
        page.bars(panel, values, label, page.BLUE)


PAGE = Page(
    f"The parts of one DPO step of dpo-run. {page.MEDIANS} FLOPs are those the model needs, "
    "without padding. Written by `scripts/bench.py profile`.", heading, section, draw,
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Profile a DPO step; returns an exit code."""
    groups = ("model", "data", "measurement", "output")
    args = options.parse(options.parser(__doc__, groups=groups), argv)
    name, shape = shape_of(args)
    with workplace(args, name) as folder:
        plan = make_plan(args, shape, folder)
        job = make_job(args, plan)
        plan.prepare(args.threads)
        results = run_rounds(job, (OURS, PARTS), args.rounds, folder / "rounds")
        results["operators"] = [run_side(OPERATORS, job, folder / "operators")]
        parts = results["parts"][0]
        record = {
            **conditions_of(name, job, plan, args.rounds),
            "losses_agree": agreement(results, job.precision),
            "parts": part_facts(job, results),
            "peaks": peak_facts(results),
            "work": parts["work"],
            "sizes": parts["sizes"],
            "operators": results["operators"][0]["operators"],
            **circumstances(results, "bench.py profile", argv),
        }
    if not record["losses_agree"]["agree"]:
        return page.differ(record, "the clocks change what is computed")
    tables = [part_rows(record), operator_rows(record)]
    return PAGE.publish(record, args, f"profile-{name}-{args.device}", tables)
