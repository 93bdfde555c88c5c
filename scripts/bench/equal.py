"""Check that the sides compute the same, by the metrics they log in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# precision -> (difference of losses and rewards, relative difference of log-probabilities)
TOLERANCE = {
    "fp32": (1e-3, 1e-4),
    "bf16": (3e-2, 3e-3),
}
Results = dict[str, list[dict[str, Any]]]  # side -> its result in each round
Failures = dict[str, str]  # side -> why it has no result


def compare(a: Mapping[str, Any], b: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Largest differences between the logged figures of two results."""
    loss_limit, logps_limit = TOLERANCE[precision]
    loss = logps = 0.0
    same = a["figures"].keys() == b["figures"].keys()
    finite = all(math.isfinite(x) for r in (a, b) for xs in r["figures"].values() for x in xs)
    for name in a["figures"].keys() & b["figures"].keys():
        for x, y in zip(a["figures"][name], b["figures"][name], strict=True):
            if not name.startswith("logps/"):
                loss = max(loss, abs(x - y))
            else:
                logps = max(logps, abs(x - y) / max(1.0, abs(x)))
    agree = same and finite and loss <= loss_limit and logps <= logps_limit
    return {"agree": agree, "loss": loss, "logps_relative": logps}


def baseline_of(results: Results, precision: str) -> str:
    """The side that agrees with most others. On a tie TRL's defaults, then another of TRL's sides:
    if two sides differ, ours is in doubt."""

    def rank(name: str) -> tuple[int, bool, bool]:
        one = results[name][0]
        agreeing = sum(compare(one, rows[0], precision)["agree"] for rows in results.values())
        return agreeing, name.endswith("-default"), not name.startswith("ours")

    return max(results, key=rank)


def drop_unequal(results: Results, precision: str, failures: Failures) -> Results:
    """Drop the sides whose results differ from the baseline's."""
    if not results:
        return {}
    baseline = baseline_of(results, precision)
    for name, rows in results.items():
        worst = [c for r in rows if not (c := compare(results[baseline][0], r, precision))["agree"]]
        if worst:
            failures[name] = (
                f"does not compute what {baseline} does: losses differ by {worst[0]['loss']:.2g}, "
                f"log-probabilities by {worst[0]['logps_relative']:.2g} of their value"
            )
    return {name: rows for name, rows in results.items() if name not in failures}


def agreement(results: Results, precision: str) -> dict[str, Any]:
    """Every side and round compared with the baseline, in the worst case."""
    baseline = baseline_of(results, precision) if results else None
    every = [row for rows in results.values() for row in rows]
    pairs = [compare(results[baseline][0], row, precision) for row in every] if baseline else []
    return {
        "agree": all(p["agree"] for p in pairs),
        "baseline": baseline,
        "largest_loss_difference": max((p["loss"] for p in pairs), default=0.0),
        "largest_relative_logps_difference": max((p["logps_relative"] for p in pairs), default=0.0),
        "allowed": allowed(precision),
    }


def allowed(precision: str) -> dict[str, float]:
    return dict(zip(("loss", "logps_relative"), TOLERANCE[precision], strict=True))
