"""Runs the benchmark's workers in the test's own process.

Importing torch and transformers in each would take most of a minute; that a worker is a
process is tested by `test_bench.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import plan, run
from scripts.bench.job import Job

SMALL = (
    "--layers=1", "--width=32", "--heads=2", "--vocab=64", "--length=40", "--batch=2", "--steps=1",
    "--warmup=1", "--rounds=1", "--threads=1", "--busy-ok", "--json",
)  # fmt: skip
Record = dict[str, Any]
Worker = Callable[..., None]


def in_process(worker: str, files: list[Path], scratch: Path, *_: Any) -> None:
    """Stands in for `launch.run_worker`."""
    scratch.mkdir(parents=True)
    code = import_module(f"scripts.bench.workers.{worker}")
    if worker == "prepare":
        code.prepare(plan.Plan.load(files[0]))
    else:
        job = Job(**json.loads(files[0].read_text()))
        files[1].write_text(json.dumps(code.measure(job)))


def use(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `worker` stand in wherever one is started."""
    for module in (plan, run):
        monkeypatch.setattr(module, "run_worker", worker)


def runner(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, out: Path
) -> Callable[..., Record]:
    """`run("--rounds=2", ...)`: the record that a command of the benchmark prints as JSON."""
    use(in_process, monkeypatch)

    def run(*words: str) -> Record:
        assert command.main([*words, f"--out={out}"]) == 0
        record: Record = json.loads(capsys.readouterr().out.splitlines()[-1])
        return record

    return run


def job_of(**more: Any) -> Job:
    """A job that nothing runs."""
    facts = {
        "task": "dpo", "model": "", "ids": "", "overrides": [], "batch": 2, "warmup": 1, "steps": 1,
        "lr": 0.0, "precision": "fp32", "device": "cpu", "threads": 1, "length": 0, "samples": 0,
        "new_tokens": 0,
    }  # fmt: skip
    return Job(**facts | more)
