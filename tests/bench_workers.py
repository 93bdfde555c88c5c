"""Runs the workers of scripts/bench*.py in the test's own process.

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

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SMALL = (
    "--layers=1", "--width=32", "--heads=2", "--vocab=64", "--length=40", "--batch=2", "--steps=1",
    "--warmup=1", "--rounds=1", "--threads=1", "--busy-ok", "--json",
)  # fmt: skip
Record = dict[str, Any]


def in_process(script: str, files: list[Path], scratch: Path, *_: Any) -> None:
    """Stands in for `bench_run.run_python`."""
    scratch.mkdir(parents=True)
    code = import_module(script.removesuffix(".py"))
    if script == "bench_prepare.py":
        code.prepare(code.Plan.load(files[0]))
    else:
        job = import_module("bench_job").Job(**json.loads(files[0].read_text()))
        files[1].write_text(json.dumps(code.measure(job)))


def runner(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, out: Path
) -> Callable[..., Record]:
    """`run("--rounds=2", ...)`: the record that the script prints as JSON."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(import_module("bench_run"), "run_python", in_process)
    code = import_module(script)

    def run(*words: str) -> Record:
        assert code.main([*words, f"--out={out}"]) == 0
        record: Record = json.loads(capsys.readouterr().out.splitlines()[-1])
        return record

    return run
