"""The results as log lines, JSON and a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.common import markdown_row as row
from scripts.gpu_checks.facts import judge, shown
from scripts.gpu_checks.steps import Step

CELL = 230  # characters of a table cell
CUT_OFF = 1000  # no process ends with it


@dataclass
class Outcome:
    """status: ok, FAIL or skipped. why: reasons of the last two."""

    step: Step
    status: str
    why: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        head = f"{self.step.number:>2}  {self.step.name:26} {self.status:8} {self.seconds:5.0f} s"
        return f"{head}  {self.summary()}"[:200]

    def summary(self) -> str:
        if self.status != "ok":
            return "; ".join(self.why)
        return "; ".join(f"{name} {shown(value)}" for name, value in self.facts.items())

    def record(self) -> dict[str, Any]:
        values = {k: v for k, v in asdict(self).items() if k != "step"}
        return {"step": self.step.number, "name": self.step.name, **values}


def outcome_of(
    step: Step, answer: Mapping[str, Any] | None, code: int | None, seconds: float, device: str
) -> Outcome:
    """code: exit code of the check's process; None if it was killed at its time limit, CUT_OFF at
    that of all steps."""
    answer = answer or {}
    facts = answer.get("facts", {})
    outcome = Outcome(step, "ok", facts=facts, versions=answer.get("versions", {}), seconds=seconds)
    if answer.get("skipped"):
        outcome.status, outcome.why = "skipped", [answer["skipped"]]
        return outcome
    verdict = judge(step.expected, facts, device)
    if code == CUT_OFF:  # facts that are missing by then have not failed
        late, outcome.why = f"cut off after {seconds:.0f} s by --minutes", verdict.wrong
        outcome.status = "FAIL" if outcome.why else "skipped"
        outcome.why.insert(0, late)
        return outcome
    outcome.why, outcome.notes = verdict.failures, verdict.notes
    if code is None:
        outcome.why.insert(0, f"killed after {seconds:.0f} s")
    elif answer.get("error"):
        outcome.why.insert(0, answer["error"])
    elif code:
        outcome.why.insert(0, f"its process ended with code {code}")
    outcome.status = "FAIL" if outcome.why else "ok"
    return outcome


@dataclass(frozen=True)
class Circumstances:
    """Provenance of a run of the script. machine: the device and its known properties."""

    command: str
    date: str
    commit: str
    device: str
    machine: Mapping[str, Any]


def page(circumstances: Circumstances, outcomes: Sequence[Outcome], steps: Sequence[Step]) -> str:
    """Markdown of the results so far."""
    by_number = {outcome.step.number: outcome for outcome in outcomes}
    machine = circumstances.machine
    name = machine["name"] if circumstances.device == "cuda" else f"CPU ({machine['cpu']})"
    versions: dict[str, str] = {}
    for outcome in outcomes:
        versions |= outcome.versions
    failed = sum(o.status == "FAIL" for o in outcomes)
    lines = [
        f"# gpu-check: {name}", "",
        f"`{circumstances.command}`", "",
        f"{circumstances.date}, commit {circumstances.commit}; "
        + ", ".join(f"{k} {v}" for k, v in machine.items() if v not in (None, "")) + ".", "",
        "Versions in the processes that were measured: "
        + (", ".join(f"{k} {v}" for k, v in versions.items()) or "none yet") + ".", "",
        f"{len(outcomes)} of {len(steps)} steps done, {failed} failed.", "",
        "Written by `scripts/gpu_check.py`. Estimates were made before any run on a GPU, for an "
        "H100: figures outside are reported but do not fail.", "",
        "| # | step | result | s | seen |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for step in steps:
        outcome = by_number.get(step.number)
        if outcome is None:
            lines.append(row([step.number, step.name, "not run", "", ""]))
        else:
            summary = shortened(outcome.summary())
            cells = [step.number, step.name, outcome.status, f"{outcome.seconds:.0f}", summary]
            lines.append(row(cells))
    if circumstances.device == "cpu":
        lines += ["", "On a CPU every step has a small form: its figures say nothing about speed."]
    for step in steps:
        if step.number in by_number:
            lines += ["", *section(step, by_number[step.number])]
    return "\n".join(lines) + "\n"


def section(step: Step, outcome: Outcome) -> list[str]:
    heading = f"## {step.number}. {step.name}: {outcome.status}"
    lines = [heading, "", f"{step.checks[0].upper()}{step.checks[1:]}.", ""]
    notes = [f"- {outcome.status}: {why}" for why in outcome.why]
    notes += [f"- outside the estimate: {note}" for note in outcome.notes]
    lines += [*notes, ""] if notes else []
    expected = "; ".join(expect.bounds() for expect in step.expected)
    lines += [f"Expected: {expected}.", ""] if expected else []
    if outcome.facts:
        lines += ["| seen | |", "|---|---|"]
        lines += [row([name, shown(value)]) for name, value in outcome.facts.items()]
    while lines[-1] == "":
        lines.pop()
    return lines


def shortened(text: str) -> str:
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def json_lines(circumstances: Circumstances, outcomes: Sequence[Outcome]) -> str:
    """The circumstances, then one line per step."""
    rows = [asdict(circumstances), *(outcome.record() for outcome in outcomes)]
    return "".join(json.dumps(row, default=str) + "\n" for row in rows)
