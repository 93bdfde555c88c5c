"""Run the steps: timings alone, the others side by side, all within the time limit."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from scripts.common import ROOT, environment, write_atomic
from scripts.gpu_checks.facts import Setup
from scripts.gpu_checks.page import (
    CUT_OFF,
    Circumstances,
    Outcome,
    json_lines,
    outcome_of,
    page,
)
from scripts.gpu_checks.steps import Step
from scripts.processes import Process

OUTPUT = {"MPLBACKEND": "Agg", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
LOG_TAIL = 600_000  # bytes of each step that the log keeps
MIRROR_SECONDS = 3.0
ENOUGH = 0.6  # fraction of a step's expected time that must be left to start it
CPU_PATIENCE = 5  # times the limits, which are for a GPU and its many cores


class Report:
    """`<folder>/<name>`.md, .jsonl and .log, rewritten with every result."""

    def __init__(
        self, folder: Path, name: str, circumstances: Circumstances, steps: Sequence[Step]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self.circumstances, self.steps = circumstances, steps
        self.outcomes: list[Outcome] = []
        self.logs: dict[int, Path] = {}  # step -> folder of `step-<number>*.log`
        self.lock = threading.Lock()

    def add(self, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes.append(outcome)
            self.outcomes.sort(key=lambda o: o.step.number)
            print(outcome.line(), flush=True)
            record = {key: value for key, value in outcome.record().items() if key != "versions"}
            print(json.dumps(record, default=str), flush=True)
            self.write()

    def write(self) -> None:
        base = str(self.path)
        write_atomic(Path(f"{base}.md"), page(self.circumstances, self.outcomes, self.steps))
        write_atomic(Path(f"{base}.jsonl"), json_lines(self.circumstances, self.outcomes))
        self.mirror()

    def mirror(self) -> None:
        """Copy all steps' output into one file while it is written."""
        parts = []
        for number, folder in sorted(self.logs.items()):
            logs = [folder / f"step-{number}.log", *sorted(folder.glob(f"step-{number}-*.log"))]
            for log in (path for path in logs if path.is_file()):
                text = log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
                parts.append(f"{'=' * 30} {log.stem}\n{text}\n")
        write_atomic(Path(f"{self.path}.log"), "".join(parts))


class Run:
    """seconds: time limit of all steps together."""

    def __init__(
        self, device: str, work: Path, data: str | None, tokenizer: str | None, seconds: float,
        report: Report,
    ) -> None:  # fmt: skip
        self.device, self.work, self.report = device, work, report
        self.data, self.tokenizer = (p and str(Path(p).resolve()) for p in (data, tokenizer))
        self.until = time.monotonic() + seconds
        self.cores = len(os.sched_getaffinity(0))
        self.running: set[Process] = set()

    def all(self, steps: Sequence[Step], together: bool) -> None:
        planned = sum(max(s.seconds for s in group) for group in in_turn(steps, together))
        left = self.until - time.monotonic()
        print(f"{len(steps)} steps, about {planned:.0f} s of {left:.0f} s on an H100; log: "
              f"{self.report.path}.log", flush=True)  # fmt: skip
        self.report.write()
        try:
            for group in in_turn(steps, together):
                self.side_by_side(group)
        finally:
            for process in list(self.running):
                process.end()
            self.report.write()

    def side_by_side(self, group: Sequence[Step]) -> None:
        threads = [threading.Thread(target=self.one, args=(step, len(group))) for step in group]
        for thread in threads:
            thread.start()
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(MIRROR_SECONDS)
            with self.report.lock:
                self.report.mirror()

    def one(self, step: Step, parallel: int) -> None:
        """Run one step; an exception in this script counts as its failure."""
        try:
            self.report.add(self.outcome_of_step(step, parallel))
        except Exception as error:  # noqa: BLE001
            self.report.add(Outcome(step, "FAIL", [f"{type(error).__name__}: {error}"]))

    def outcome_of_step(self, step: Step, parallel: int) -> Outcome:
        left = self.until - time.monotonic()
        if left < (ENOUGH * step.seconds if self.device == "cuda" else 1):
            why = f"{max(0, left):.0f} s are left (--minutes), it takes about {step.seconds}"
            return Outcome(step, "skipped", [why])
        memory = self.report.circumstances.machine.get("memory_gb")
        if memory is not None and memory < step.gib:
            return Outcome(step, "skipped", [f"needs {step.gib:g} GiB, the device has {memory:g}"])
        step_limit = step.limit * (1 if self.device == "cuda" else CPU_PATIENCE)
        limit = min(step_limit, left)
        threads = max(1, self.cores // min(parallel, 2))
        setup = Setup(self.device, str(self.work), self.data, self.tokenizer, threads, limit)
        answer = self.work / f"step-{step.number}.json"
        log = self.work / f"step-{step.number}.log"
        self.report.logs[step.number] = self.work
        words = "-m", "scripts.gpu_checks.child", step.run, setup.text(), str(answer)
        env = environment(self.work, threads) | OUTPUT
        process = Process([sys.executable, *words], log, env, ROOT)
        self.running.add(process)
        code = process.wait(limit)
        self.running.discard(process)
        if code is None and limit < step_limit:
            code = CUT_OFF
        return outcome_of(step, answer_of(answer), code, process.seconds, self.device)


def in_turn(steps: Sequence[Step], together: bool) -> Iterator[list[Step]]:
    """Groups of steps that run side by side."""
    if not together:
        yield from ([step] for step in steps)
        return
    for alone, group in groupby(steps, key=lambda step: step.alone):
        if alone:
            yield from ([step] for step in group)
        else:
            yield list(group)


def answer_of(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
