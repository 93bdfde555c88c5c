"""Ratios over the rounds, ours to theirs: which sides are compared, and by how much they differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scripts.bench.equal import Results
from scripts.bench.job import Job
from scripts.bench.sides import PEER, STANDARD, Side

CACHED = "precompute_ref_log_probs"


def roles_of(job: Job, sides: Sequence[Side], results: Results) -> dict[str, str]:
    """default, best, best-live -> the other side's settings in that role, if any. The fastest
    candidate is the best; best-live is the fastest with the reference computed in the loop."""
    peer = PEER[job.task]
    ratios_by_name = {role: f"{peer}-{role}" for role in STANDARD if f"{peer}-{role}" in results}
    others = [s for s in sides if s.name.startswith(peer) and s.name in results]
    tried = [s for s in others if s.name not in ratios_by_name.values()]
    live = [s for s in tried if job.task == "dpo" and not s.settings.get(CACHED)]
    cached = [s for s in tried if s not in live]
    for role, names in (("best", cached), ("best-live", live)):
        if names and role not in ratios_by_name:
            ratios_by_name[role] = max(
                (s.name for s in names), key=lambda name: speed(results, name)
            )
    return ratios_by_name


def speed(results: Results, name: str) -> float:
    return statistics.median(row["per_second"] for row in results[name])


def ratios(job: Job, roles: dict[str, str], results: Results) -> dict[str, dict[str, float]]:
    """Speed (higher is better) and memory (lower is better), only of measured sides."""
    ratios_by_name: dict[str, dict[str, float]] = {}
    for role in ("default", "best"):
        if "ours" in results and role in roles:
            for key, figure in (("ratio", "per_second"), ("memory_ratio", "peak_memory_mb")):
                ratios_by_name[f"{key}_vs_trl_{role}"] = ratio(results, "ours", roles[role], figure)
    for role in ("default", "best-live"):
        if "ours-live" in results and role in roles:
            key = f"ratio_live_vs_trl_{role.replace('-', '_')}"
            ratios_by_name[key] = ratio(results, "ours-live", roles[role], "per_second")
    for name in results:
        if name.startswith("ours-") and name != "ours-live" and "best" in roles:
            ratios_by_name[f"ratio_{name}_vs_trl_best"] = ratio(
                results, name, roles["best"], "per_second"
            )
    if job.task == "dpo":
        ratios_by_name |= one_epoch_ratio(job, roles, results)
    return ratios_by_name


def one_epoch_ratio(
    job: Job, roles: dict[str, str], results: Results
) -> dict[str, dict[str, float]]:
    """Compared with the other side's fastest setting for one epoch, cached or live."""
    theirs = [roles[role] for role in ("best", "best-live") if role in roles]
    if "ours" not in results or not theirs:
        return {}
    return {"ratio_one_epoch_vs_trl_best": spread([
        one_epoch(job, ours) / max(one_epoch(job, results[name][i]) for name in theirs)
        for i, ours in enumerate(results["ours"])
    ])}  # fmt: skip


def job_rows(job: Job) -> int:
    return job.total_steps * job.batch


def one_epoch(job: Job, result: dict[str, Any]) -> float:
    """Pairs per second over one epoch, including the pass over the reference."""
    rows = job_rows(job)
    return rows / (rows / result["per_second"] + (result["reference_seconds"] or 0.0))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(results: Results, ours: str, other: str, key: str) -> dict[str, float]:
    """Ratio of the two sides within each round."""
    pairs = zip(results[ours], results[other], strict=True)
    return spread([a[key] / b[key] for a, b in pairs])


def over(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """One figure over the rounds."""
    return spread([row[key] for row in rows])
