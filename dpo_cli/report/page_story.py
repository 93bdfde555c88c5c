"""A run in words: its title, and a sentence on what was done and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dpo_cli.config import STAGES, title_of_stage
from dpo_cli.losses import LOSSES
from dpo_cli.report.numbers import (
    BOUNDS,
    before,
    bracketed,
    count,
    figure,
    interval,
    is_number,
    label,
    lower,
    with_unit,
)
from dpo_cli.report.page_read import Folder, Row

FEW_FINISHED = 0.9  # a smaller share of finished completions is reported
MAX_FINDINGS = 4  # sentences of frontier.json
BY_PREFERENCE = ("dpo", "online-dpo")  # stages that are called by their loss
BASELINES = ("optimum", "best-of-n")  # rows of points.jsonl that are not trained policies


def title_of(folder: Folder) -> str:
    """`DPO of 01-sft on 03-label/train.jsonl`."""
    method = method_of(folder)
    if folder.stage == "frontier":
        return method
    if len(policies := trained(folder.points)) > 1:
        model = count(len(policies), "policy", "policies")
    else:
        model = model_name(folder)
    return f"{method} of {model} on {data_name(folder)}"


def method_of(folder: Folder) -> str:
    if folder.stage not in BY_PREFERENCE:
        return title_of_stage(folder.stage, folder.setting("stage.advantage")) or "Run"
    loss = LOSSES.get(str(folder.setting("stage.loss")))
    name = loss.title if loss else "DPO"
    smoothing = folder.setting("stage.label_smoothing")
    smoothed = name == "DPO" and is_number(smoothing) and smoothing > 0
    return f"{'Online ' * (folder.stage == 'online-dpo')}{'cDPO' if smoothed else name}"


def model_name(folder: Folder) -> str:
    path, hub_id = folder.setting("model.path"), folder.setting("model.hub_id")
    return path_name(str(path)) if path else str(hub_id or folder.setting("model.name", "a model"))


def data_name(folder: Folder) -> str:
    path, hub_id = folder.setting("data.path"), folder.setting("data.hub_id")
    if path and folder.setting("data.name") == "jsonl":  # else the dataset has a name
        return "/".join(part for part in PurePath(str(path)).parts[-2:] if part != "/")
    return str((not path and hub_id) or folder.setting("data.name", "data"))


def path_name(path: str) -> str:
    """The run's name, from its folder or that of a model in it."""
    place = PurePath(path)
    if place.parent.name == "checkpoints":
        return f"{place.parent.parent.name} {place.name.replace('-', ' ')}"
    return place.parent.name if place.name == "final" and place.parent.name else place.name or path


def verdict_of(folder: Folder, data: Mapping[str, Any]) -> str:
    """One sentence in plain words. data: the rows trained on (`train_rows`), if known."""
    if folder.findings:
        return " ".join(folder.findings[:MAX_FINDINGS])
    if folder.sweep:
        clauses = [count(len(folder.sweep), "job")]
    elif len(trained(folder.points)) > 1 or folder.stage == "frontier":
        clauses = _of_points(folder)
    elif folder.stage == "evaluate":
        clauses = [count(len(folder.samples), "completion"), *_of_evaluation(folder)]
    elif folder.stage in ("sample", "label"):
        clauses = [_of_rows(folder.summary)]
    else:
        clauses = [_effort(folder, data), *_of_training(folder.summary), _seen_before(data)]
    clauses = [clause for clause in clauses if clause]
    if not clauses:
        return "The run left no figures."
    line = ": ".join([clauses[0], "; ".join(clauses[1:])]) if clauses[1:] else clauses[0]
    return line[:1].upper() + line[1:] + "."


def _effort(folder: Folder, data: Mapping[str, Any]) -> str:
    steps = f"after {count(folder.last_step, 'step')}" if folder.last_step else ""
    rows = data.get("train_rows")
    unit = spec.unit if (spec := STAGES.get(folder.stage)) else "example"
    seen = f"on {count(rows, unit)}" if isinstance(rows, int) else ""
    return " ".join(filter(None, (steps, seen)))


def _of_training(summary: Row) -> list[str]:
    """Held-out figures, or those of the last steps if no rows were held out."""
    prefix = "eval/" if {"eval/loss", "eval/score"} & summary.keys() else ""
    where = "held-out" if prefix else "training"
    clauses = []
    name = f"{prefix}rewards/accuracies"
    if is_number(summary.get(name)):
        share = f"{figure(name, summary[name])}{bracketed(interval(name, summary))}"
        clauses.append(
            f"the chosen response ranks first in {share} of the {where} pairs"
            f"{bracketed(before(name, summary))}"
        )
    metrics = ("score", "kl") if prefix + "score" in summary else ("loss", "perplexity", "ece")
    for name in (prefix + metric for metric in metrics):
        if is_number(summary.get(name)):
            words = label(name).partition(" (")[0]
            value = f"{with_unit(name, summary[name])}{bracketed(before(name, summary))}"
            clauses.append(f"{lower(words)} {value}")
    return [*clauses, _unfinished(summary, "eval/finished", "rollout/finished")]


def _of_rows(summary: Row) -> str:
    """`2,000 prompts to train on, 100 held out`, of what was sampled or labelled."""
    clauses = []
    for split, use in (("train", "to train on"), ("eval", "held out")):
        for unit in ("prompt", "pair"):
            rows = summary.get(f"{split}_{unit}s")
            clauses += [f"{count(rows, unit)} {use}"] if isinstance(rows, int) else []
    return ", ".join([*clauses, *filter(None, [_unfinished(summary, "train_finished")])])


def _of_evaluation(folder: Folder) -> list[str]:
    summary, clauses = folder.summary, []
    if is_number(summary.get("reward")):
        clauses.append(f"reward {_pair(summary, 'reward')}")
        if is_number(summary.get("kl")):
            clauses[0] += f" at a KL of {_pair(summary, 'kl')} to the reference"
    if is_number(summary.get("accuracy")):
        clauses.append(f"{_pair(summary, 'accuracy')} of the held-out pairs ranked correctly")
    clauses += [_optimum(summary), *_of_win_rates(folder.win_rates)]
    return [*clauses, _unfinished(summary, "finished"), _trained_on(summary)]


def _unfinished(summary: Row, *names: str) -> str:
    """A note if many completions were truncated, as the figures are of their beginnings."""
    share = next((summary[name] for name in names if is_number(summary.get(name))), 1.0)
    truncated = share < FEW_FINISHED
    return f"only {figure('finished', share)} of the completions finished with EOS" * truncated


def _seen_before(data: Mapping[str, Any]) -> str:
    """A note on held-out rows that the run's initial weights had been trained on."""
    seen, rows = data.get("eval_rows_trained_on"), data.get("eval_rows")
    if not (isinstance(seen, int) and isinstance(rows, int)):
        return ""
    return f"{seen:,} of the {count(rows, 'held-out row')} had been trained on before"


def _trained_on(summary: Row) -> str:
    """A note on prompts that were not held out."""
    share = summary.get("trained_share")
    if is_number(share):
        return f"{figure('trained_share', share)} of these prompts were trained on"
    return "these are training prompts" if summary.get("prompts") == "training prompts" else ""


def _of_win_rates(rows: Sequence[Row]) -> list[str]:
    return [
        f"win rate {figure('win_rate', row['win_rate'])}{bracketed(_bounds(row))} against "
        f"{path_name(str(row['opponent']))} "
        f"at temperature {figure('temperature', row.get('temperature'))}"
        for row in rows[:2]
        if is_number(row.get("win_rate")) and "opponent" in row
    ]


def _bounds(row: Row) -> str:
    """The interval of a row of win_rates.json, whose bounds have no prefix."""
    return interval("win_rate", {f"win_rate_{bound}": row.get(bound) for bound in BOUNDS})


def _pair(row: Row, metric: str) -> str:
    return with_unit(metric, row[metric], row.get(f"{metric}_se"))


def _of_points(folder: Folder) -> list[str]:
    policies = trained(folder.points)
    best = best_point(policies)
    if best is None:
        return [count(len(policies), "policy", "policies")]
    highest = f"highest reward {_pair(best, 'reward')}"
    if is_number(best.get("kl")):
        highest += f" at a KL of {_pair(best, 'kl')}"
    policy = f"{highest}, by {point_name(best)}"
    if second := level_with(best, policies):
        policy += f" (no more than level with {point_name(second)}, within the noise)"
    return [count(len(policies), "policy", "policies"), policy, _optimum(best)]


def level_with(best: Row, policies: Sequence[Row]) -> Row | None:
    """The next best policy if it is within twice the error of their difference, or the error is
    unknown."""
    second = best_point([row for row in policies if row is not best])
    if second is None:
        return None
    errors = [row.get("reward_se") for row in (best, second)]
    known = [error for error in errors if is_number(error)]
    ahead = len(known) == 2 and best["reward"] - second["reward"] > 2 * math.hypot(*known)
    return None if ahead else second


def _optimum(row: Row) -> str:
    best = row.get("optimum_reward_at_kl")
    least = "at least " if row.get("beyond_optimum") else ""
    return f"the optimum at that KL has {least}{figure('reward', best)}" if is_number(best) else ""


def trained(points: Sequence[Row]) -> list[Row]:
    return [row for row in points if row.get("method") not in BASELINES]


def best_point(points: Sequence[Row]) -> Row | None:
    rewarded = [row for row in points if is_number(row.get("reward"))]
    return max(rewarded, key=lambda row: row["reward"], default=None)


def point_name(row: Row) -> str:
    """`dpo beta=0.1, step 200`."""
    step = row.get("step")
    parts = [row.get("method") or "a policy", row.get("setting")]
    name = " ".join(str(part) for part in parts if part)
    return f"{name}, step {step:,}" if isinstance(step, int) else name
