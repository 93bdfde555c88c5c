"""Summarize the results of the rounds in one record: figures, ratios, and how to repeat them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean
from typing import Any

from scripts.bench.equal import Failures, Results, agreement, drop_unequal
from scripts.bench.job import Job
from scripts.bench.plan import Plan
from scripts.bench.ratios import job_rows, one_epoch, over, ratios, roles_of, spread
from scripts.bench.sides import PEER, UNITS, Side
from scripts.common import commit, cpu_model, shown_command

Record = dict[str, Any]
SETTINGS = ("batch", "warmup", "steps", "lr", "threads", "length", "samples", "new_tokens",
            "devices")  # fmt: skip
FIGURES = {  # of --json's `results` -> of a side's facts
    "per_second": "per_second",
    "tflops": "tflops_per_second",
    "mfu": "mfu",
    "peak_memory_mb": "peak_memory_mb",
    "reference_seconds": "reference_seconds",
    "startup_seconds": "startup_seconds",
}
NOTHING = dict.fromkeys((*FIGURES, "tokens_per_second", "failure"))


@dataclass
class Measured:
    """Outcome of the sides. results: of those that count; failures: why others do not, because they
    failed or compute something else; searched: the table of a search; work: a result of ours with
    the counts of a step's work, {} if there is none."""

    sides: list[Side]
    results: Results
    failures: Failures
    searched: list[dict[str, Any]]
    work: dict[str, Any]

    def equal(self, precision: str) -> Results:
        """Keep the results that count; `failures` then has the reasons for the others."""
        return drop_unequal(self.results, precision, self.failures)

    def peer_missing(self, job: Job) -> str | None:
        """Why none of the other side's sides could be measured, if any was requested."""
        peers = [side.name for side in self.sides if side.name.startswith(PEER[job.task])]
        if not peers or set(peers) & self.results.keys() - self.failures.keys():
            return None
        return self.failures[peers[0]]


def failure(side: Side, measured: Measured) -> dict[str, Any]:
    """A side that does not count, and its logged figures, if any."""
    rows = measured.results.get(side.name)
    return {"name": side.name, "why": measured.failures[side.name], "settings": side.settings,
            "figures_by_step": rows[0]["figures"] if rows else {}}  # fmt: skip


def row_facts(job: Job) -> dict[str, float]:
    """Means over the rows, and the shares of a padded batch that are real, unique or scored."""
    rows = job.rows()
    if job.task == "decode":
        return {"rows": len(rows), "mean_prompt_tokens": mean(len(r["prompt"]) for r in rows)}
    names = ("chosen",) if job.task == "sft" else ("chosen", "rejected")
    real = unique = scored = padded = 0
    for first in range(0, len(rows), job.batch):
        batch = rows[first : first + job.batch]
        lengths = [len(r["prompt"]) + len(r[name]) for r in batch for name in names]
        real += sum(lengths)
        padded += max(lengths) * len(lengths)
        scored += sum(1 if job.task == "reward" else len(r[name]) for r in batch for name in names)
        unique += sum(len(r["prompt"]) + sum(len(r[name]) for name in names) for r in batch)
    means = {f"mean_{n}_tokens": mean(len(r[n]) for r in rows) for n in ("prompt", *names)}
    return {"rows": len(rows), **means, "real_tokens_per_row": real / len(rows),
            "real_to_padded": real / padded, "unique_to_padded": unique / padded,
            "scored_to_padded": scored / padded}  # fmt: skip


def side_facts(
    job: Job, side: Side, results: Sequence[dict[str, Any]], work: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures of one side over the rounds. work: a result of ours."""
    facts: dict[str, Any] = {
        "settings": side.settings,
        "per_second": over(results, "per_second"),
        **compute_facts(work, results, job.devices),
        "peak_memory_mb": over(results, "peak_memory_mb"),
        "memory_before_the_model_mb": over(results, "start_memory_mb"),
        "startup_seconds": spread([startup(r) for r in results]),
        "others_cpu": max(r["others_cpu"] for r in results),
        **{
            key: results[0][key] for key in ("attention", "micro_batch_tokens") if key in results[0]
        },
        "figures_by_step": results[0]["figures"],
    }
    if job.task == "dpo":
        facts["per_second_one_epoch"] = spread([one_epoch(job, r) for r in results])
    if results[0]["reference_seconds"] is not None:
        facts["reference_seconds"] = over(results, "reference_seconds")
        facts["reference_share_of_epoch"] = spread(
            [r["reference_seconds"] * r["per_second"] / job_rows(job) for r in results]
        )
    return facts


def flat(facts: dict[str, Any], tokens: float | None) -> dict[str, float | str | None]:
    """One number per figure of a side. tokens: per row, prompt and response."""

    values = {name: facts[key]["median"] for name, key in FIGURES.items() if key in facts}
    if tokens is not None:
        values["tokens_per_second"] = tokens * values["per_second"]
    return NOTHING | values


def startup(result: dict[str, Any]) -> float:
    """Seconds until the first step was done, without the pass over the reference."""
    return float(result["startup_seconds"] - (result["reference_seconds"] or 0.0))


def compute_facts(
    work: Mapping[str, Any], rows: Sequence[dict[str, Any]], devices: int
) -> dict[str, dict[str, float]]:
    """Model FLOP/s of one side, and their share of the devices' peak if it is known.

    All sides are credited with the work that ours counts: each prompt once, no padding, logits of
    response tokens only, no gradient of frozen weights, and no reference, which is computed
    beforehand. work: a result of ours.
    """
    if not work.get("flops"):
        return {}
    speeds = [work["flops"] / row["seconds"] / 1e12 for row in rows]
    facts = {"tflops_per_second": spread(speeds)}
    if peak := work.get("peak_tflops"):
        facts["mfu"] = spread([speed / (peak * devices) for speed in speeds])
    return facts


def summary(
    name: str, job: Job, plan: Plan, measured: Measured, argv: Sequence[str]
) -> dict[str, Any]:
    """The record that is printed as JSON and stored in the Markdown file."""
    results = measured.equal(job.precision)
    conditions = conditions_of(name, job, plan, len(next(iter(results.values()), [])))
    sides = [side for side in measured.sides if side.name in results]
    roles = roles_of(job, sides, results)
    values = ratios(job, roles, results)
    facts = {s.name: side_facts(job, s, results[s.name], measured.work) for s in sides}
    tokens = conditions["data"].get("real_tokens_per_row")
    return {
        **{key: value["median"] for key, value in values.items()},
        "task": job.task,
        "unit": UNITS[job.task],
        "lora": {"name": job.lora, "r": job.r} if job.lora != "none" else None,
        "losses_agree": agreement(measured.results, job.precision),
        "peer_missing": measured.peer_missing(job),
        "ratios": values,
        "roles": roles,
        "results": {name: flat(of_side, tokens) for name, of_side in facts.items()}
            | {name: NOTHING | {"failure": why} for name, why in measured.failures.items()},
        "sides": facts,
        "failed": [failure(side, measured) for side in measured.sides
                   if side.name in measured.failures],
        "searched": measured.searched,
        **conditions,
        **circumstances(measured.results, "bench.py", argv),
    }  # fmt: skip


def conditions_of(name: str, job: Job, plan: Plan, rounds: int) -> Record:
    """The conditions of a measurement on one set of rows."""
    return {
        "preset": name,
        "device": job.device,
        "precision": job.precision,
        "data": {"label": plan.label(), "sha256": plan.sha256(), **row_facts(job)},
        "shape": vars(plan.shape) | {"context": plan.context},
        "settings": {
            **{key: getattr(job, key) for key in SETTINGS},
            "rounds": rounds, "seed": plan.seed,
        },
    }  # fmt: skip


def circumstances(results: Results, program: str, argv: Sequence[str]) -> Record:
    """Command, date, code, versions and machine."""
    rows = [r for side in results.values() for r in side]
    return {
        "command": shown_command(program, argv),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        **versions_of(results),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "gpu": rows[0]["device_name"] if rows else None,
            "system": f"{platform.system()} {platform.release()}",
            "others_cpu": max((row["others_cpu"] for row in rows), default=0.0),
        },
    }


def versions_of(results: Results) -> dict[str, dict[str, Any]]:
    """Package versions in the measured processes: those of the first side, and differing ones of
    other sides."""
    versions: dict[str, str] = {}
    others: dict[str, dict[str, str]] = {}
    for side, rows in results.items():
        for name, number in (pair for row in rows for pair in row["versions"].items()):
            if versions.setdefault(name, number) != number:
                others.setdefault(side, {})[name] = number
    return {"versions": versions, "other_versions": others}


def json_line(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"))
