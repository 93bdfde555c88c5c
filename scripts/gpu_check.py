#!/usr/bin/env python
"""Check dpo-run on this machine's GPU in at most eight minutes, and write a page of the results.

A step that fails, crashes or hangs does not stop the next. On a CPU every step runs in a small
form.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.common import ROOT, commit, shown_command
from scripts.gpu_checks.machine import inspect_machine, slug
from scripts.gpu_checks.page import Circumstances
from scripts.gpu_checks.runner import Report, Run
from scripts.gpu_checks.steps import STEPS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", metavar="N,N-N", help="steps to run")
    p.add_argument("--skip", metavar="N,N-N", help="steps to skip")
    p.add_argument("--list", action="store_true", help="print the steps and stop")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    p.add_argument("--minutes", type=float, default=8.0, help="total time limit; default: 8")
    p.add_argument("--data", metavar="FILE", help="pairs of Anthropic HH; default: generated ones")
    p.add_argument("--tokenizer", metavar="FOLDER", help="for --data; default: learned from it")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="FOLDER",
                   help="folder of the page, its JSON lines and the log")  # fmt: skip
    p.add_argument("--commit", help="commit of this code, if git is not available")
    p.add_argument("--work", metavar="FOLDER", help="temporary folder for weights (40 GB)")
    p.add_argument(
        "--together", action=argparse.BooleanOptionalAction,
        help="run steps without timings side by side; default: on a GPU",
    )  # fmt: skip
    return p


def numbers(text: str | None, p: argparse.ArgumentParser, option: str) -> set[int]:
    """`1,4-6` -> {1, 4, 5, 6}"""
    numbers: set[int] = set()
    for part in (text or "").split(","):
        first, _, last = part.strip().partition("-")
        if not part.strip():
            continue
        if not first.isdigit() or not (last or first).isdigit():
            p.error(f"{option} {text}: expected numbers such as 1,4-6")
        numbers |= set(range(int(first), int(last or first) + 1))
    known = {step.number for step in STEPS}
    if unknown := numbers - known:
        p.error(f"{option}: no step {', '.join(map(str, sorted(unknown)))}; there are 0 to "
                f"{max(known)} (--list)")  # fmt: skip
    return numbers


def listing() -> str:
    return "\n".join(
        f"{step.number:>2}  {step.name:26} about {step.seconds:3} s, at most {step.limit:3}"
        f"{'' if step.alone else ', in parallel'}: {step.checks}"
        for step in STEPS
    )


def stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # runs the `finally` clauses that end processes


def main(argv: Sequence[str]) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.list:
        print(listing())
        return 0
    only, skip = numbers(args.only, p, "--only"), numbers(args.skip, p, "--skip")
    chosen = [s for s in STEPS if (not only or s.number in only) and s.number not in skip]
    if not chosen:
        p.error("no step is left")
    for name in ("data", "tokenizer"):
        if getattr(args, name) and not Path(getattr(args, name)).exists():
            p.error(f"--{name} {getattr(args, name)}: does not exist")
    signal.signal(signal.SIGTERM, stop)
    machine = inspect_machine(args.device)
    if args.device == "cuda" and machine["device"] != "cuda":
        p.error(f"--device cuda: no CUDA device here ({machine.get('why', 'none was found')})")
    device = machine.pop("device")
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    code = args.commit or commit() or "unknown"
    circumstances = Circumstances(shown_command("gpu_check.py", argv), date, code, device, machine)
    report = Report(args.out, slug(machine, device), circumstances, chosen)
    with tempfile.TemporaryDirectory(prefix="dpo-run-gpu-check-", dir=args.work) as work:
        run = Run(device, Path(work), args.data, args.tokenizer, 60 * args.minutes, report)
        run.all(chosen, together=device == "cuda" if args.together is None else args.together)
    print(f"written: {report.path}.md, .jsonl and .log", flush=True)
    return 1 if any(o.status == "FAIL" for o in report.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
