"""stage=frontier: several evaluations in one plot, and a comparison of their methods."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from dpo_cli.config import FrontierConfig
from dpo_cli.durable import write_text
from dpo_cli.durable.redact import redact
from dpo_cli.errors import DataError
from dpo_cli.evaluation.methods import (
    Curves,
    Summary,
    budgets,
    costs_table,
    leads,
    mean_curve,
    rewards_table,
    summarize,
)
from dpo_cli.evaluation.points import (
    BEST_OF,
    OPTIMUM,
    Point,
    distinct_folders,
    measured_once,
    read_points,
    refuse_mixed,
)
from dpo_cli.report.files import write_redacted_json
from dpo_cli.report.frontier import Band, Cloud, draw_frontier
from dpo_cli.report.table import Column, Table
from dpo_cli.session.preview import Preview, Row
from dpo_cli.session.session import Session

AT_REFERENCE = 1e-3  # nats: below this KL a method is the reference itself
COLUMNS = (
    "method", "seed", "setting", "step", "kl", "reward", "kl_se", "reward_se",
    "optimum_reward_at_kl", "shortfall", "gradient_steps", "samples", "beyond_optimum",
)  # fmt: skip


def run(session: Session) -> dict[str, Any]:
    """Write frontier.{csv,md,json} and its plot; returns metrics per method. Raises DataError."""
    stage = cast(FrontierConfig, session.config.stage)
    folders = distinct_folders(stage.evaluations)
    refuse_mixed(folders)
    rows = [row for folder in folders for row in read_points(folder)]
    without_kl = sum(row["kl"] is None for row in rows)
    without_reward = sum(row["reward"] is None for row in rows)
    if without_reward:
        session.note(f"{without_reward} points have no reward and are dropped")
    rows = [row for row in rows if row["kl"] is not None and row["reward"] is not None]
    if not rows:
        raise DataError(
            "stage.evaluations: none of them measured the KL; evaluate with "
            "stage.reference=<folder> and stage.temperature=1.0"
        )
    if without_kl:
        session.note(f"{without_kl} points have no KL and are dropped")
    rows = measured_once(rows, session.note)
    table = [[row.get(name) for name in COLUMNS] for row in redact(rows)]
    write_text(session.run_dir / "frontier.csv", Table("", [*map(Column, COLUMNS)], table).csv())
    curves = optimum_curves(rows)
    trained = by_method(rows)
    best_of = [row for row in rows if row["method"] == BEST_OF]
    if session.config.logger.plots:
        draw_frontier(
            session.run_dir,
            [cloud(name, points) for name, points in trained.items()],
            cloud(BEST_OF, mean_over_seeds(best_of)) if best_of else None,
            band(curves) if curves else None,
        )
    kls = budgets([row["kl"] for points in trained.values() for row in points] or [1.0])
    summaries = [summarize(name, points, kls) for name, points in trained.items()]
    bounds = [summarize(BEST_OF, best_of, kls)] if best_of else []
    report(session, [*summaries, *bounds], verdicts(summaries, kls), kls, curves)
    return figures([*summaries, *bounds])


def plan(preview: Preview) -> Iterator[Row]:
    """The evaluations and their points. ConfigError if they cannot be plotted together."""
    folders = distinct_folders(cast(FrontierConfig, preview.config.stage).evaluations)
    refuse_mixed(folders)
    counts = {folder: len(read_points(folder)) for folder in folders}
    yield "stage", "frontier"
    yield "evaluations", f"{len(counts):,}, {sum(counts.values()):,} points"
    for folder, points in counts.items():
        yield "", f"{folder}: {points:,}"


def by_method(rows: Sequence[Point]) -> dict[str, list[Point]]:
    """Trained policies by method, in order of appearance."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if row["method"] not in (OPTIMUM, BEST_OF):
            groups[str(row["method"])].append(row)
    return dict(groups)


def optimum_curves(rows: Sequence[Point]) -> Curves:
    """One curve per evaluation that measured it, from the reference at KL 0 (best of 1)."""
    by_evaluation: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        start = row["method"] == BEST_OF and row["setting"] == "n=1"
        if row["method"] == OPTIMUM or start:
            error = row["reward_se"]
            point = (float(row["kl"]), float(row["reward"]), math.nan if error is None else error)
            by_evaluation[row["evaluation"]].append(point)
    return [sorted(curve) for curve in by_evaluation.values() if len(curve) > 1]


def band(curves: Curves) -> Band:
    kl, reward, low, high = mean_curve(curves)
    return Band(kl, reward, low, high, seeds=len(curves))


def cloud(name: str, rows: Sequence[Point]) -> Cloud:
    """Arrays to plot. A point is `last` if it has the largest step of its run, which is identified
    by evaluation, seed and setting."""
    ends: dict[tuple[Any, ...], float] = {}
    runs = [(row.get("evaluation"), row.get("seed"), row.get("setting")) for row in rows]
    steps = [math.inf if row.get("step") is None else float(row["step"]) for row in rows]
    for run_, step in zip(runs, steps, strict=True):
        ends[run_] = max(step, ends.get(run_, 0.0))

    def column(key: str) -> np.ndarray:
        return np.array([math.nan if row.get(key) is None else row[key] for row in rows], float)

    labels = (
        tuple(str(row["setting"]).removeprefix("n=") for row in rows) if name == BEST_OF else ()
    )
    last = np.array([ends[run_] == step for run_, step in zip(runs, steps, strict=True)])
    errors = (np.nan_to_num(column(key)) for key in ("kl_se", "reward_se"))
    kl_se, reward_se = errors
    return Cloud(name, column("kl"), kl_se, column("reward"), reward_se, last, labels)


def mean_over_seeds(rows: Sequence[Point]) -> list[Point]:
    """Best-of-n of several evaluations: one point per n, the mean reward."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        groups[str(row["setting"])].append(row)
    return [
        {**group[0], "reward": sum(row["reward"] for row in group) / len(group), "step": None}
        for group in groups.values()
    ]


def verdicts(summaries: Sequence[Summary], kls: Sequence[float]) -> list[str]:
    """A sentence per KL: which method leads, and whether by more than chance."""
    lines = []
    moved = [s for s in summaries if s.kl[1] > AT_REFERENCE]  # not the reference itself
    for lead in leads(moved, kls):
        leader, margin = f"Up to a KL of {lead.kl:g}: {lead.first}", f"{lead.margin:.3f}"
        if not math.isfinite(lead.se):
            lines.append(f"{leader} leads {lead.second}, by {margin} (standard error unknown).")
        elif lead.margin > 2 * lead.se:
            lines.append(f"{leader} leads {lead.second}, by {margin} ± {lead.se:.3f}.")
        else:
            lines.append(f"{leader} is level with {lead.second} ({margin} ± {lead.se:.3f} higher).")
    return lines


def report(
    session: Session, summaries: Sequence[Summary], findings: Sequence[str], kls: Sequence[float],
    curves: Curves,
) -> None:  # fmt: skip
    """The tables and findings on the console, in frontier.md, and in frontier.json for reports."""
    tables = [rewards_table(summaries, kls, curves), costs_table(summaries)]
    for table in tables:
        session.progress.show(table)
    for line in findings:
        session.note(line)
    verdict = "".join(f"- {line}\n" for line in findings)
    within, costs = (f"{table.caption}\n\n{table.markdown()}" for table in tables)
    parts = ("# Reward against KL to the reference\n", within, verdict, costs)
    write_text(session.run_dir / "frontier.md", "\n".join(part for part in parts if part))
    stored = {"findings": list(findings), "tables": [table.to_json() for table in tables]}
    write_redacted_json(session.run_dir / "frontier.json", stored)


def figures(summaries: Sequence[Summary]) -> dict[str, Any]:
    """`<method>/<figure>`: its mean shortfall, best point and cost."""
    values: dict[str, Any] = {}
    for s in summaries:
        facts = {
            "best_reward": s.best["reward"], "best_kl": s.best["kl"],
            "best_setting": s.best.get("setting") or None,
            "mean_shortfall": s.shortfall and s.shortfall[0],
            "samples": s.samples, "gradient_steps": s.gradient_steps,
        }  # fmt: skip
        values |= {f"{s.name}/{key}": value for key, value in facts.items() if value is not None}
    return values
