"""Where `bench.py --keep FOLDER` finds again what an earlier command has made or measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_job import PACKAGES, Job, installed
from bench_launch import ROOT
from bench_prepare import Plan

ROWS = ("folder", "pairs", "length", "lengths", "prompt_length", "r")  # in their files' names
CODE = ("dpo_cli/**/*.py", "conf/**/*.yaml", "scripts/bench*.py")


def made_in(folder: Path, plan: Plan) -> Path:
    """Of the weights that a plan asks for, and of its rows."""
    facts = {key: value for key, value in asdict(plan).items() if key not in ROWS}
    return folder.absolute() / f"made-{digest(json.dumps(facts))}"


def measured_in(folder: Path, job: Job) -> Path:
    """Of what a job's sides answer: another folder for other code or packages."""
    paths = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    versions = [installed(name) for name in PACKAGES]
    return folder.absolute() / f"measured-{digest(json.dumps([job.text(), code, versions]))}"


def work_of_ours(folder: Path) -> dict[str, Any]:
    """What a side of ours has answered here, in this command or an earlier one; {} if none."""
    for path in sorted(folder.glob("*-ours*/result.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if result.get("flops"):
            return result
    return {}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
