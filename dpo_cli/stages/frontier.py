"""stage=frontier: several evaluations in one plot, and a comparison of their methods."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from dpo_cli.config import FrontierConfig
from dpo_cli.durable import write_text
from dpo_cli.errors import DataError
from dpo_cli.evaluation.methods import (
    Estimate,
    Summary,
    budgets,
    leads,
    mean_curve,
    summarise,
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
from dpo_cli.report.compare import csv_text
from dpo_cli.report.files import redact
from dpo_cli.report.frontier import (
    Band,
    Cloud,
    draw_frontier,
    markdown,
    nats,
    rich_table,
    with_error,
)
from dpo_cli.session.preview import Preview, Row
from dpo_cli.session.session import Session

AT_REFERENCE = 1e-3  # nats: a method that stays below is the reference itself
COLUMNS = (
    "method", "seed", "setting", "step", "kl", "reward", "kl_se", "reward_se",
    "optimum_reward_at_kl", "shortfall", "gradient_steps", "samples", "beyond_optimum",
)  # fmt: skip
WITHIN = (
    "Highest reward among a method's points up to a KL: a mean over seeds ± its standard error "
    "(one seed: over prompts). The best of many points is a little too high.\n"
)
SHORTFALL = (
    "Shortfall: the optimum's reward at a point's own KL minus the point's, over its points; ≥ "
    "where the optimum is not known up to that KL. Best-of-n is taken at the bound of its KL. "
    "Samples and gradient steps: of the longest run.\n"
)
Curves = list[list[tuple[float, float, float]]]  # a seed's (KL, reward, its error) in order


def run(session: Session) -> dict[str, Any]:
    """frontier.csv, frontier.md, plots/frontier.png, and the methods' figures."""
    stage = cast(FrontierConfig, session.config.stage)
    folders = distinct_folders(stage.evaluations)
    refuse_mixed(folders)
    rows = [row for folder in folders for row in read_points(folder)]
    unknown = sum(row["kl"] is None for row in rows)
    unrewarded = sum(row["reward"] is None for row in rows)
    if unrewarded:
        session.note(f"{unrewarded} points have no reward and are dropped")
    rows = [row for row in rows if row["kl"] is not None and row["reward"] is not None]
    if not rows:
        raise DataError(
            "stage.evaluations: no KL in any of them; evaluate with stage.reference=<folder> and "
            "stage.temperature=1.0"
        )
    if unknown:
        session.note(f"{unknown} points have no KL and are dropped")
    rows = measured_once(rows, session.note)
    table = [[row.get(name) for name in COLUMNS] for row in redact(rows)]
    write_text(session.run_dir / "frontier.csv", csv_text([COLUMNS, *table]))
    curves = optimum_curves(rows)
    trained = by_method(rows)
    best_of = [row for row in rows if row["method"] == BEST_OF]
    if session.config.logger.plots:
        draw_frontier(
            session.run_dir,
            [cloud(name, own) for name, own in trained.items()],
            cloud(BEST_OF, mean_over_seeds(best_of)) if best_of else None,
            band(curves) if curves else None,
        )
    kls = budgets([row["kl"] for own in trained.values() for row in own] or [1.0])
    summaries = [summarise(name, own, kls) for name, own in trained.items()]
    bounds = [summarise(BEST_OF, best_of, kls)] if best_of else []
    print_tables(session, [*summaries, *bounds], verdicts(summaries, kls), kls, curves)
    return figures([*summaries, *bounds])


def plan(preview: Preview) -> Iterator[Row]:
    """The evaluations and their points. ConfigError where they cannot be drawn together."""
    folders = distinct_folders(cast(FrontierConfig, preview.config.stage).evaluations)
    refuse_mixed(folders)
    counts = {folder: len(read_points(folder)) for folder in folders}
    yield "stage", "frontier"
    yield "evaluations", f"{len(counts):,}, {sum(counts.values()):,} points"
    for folder, points in counts.items():
        yield "", f"{folder}: {points:,}"


def by_method(rows: Sequence[Point]) -> dict[str, list[Point]]:
    """Trained policies by method, in the order they come."""
    found: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if row["method"] not in (OPTIMUM, BEST_OF):
            found[str(row["method"])].append(row)
    return dict(found)


def optimum_curves(rows: Sequence[Point]) -> Curves:
    """One curve per evaluation that measured it, from the reference at KL 0 (best of 1)."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        start = row["method"] == BEST_OF and row["setting"] == "n=1"
        if row["method"] == OPTIMUM or start:
            error = row["reward_se"]
            point = (float(row["kl"]), float(row["reward"]), math.nan if error is None else error)
            found[row["evaluation"]].append(point)
    return [sorted(curve) for curve in found.values() if len(curve) > 1]


def band(curves: Curves) -> Band:
    kl, reward, low, high = mean_curve(curves)
    return Band(kl, reward, low, high, seeds=len(curves))


def cloud(name: str, rows: Sequence[Point]) -> Cloud:
    """last: the largest step of its run, which has an evaluation, a seed and a setting."""
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
    found: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        found[str(row["setting"])].append(row)
    return [
        {**own[0], "reward": sum(row["reward"] for row in own) / len(own), "step": None}
        for own in found.values()
    ]


def verdicts(summaries: Sequence[Summary], kls: Sequence[float]) -> list[str]:
    """A sentence per KL: which method leads, and whether by more than chance."""
    lines = []
    moved = [s for s in summaries if s.kl[1] > AT_REFERENCE]  # not the reference itself
    for lead in leads(moved, kls):
        who, by = f"Up to a KL of {lead.kl:g}: {lead.first}", f"{lead.margin:.3f}"
        if not math.isfinite(lead.se):
            lines.append(f"{who} is before {lead.second}, by {by} (its error is unknown).")
        elif lead.margin > 2 * lead.se:
            lines.append(f"{who} leads {lead.second}, by {by} ± {lead.se:.3f}.")
        else:
            lines.append(f"{who} is level with {lead.second} ({by} ± {lead.se:.3f} above).")
    return lines


def optimum_at(curves: Curves, kl: float) -> Estimate | None:
    """Mean over seeds, None where not all of them reach so far."""
    if not curves or any(curve[-1][0] < kl for curve in curves):
        return None
    known = mean_curve(curves)
    return Estimate(float(np.interp(kl, known[0], known[1])), math.nan)


def print_tables(
    session: Session, summaries: Sequence[Summary], said: Sequence[str], kls: Sequence[float],
    curves: Curves,
) -> None:  # fmt: skip
    """Both tables on the console and in frontier.md."""
    top = [optimum_at(curves, kl) for kl in kls]
    heads = ["method", *(f"KL≤{kl:g}" for kl in kls), "best (at KL)"]
    rewards = [[OPTIMUM, *map(_shown, top), "-"]] if any(top) else []
    rewards += [[s.name, *(_shown(s.within[kl]) for kl in kls), _best(s)] for s in summaries]
    costs = ["method", "points", "seeds", "KL", "mean\nshortfall", "largest", "samples", "steps"]
    rest = [
        [s.name, s.points, s.seeds, f"{nats(s.kl[0])}-{nats(s.kl[1])}", *_shortfalls(s),
         s.samples, s.gradient_steps]
        for s in summaries
    ]  # fmt: skip
    session.progress.show(rich_table("Highest reward up to a KL", heads, rewards))
    session.progress.show(rich_table("Distance to the optimum, and cost", costs, rest))
    for line in said:
        session.note(line)
    verdict = "".join(f"- {line}\n" for line in said)
    parts = (
        "# Reward against KL to the reference\n", WITHIN, markdown(heads, rewards), verdict,
        SHORTFALL, markdown(costs, rest),
    )  # fmt: skip
    write_text(session.run_dir / "frontier.md", "\n".join(part for part in parts if part))


def _shown(at: Estimate | None) -> str:
    return with_error(at.reward, at.se) if at else "-"


def _best(summary: Summary) -> str:
    return f"{with_error(summary.best['reward'])} ({nats(summary.best['kl'])})"


def _shortfalls(summary: Summary) -> tuple[str, str]:
    """Mean and largest."""
    if summary.shortfall is None:
        return "-", "-"
    mean, most = summary.shortfall
    return f"{'≥' * summary.at_least}{mean:.3f}", f"{'≥' * summary.at_least}{most:.3f}"


def figures(summaries: Sequence[Summary]) -> dict[str, Any]:
    """`<method>/<figure>`: its mean shortfall, its best point, what it cost."""
    found: dict[str, Any] = {}
    for s in summaries:
        known = {
            "best_reward": s.best["reward"], "best_kl": s.best["kl"],
            "best_setting": s.best.get("setting") or None,
            "mean_shortfall": s.shortfall and s.shortfall[0],
            "samples": s.samples, "gradient_steps": s.gradient_steps,
        }  # fmt: skip
        found |= {f"{s.name}/{key}": value for key, value in known.items() if value is not None}
    return found
