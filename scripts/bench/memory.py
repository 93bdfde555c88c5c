"""Compare the memory estimated by `dry_run=true` with the peak of the same run.

Every run is a separate process, from loading to the saved model, on random weights of a published
shape and synthetic pairs of HH's lengths. The peak is the resident memory above that of the process
before loading; on CUDA, PyTorch's maximum of allocated memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench import options
from scripts.bench.launch import say
from scripts.bench.page import Page, Rows, table, threads_of, where_and_when
from scripts.bench.plan import make_job, make_plan
from scripts.bench.run import run_side, workplace
from scripts.bench.shapes import PRESETS
from scripts.bench.sides import Side
from scripts.bench.summary import Record, circumstances

CASES: dict[str, dict[str, Any]] = {  # name -> overrides, besides those of a DPO run
    "full": {},
    "reference live": {"stage.reference_logprobs": "live"},
    "micro-batches of 512 tokens": {"train.micro_batch_tokens": 512},
    "micro-batches of 1024 tokens": {"train.micro_batch_tokens": 1024},
    "rmsprop": {"optim": "rmsprop", "optim.betas": "[0.9,0.999]"},
    "checkpointing": {"hardware.activation_checkpointing": 1},
    "LoRA": {"lora": "lora"},
    "LoRA with checkpointing": {"lora": "lora", "hardware.activation_checkpointing": 1},
    "QLoRA": {"lora": "qlora"},
}
PRECISIONS = ("fp32", "bf16")


def own_parser() -> argparse.ArgumentParser:
    runs = {
        "presets": {"type": options.names, "default": ("tiny4x256", "gpt2"), "metavar": "A,B,...",
                    "help": "of " + ", ".join(PRESETS)},
        "cases": {"type": options.names, "default": tuple(CASES), "metavar": "A,B,...",
                  "help": "of " + "; ".join(CASES)},
        "precisions": {"type": options.names, "default": PRECISIONS, "metavar": "A,B"},
        "length": {"type": int, "default": 512, "help": "maximum tokens of prompt and response"},
    }  # fmt: skip
    groups = ("measurement", "output")
    return options.parser(__doc__, groups=groups, without=("precision",), more=runs, steps=1,
                          rounds=1)  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One result per run, with the names of its conditions."""
    results = []
    for preset in args.presets:
        plan = make_plan(args, PRESETS[preset], folder / preset)
        plan.prepare(args.threads)
        for precision in args.precisions:
            job = replace(make_job(args, plan), precision=precision)
            for case in args.cases:
                side = Side(case, "memory", CASES[case])
                result = run_side(side, job, folder / f"{preset}-{precision}-{len(results)}")
                result |= {"preset": preset, "precision": precision, "case": case}
                result["ratio"] = result["estimated_mb"] / result["peak_memory_mb"]
                parts = " ".join(f"{k} {v:.0f}" for k, v in result["parts_mb"].items())
                say(f"{' '.join(row_of(result))} ({result['moment']})  {parts}")
                results.append(result)
    return results


def row_of(run: Record) -> list[str]:
    sizes = f"{run['estimated_mb']:,.0f}", f"{run['peak_memory_mb']:,.0f}"
    return [run["preset"], run["precision"], run["case"], *sizes, f"{run['ratio']:.2f}"]


def run_rows(record: Record) -> Rows:
    head = ["weights", "precision", "run", "estimated, MB", "measured, MB", "ratio"]
    return [head, *map(row_of, record["runs"])]


def heading(record: Record) -> str:
    """With presets and cases, so that adapters have a section separate from full fine-tuning."""
    settings, runs = record["settings"], record["runs"]
    of = ", ".join(dict.fromkeys(run["case"] for run in runs))
    return f"Batch {settings['batch']}, {settings['length']} tokens{threads_of(record)}: {of}"


def section(record: Record) -> list[str]:
    ratios = [run["ratio"] for run in record["runs"]]
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    return [
        f"The estimate is {min(ratios):.2f} to {max(ratios):.2f} of the peak; the worst is "
        f"{worst:.2f}. A run is {record['settings']['steps']} steps: on a CPU in bf16 the heap, "
        "which is never given back, grows for some more as rows of new lengths come.", "",
        *table(run_rows(record)), "", *where_and_when(record),
    ]  # fmt: skip


PAGE = Page(
    "The estimate of `dry_run=true` and the peak of the same run, DPO on synthetic pairs of "
    "HH's lengths, from loading to the saved model; what the process held before it loaded "
    "anything is left out. Written by `scripts/bench.py memory`.", heading, section,
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Estimate and measure the selected runs; returns an exit code."""
    args = options.parse(own_parser(), argv)
    for key, known in (("presets", PRESETS), ("cases", CASES), ("precisions", PRECISIONS)):
        options.refuse_unknown(key, getattr(args, key), list(known))
    with workplace(args, timed=False) as folder:
        results = measure(args, folder)
    settings = {key: getattr(args, key) for key in ("batch", "length", "threads", "seed")}
    settings["steps"] = args.warmup + args.steps
    facts = circumstances({"runs": results}, "bench.py memory", argv)
    record = {"device": args.device, "settings": settings, "runs": results, **facts}
    return PAGE.publish(record, args, f"memory-{args.device}", [run_rows(record)])
