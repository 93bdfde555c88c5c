"""The policies of an evaluation: models, runs, their checkpoints, sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dpo_cli.config import EvaluateConfig, ModelConfig, RunConfig
from dpo_cli.durable.provenance import load_provenance
from dpo_cli.durable.stored import stored_json, yaml_of_run
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.model.source import model_folder
from dpo_cli.train.checkpoint import STEP_FOLDER, steps_in

JOBS = "jobs"  # of a sweep: one file {job, overrides, exit_code, run_dir} each

# The keys of a row of points.jsonl, null if unknown; an evaluation may add more.
POINT_KEYS = (
    "method", "setting", "step", "seed", "policy", "kl", "kl_se", "kl_sampled", "kl_sampled_se",
    "reward", "reward_se", "tokens", "finished", "distinct_2", "optimum_reward_at_kl", "shortfall",
    "gradient_steps", "samples",
)  # fmt: skip


@dataclass(frozen=True)
class PolicyPoint:
    """One policy: a model and the cost of its training, as in points.jsonl.

    label: its folder or hub id. setting: overrides in which it differs from others of its sweep,
    such as `beta=0.1`. step, gradient_steps, samples: of its training so far; None if unknown.
    """

    label: str
    source: ModelConfig
    method: str
    setting: str
    step: int | None
    seed: int
    gradient_steps: int | None = None
    samples: int | None = None

    def row(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Its row of points.jsonl."""
        facts = {
            "method": self.method, "setting": self.setting, "step": self.step, "seed": self.seed,
            "policy": self.label, "gradient_steps": self.gradient_steps, "samples": self.samples,
        }  # fmt: skip
        return {**dict.fromkeys(POINT_KEYS), **facts, **figures}


def find_policies(config: RunConfig, note: Callable[[str], None]) -> list[PolicyPoint]:
    """The policies of `stage.policies` (default: the model), checkpoints before the final model.

    Raises ConfigError for a folder that is neither a model nor a finished run nor a sweep.
    """
    stage = cast(EvaluateConfig, config.stage)
    key = "stage.policies" if stage.policies else "model.path"
    entries = stage.policies or ([config.model.path] if config.model.path else [])
    if not entries:
        label = config.model.hub_id or config.model.name
        return [PolicyPoint(label, config.model, stage.method or "policy", "", None, config.seed)]
    folders = [run for entry in entries for run in runs_of(Path(entry), key, note)]
    distinct = {folder.resolve(): folder for folder in folders}
    return [
        point
        for folder in distinct.values()
        for point in points_of(folder, config, stage, key)
    ]  # fmt: skip


def runs_of(folder: Path, key: str, note: Callable[[str], None]) -> list[Path]:
    """The folder itself, or those of a sweep's successful runs; ConfigError if there are none."""
    jobs = sweep_jobs(folder)
    if not jobs:
        return [folder]
    failed = [str(job["job"]) for job in jobs if job["exit_code"] != 0]
    if failed:
        note(f"{folder}: jobs {', '.join(failed)} failed and are skipped")
    if len(failed) == len(jobs):
        raise ConfigError(f"{key}={folder}: every job of this sweep failed")
    return [job_folder(folder, job) for job in jobs if job["exit_code"] == 0]


def sweep_jobs(folder: Path) -> list[dict[str, Any]]:
    """The recorded jobs of a sweep, in order; empty for other folders. Raises DataError."""
    jobs = []
    for path in (folder / JOBS).glob("*.json"):
        try:
            job = json.loads(path.read_text(encoding="utf-8"))
            jobs.append({name: job[name] for name in ("job", "overrides", "exit_code", "run_dir")})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is not a job of a sweep ({error!r})") from error
    return sorted(jobs, key=lambda job: int(job["job"]))


def job_folder(sweep: Path, job: Mapping[str, Any]) -> Path:
    """The job's run folder, inside the sweep's folder even if that was moved."""
    inside = sweep / str(job["job"])
    return inside if inside.is_dir() else Path(job["run_dir"])


def setting_of(run: Path) -> str:
    """`beta=0.1`: the overrides, other than the seed, in which the sweep's jobs differ."""
    jobs = sweep_jobs(run.parent)
    jobs_of_run = [job for job in jobs if job_folder(run.parent, job).resolve() == run.resolve()]
    if not jobs_of_run:
        return ""
    chosen = jobs_of_run[0]["overrides"]
    differing = [
        key
        for key in chosen
        if key != "seed" and any(job["overrides"].get(key) != chosen[key] for job in jobs)
    ]
    return " ".join(f"{key.rpartition('.')[2]}={chosen[key]}" for key in differing)


def points_of(
    folder: Path, config: RunConfig, stage: EvaluateConfig, key: str
) -> list[PolicyPoint]:
    """The model in `folder`; with `stage.checkpoints` also the earlier ones of its run."""
    weights = model_folder(str(folder), key)
    run, step = run_of(weights)
    cost = training_cost(run)
    last = cost.get("step") if step is None else step
    method = stage.method or method_of(load_provenance(weights))
    setting, seed = setting_of(run), seed_of(run, config.seed)

    def point(path: Path, at: int | None) -> PolicyPoint:
        source = replace(config.model, path=str(path))
        gradient_steps, samples = _share(cost, "gradient_steps", at), _share(cost, "samples", at)
        return PolicyPoint(
            str(path), source, method, setting, at, seed, gradient_steps, samples
        )  # fmt: skip

    earlier = []
    if stage.checkpoints and step is None:
        steps = [n for n in steps_in(run / "checkpoints") if n != last]
        earlier = [point(run / "checkpoints" / f"step-{n}", n) for n in steps]
    return [*earlier, point(folder, last)]


def run_of(weights: Path) -> tuple[Path, int | None]:
    """(run folder, step) of a model folder; step is None unless it is a checkpoint."""
    match = STEP_FOLDER.fullmatch(weights.name)
    if match and weights.parent.name == "checkpoints":
        return weights.parent.parent, int(match[1])
    return (weights.parent if weights.name == "final" else weights), None


def training_cost(run: Path) -> dict[str, int]:
    """{step, gradient_steps, samples} at a run's end, as far as recorded. Raises DataError."""
    cost: dict[str, int] = {}
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8").split("\n")
        try:
            steps = [int(json.loads(line)["step"]) for line in lines if line.endswith("}")]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{metrics}: is invalid ({error!r}); restore it") from error
        cost["step"] = cost["gradient_steps"] = max(steps, default=0)  # one gradient per step
    known = stored_json(run / "summary.json")
    names = ("gradient_steps", "samples")
    return cost | {n: known[n] for n in names if isinstance(known.get(n), int)}


def _share(cost: Mapping[str, int], name: str, step: int | None) -> int | None:
    """The cost up to a step, which grows linearly over a run."""
    if name not in cost or step is None or not cost.get("step"):
        return cost.get(name)
    return round(cost[name] * step / cost["step"])


def method_of(provenance: Mapping[str, Any]) -> str:
    """The stage, or the loss of a stage of preference losses, or PPO's advantage, if it is another
    one than DPO's or PPO's own."""
    loss, stage = provenance.get("loss", "sigmoid"), str(provenance.get("stage") or "policy")
    if loss == "sigmoid":
        advantage = provenance.get("advantage", "gae")
        return stage if advantage == "gae" else str(advantage)
    return f"online-{loss}" if stage == "online-dpo" else str(loss)


def seed_of(run: Path, default: int) -> int:
    seed = yaml_of_run(run / "config.yaml").get("seed")
    return seed if isinstance(seed, int) else default


def reference_of(stage: EvaluateConfig, points: Sequence[PolicyPoint]) -> str | None:
    """`stage.reference`, otherwise the reference recorded in the policies' training, if any.

    Raises ConfigError if they were trained against different ones.
    """
    if stage.reference is not None:
        return stage.reference
    references: dict[str, tuple[str, str]] = {}  # folder -> as recorded by a policy, that policy
    for point in points:
        recorded = load_provenance(model_folder(point.source.path)).get("reference") \
            if point.source.path else None  # fmt: skip
        if recorded:
            folder = str(Path(recorded).resolve()) if Path(recorded).is_dir() else recorded
            references.setdefault(folder, (recorded, point.label))
    if len(references) > 1:
        (first, one), (second, other) = list(references.values())[:2]
        raise ConfigError(
            f"stage.reference=null: {one} was trained against {first} but {other} against "
            f"{second}; set stage.reference to the reference of the KL"
        )
    return next(iter(references.values()))[0] if references else None
