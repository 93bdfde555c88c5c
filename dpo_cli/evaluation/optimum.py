"""The exact optimum and best-of-N in an evaluation, from samples of the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dpo_cli.config import EvaluateConfig, RewardFnConfig
from dpo_cli.data.dataset import fingerprint
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.evaluation import frontier
from dpo_cli.evaluation.frontier import Curve
from dpo_cli.evaluation.policies import POINT_KEYS
from dpo_cli.model.digest import loaded_digest
from dpo_cli.records import EncodedExample
from dpo_cli.report.files import write_redacted_json
from dpo_cli.session.session import Session

FILE = "optimum.json"
ARRAYS = [f.name for f in fields(Curve) if f.name != "reference_reward"]
# Entries of `identity` -> message if they differ.
SAME = {
    "prompts": "its prompts differ (data, seed or stage.prompts)",
    "reference": "its stage.reference differs",
    "reward_fn": "its reward_fn differs",
    "temperature": "its stage.temperature differs",
    "max_new_tokens": "its stage.max_new_tokens differs",
}


@dataclass(frozen=True)
class Optimum:
    """The curve, and (prompts, samples) rewards if it was measured by this evaluation."""

    curve: Curve
    rewards: np.ndarray | None = None


def identity(
    stage: EvaluateConfig, reward_fn: RewardFnConfig, weights: str | None,
    reference: PreTrainedModel, examples: list[EncodedExample],
) -> dict[str, str]:  # fmt: skip
    """Everything that the optimum depends on (see `SAME`), as strings and digests.

    weights: digest of the reward's model, if it has one.
    """
    prompts = [replace(e, response_ids=()) for e in examples]
    scorer = {k: v for k, v in asdict(reward_fn).items() if k != "batch_size"}
    if scorer.get("path"):
        scorer["path"] = str(Path(scorer["path"]).resolve())
    if weights is not None:
        scorer["weights"] = f"sha256 {weights}"
    return {
        "prompts": f"{len(prompts)}, sha256 {fingerprint(prompts)}",
        "reference": f"sha256 {loaded_digest(reference)}",
        "reward_fn": json.dumps(scorer, sort_keys=True),
        "temperature": str(stage.temperature),
        "max_new_tokens": str(stage.max_new_tokens),
    }


def measure(
    session: Session, stage: EvaluateConfig, rewards: np.ndarray, identity: Mapping[str, str]
) -> Optimum:
    """The curve of (P, N) rewards of reference samples, written to optimum.json. DataError for
    non-finite rewards."""
    if not np.isfinite(rewards).all():
        raise DataError(f"reward_fn={session.config.reward_fn.name}: some rewards are non-finite")
    curve = frontier.optimum_curve(rewards)
    write_redacted_json(session.run_dir / FILE, {
        "prompts": rewards.shape[0],
        "samples": rewards.shape[1],
        "least_ess": frontier.TRUSTED_SAMPLES,
        "reference_reward": curve.reference_reward,
        **{name: getattr(curve, name).tolist() for name in ARRAYS if name != "values"},
        "value_se": curve.value_se.tolist(),
        "identity": dict(identity),
        "values": curve.values.tolist(),
    })  # fmt: skip
    session.note(
        f"optimum: known up to a KL of {curve.kl[-1]:.2f}, reward {curve.reward[-1]:.3f} "
        f"({rewards.shape[1]} samples of the reference per prompt)"
    )
    return Optimum(curve, rewards)


def load(folder: str, identity: Mapping[str, str]) -> Optimum:
    """The curve of an earlier evaluation. ConfigError unless that had the same prompts, reference,
    reward and sampling settings; DataError for an invalid file."""
    path, key = Path(folder) / FILE, f"stage.optimum={folder}"
    if not path.is_file():
        raise ConfigError(
            f"{key}: has no {FILE}; set it to the folder of a stage=evaluate run with "
            "stage.reference_samples"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        arrays = {name: np.array(stored[name], dtype=float) for name in ARRAYS}
        before, start = stored["identity"], float(stored["reference_reward"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is invalid ({error!r}); run that evaluation again") from error
    differing = [SAME[name] for name in SAME if before.get(name) != identity[name]]
    if differing:
        raise ConfigError(f"{key}: is the optimum of another evaluation: {', '.join(differing)}")
    return Optimum(Curve(**arrays, reference_reward=start))


def shortfall(optimum: Optimum, rewards: np.ndarray, kls: np.ndarray) -> dict[str, float | bool]:
    """A policy's distance to the optimum at its own KL. rewards, kls: (P,) of the policy."""
    best = frontier.optimum_reward_at_kl(optimum.curve, float(kls.mean()))
    return {
        "optimum_reward_at_kl": best.reward,
        "shortfall": best.reward - float(rewards.mean()),
        "shortfall_se": frontier.shortfall_error(optimum.curve, rewards, kls),
        "beyond_optimum": best.beyond,
    }


def point_rows(
    optimum: Optimum, best_of: list[int], label: str, seed: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of points.jsonl: the optimum at each beta, best-of-n (the reference itself is n=1)."""
    if optimum.rewards is None:
        return []
    shared = {**dict.fromkeys(POINT_KEYS), "policy": label, "seed": seed}
    return [
        *({**shared, **row} for row in optimum_rows(optimum.curve)),
        *({**shared, **row} for row in best_of_rows(optimum.curve, optimum.rewards, best_of, note)),
    ]


def optimum_rows(curve: Curve) -> list[dict[str, Any]]:
    names = ("kl", "kl_se", "reward", "reward_se", "ess")
    return [
        {"method": "optimum", "setting": f"beta={beta:.4g}",
         **{name: float(getattr(curve, name)[i]) for name in names}}
        for i, beta in enumerate(curve.betas)
    ]  # fmt: skip


def best_of_rows(
    curve: Curve, rewards: np.ndarray, sizes: list[int], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of best-of-n; `kl` is the upper bound log n - (n - 1)/n."""
    samples = rewards.shape[1]
    too_large = sorted(n for n in set(sizes) if n > samples)
    if too_large:
        note(
            f"stage.best_of: {', '.join(map(str, too_large))} dropped, as stage.reference_samples="
            f"{samples} is lower"
        )
    rows = []
    for n in sorted({1, *sizes}.difference(too_large)):
        values = frontier.best_of(rewards, n)
        bound, reward = frontier.best_of_kl_bound(n), float(values.mean())
        best = frontier.optimum_reward_at_kl(curve, bound)
        rows.append({
            "method": "best-of-n", "setting": f"n={n}", "kl": bound, "reward": reward,
            "reward_se": frontier.standard_error(values), "optimum_reward_at_kl": best.reward,
            "shortfall": best.reward - reward, "beyond_optimum": best.beyond,
        })  # fmt: skip
    return rows
