#!/usr/bin/env python
"""Compare the memory that `dry_run=true` foretells with the peak of the same run.

Every run is a process of its own, from loading to the saved model, on random weights of a
published shape and synthetic pairs of HH's lengths. The peak is the resident memory above
what the process had before it loaded anything, on CUDA what PyTorch had allocated at most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import make_job, make_plan
from bench_common import add_measurement, add_output, facts_of, parse, parser, where_and_when
from bench_report import table
from bench_run import prepare, run_side, say
from bench_shapes import PRESETS
from bench_sides import Side
from bench_summary import json_line

CASES: dict[str, dict[str, Any]] = {  # name -> overrides, beside a DPO run's
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


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def own_parser() -> argparse.ArgumentParser:
    p = parser(__doc__)
    what = p.add_argument_group("runs")
    what.add_argument("--presets", type=names, default=("tiny4x256", "gpt2"), metavar="A,B,...",
                      help="of " + ", ".join(PRESETS))  # fmt: skip
    what.add_argument("--cases", type=names, default=tuple(CASES), metavar="A,B,...",
                      help="of " + "; ".join(CASES))  # fmt: skip
    what.add_argument("--precisions", type=names, default=PRECISIONS, metavar="A,B")
    what.add_argument("--length", type=int, default=512, help="tokens of prompt and response kept")
    add_measurement(p, steps=1, rounds=1, precision=False)
    add_output(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Exit with what is wrong with the names."""
    for key, known in (("presets", PRESETS), ("cases", CASES), ("precisions", PRECISIONS)):
        if unknown := set(getattr(args, key)) - set(known):
            raise SystemExit(f"--{key}: no {', '.join(sorted(unknown))}; give {', '.join(known)}")


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A result a run, with its names."""
    found = []
    for preset in args.presets:
        plan = make_plan(args, PRESETS[preset], folder / preset)
        prepare(plan, args.threads)
        for precision in args.precisions:
            job = replace(make_job(args, plan), precision=precision)
            for case in args.cases:
                side = Side(case, "bench_memory_job.py", CASES[case])
                result = run_side(side, job, folder / f"{preset}-{precision}-{len(found)}")
                result |= {"preset": preset, "precision": precision, "case": case}
                result["ratio"] = result["estimated_mb"] / result["peak_memory_mb"]
                say(f"{preset} {precision} {case}: estimated {result['estimated_mb']:,.0f} MB "
                    f"({result['moment']}), measured {result['peak_memory_mb']:,.0f}, "
                    f"ratio {result['ratio']:.2f}  "
                    + " ".join(f"{k} {v:.0f}" for k, v in result["parts_mb"].items()))  # fmt: skip
                found.append(result)
    return found


def rows_of(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["weights", "precision", "run", "estimated, MB", "measured, MB", "ratio"]]
    for run in found:
        sizes = f"{run['estimated_mb']:,.0f}", f"{run['peak_memory_mb']:,.0f}"
        rows.append([run["preset"], run["precision"], run["case"], *sizes, f"{run['ratio']:.2f}"])
    return rows


def page(record: dict[str, Any], rows: Sequence[Sequence[str]]) -> str:
    ratios = [run["ratio"] for run in record["runs"]]
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    lines = [
        f"# memory-{record['device']}", "",
        "What `dry_run=true` foretells against the peak of the same run, DPO on synthetic pairs of "
        f"HH's lengths, batch {record['settings']['batch']}, from loading to the saved model; what "
        "the process held before it loaded anything is left out. The estimate is "
        f"{min(ratios):.2f} to {max(ratios):.2f} of the peak; the worst is {worst:.2f}. A run is "
        f"{record['settings']['steps']} steps: on a CPU in bf16 the heap, which is never given "
        "back, grows for some more as rows of new lengths come. Written by "
        "`scripts/bench_memory.py`.", "",
        *table(rows), "", *where_and_when(record), f"<!-- record: {json_line(record)} -->", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    args = parse(own_parser(), argv)
    check(args)
    with tempfile.TemporaryDirectory(prefix="dpo-run-bench-", dir=args.work) as folder:
        found = measure(args, Path(folder))
    facts = facts_of({"runs": found}, "bench_memory.py", argv)
    settings = {key: getattr(args, key) for key in ("batch", "length", "threads", "seed")}
    settings["steps"] = args.warmup + args.steps
    record = {"device": args.device, "settings": settings, "runs": found, **facts}
    rows = rows_of(found)
    print("\n".join(table(rows)), end="\n\n")
    path = args.out / f"memory-{args.device}.md"
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(page(record, rows))
    print(f"written: {path}")
    if args.json:
        print(json_line(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
