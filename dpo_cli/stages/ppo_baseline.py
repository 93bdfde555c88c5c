"""stage=ppo-baseline: PPO on a reward, with a KL penalty to the reference (arXiv 1909.08593).

The reward is a trained reward model or a ground truth (the paper's PPO-GT): `reward_fn`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from dpo_cli.config import PpoConfig, RunConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.data.loader import StepPlan
from dpo_cli.losses.ppo import AdaptiveKl, FixedKl, Normalizer
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.rewards.scoring import load_scorer, scorer_digest, scoring_rows
from dpo_cli.session.lengths import (
    finished_share,
    new_tokens,
    unfinished_line,
    with_new_tokens,
)
from dpo_cli.session.models import Loaded, identity_of, load_policy_and_data, provenance_of
from dpo_cli.session.preview import (
    Preview,
    Row,
    data_rows,
    device_row,
    reference_row,
    trained_model_rows,
)
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.reference import load_reference, policy_loading, reference_path
from dpo_cli.session.rows import begin_training, packed_rows
from dpo_cli.session.sampling import sample_writer
from dpo_cli.session.session import Session
from dpo_cli.session.trained import trained_files
from dpo_cli.session.workload import Workload, sampling_workload
from dpo_cli.stages.ppo_objective import ppo_loss
from dpo_cli.stages.rollout import (
    EVAL_SEED,
    Actors,
    Rollout,
    draw,
    final_scores,
    measure,
    plan_rollouts,
    reference_normalizer,
    roll_out,
    scores_of,
    steps_of_rollout,
    with_samples,
)
from dpo_cli.statistics import mean_and_error
from dpo_cli.train.loop import fit
from dpo_cli.train.task import TrainTask


@dataclass
class Ppo:
    """One run. plan: the prompts of each rollout; rollout: the current one."""

    session: Session
    stage: PpoConfig
    actors: Actors
    prompts: list[EncodedExample]
    held_out: list[EncodedExample]
    plan: StepPlan
    rollout: Rollout = field(default_factory=lambda: Rollout([], [], {}))
    noted: bool = False  # whether truncated completions have been reported

    @property
    def minibatch(self) -> int:
        """Prompts per step."""
        return self.session.config.train.batch_size // self.stage.completions

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.batch_size // self.minibatch

    @property
    def steps_per_rollout(self) -> int:
        return self.steps_per_epoch * self.stage.ppo_epochs

    @property
    def steps(self) -> int:
        return self.plan.steps * self.steps_per_rollout

    def before_step(self, step: int) -> dict[str, float]:
        """Start a new rollout if one is due; returns its figures."""
        number, step_of_rollout = divmod(step, self.steps_per_rollout)
        if step_of_rollout:
            return {}
        chosen = [self.prompts[i] for i in self.plan.indices(number)]
        seed = int(np.random.SeedSequence([self.session.config.seed, number]).generate_state(1)[0])
        self.rollout = roll_out(self.session, self.actors, chosen, self.stage, seed)
        line = unfinished_line(self.rollout.figures["rollout/finished"], new_tokens(self.stage))
        if line and not self.noted:
            self.session.note(line)
            self.noted = True
        return self.rollout.figures

    def batches(self, step: int) -> list[Batch]:
        """Packed rows of one minibatch; every pass over a rollout is shuffled anew."""
        number, within = divmod(step, self.steps_per_rollout)
        epoch, place = divmod(within, self.steps_per_epoch)
        rng = np.random.default_rng([self.session.config.seed, number, epoch])
        order = rng.permutation(len(self.rollout.examples))
        chosen = order[place * self.minibatch : (place + 1) * self.minibatch].tolist()
        return packed_rows(self.session, self.rollout.examples, chosen)

    def carried(self) -> dict[str, Any]:
        """State in a checkpoint beside weights and optimizer."""
        normalizer = self.actors.normalizer
        return {"kl_coef": self.actors.kl.coef, "score": [normalizer.mean, normalizer.std]}


def run(session: Session) -> dict[str, Any]:
    """Alternate between a rollout and training on it for some epochs."""
    loaded = load_policy_and_data(session, policy_loading(session))
    reference = reference_path(session.config, loaded)
    ppo = prepare(session, loaded, reference)
    stage, actors = ppo.stage, ppo.actors
    begin_training(session, loaded.model, ppo.steps)
    task = TrainTask(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        steps=ppo.steps,
        batches=ppo.batches,
        compute_loss=lambda batch: ppo_loss(actors, batch, ppo.rollout, stage),
        evaluate=lambda: evaluate(ppo),
        budget=session.budget,
        on_eval=sample_writer(session, loaded),
        unit="prompts",
        provenance=provenance_of(
            session,
            loaded,
            reward_fn=vars(session.config.reward_fn),
            advantage=stage.advantage,
            target_kl=stage.target_kl if stage.kl_control == "adaptive" else None,
            reference=reference or session.config.model.path or session.config.model.hub_id,
        ),
        files=trained_files(session.config, loaded.splits),
        identity=identity_of(
            loaded,
            reference=actors.reference.digest,
            reward_fn=scorer_digest(actors.score) or "none",
        ),
        heads=actors.value_head,
        heads_lr_scale=stage.value_lr_scale,
        before_step=ppo.before_step,
        save_multiple=ppo.steps_per_rollout,
        carried=ppo.carried,
    )
    fit(task, session)
    samples = ppo.plan.steps * ppo.plan.batch_size * stage.completions
    return {"samples": samples, "gradient_steps": ppo.steps}


def prepare(session: Session, loaded: Loaded, reference: str | None) -> Ppo:
    """Actors, prompts and plan of a run, with the state of its checkpoint if it resumes one."""
    rows = [*loaded.splits.train, *loaded.splits.eval]
    stage = with_new_tokens(cast(PpoConfig, session.config.stage), rows, session.note)
    prompts, held_out = map(distinct_prompts, (loaded.splits.train, loaded.splits.eval))
    actors = build_actors(session, loaded, reference, stage)
    plan = plan_rollouts(session.config, len(prompts))
    ppo = Ppo(session, stage, actors, prompts, held_out[: stage.eval_prompts], plan)
    prepare_state(session, ppo)
    return ppo


def plan(preview: Preview) -> Iterator[Row]:
    config, stage = preview.config, cast(PpoConfig, preview.config.stage)
    critic = "with a critic" if stage.advantage == "gae" else "without a critic"
    yield "stage", f"ppo-baseline, advantages by {stage.advantage}, {critic}"
    yield from scoring_rows(config)
    yield from trained_model_rows(preview)
    yield reference_row(stage.reference)
    yield from data_rows(preview)
    prompts = len(distinct_prompts(preview.splits.train))
    rollouts, steps = plan_rollouts(config, prompts), steps_of_rollout(config)
    samples = f"{rollouts.steps:,} of {stage.rollout_samples:,} completions"
    kl = f"towards {stage.target_kl:g} nats" if stage.kl_control == "adaptive" else "fixed"
    yield "rollouts", f"{samples}, of {prompts:,} distinct prompts"
    yield "steps", f"{rollouts.steps * steps:,}, {steps} after each rollout"
    place = "in the reward" if stage.kl_in == "reward" else f"{stage.kl_estimator} in the loss"
    yield "KL weight", f"{stage.kl_coef:g}, {kl}, {place}"
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    """The workload, with the largest step: that of the longest prompts."""
    stage = cast(PpoConfig, config.stage)
    sampled = sampling_workload(stage, splits)
    longest = sorted(range(len(sampled.lengths)), key=lambda i: sampled.lengths[i][0])
    return replace(sampled, steps=[longest[-(config.train.batch_size // stage.completions) :]])


def build_actors(session: Session, loaded: Loaded, named: str | None, stage: PpoConfig) -> Actors:
    """Policy, frozen reference, for GAE a value head that starts at zero, and the scorer."""
    device = session.runtime.device
    reference = load_reference(session, loaded, named).frozen(device)
    loaded.model.to(device)  # type: ignore[arg-type]
    head = None
    if stage.advantage == "gae":
        width = cast(Any, loaded.model.get_output_embeddings()).weight.shape[1]
        head = torch.nn.Linear(width, 1).to(device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    kl: AdaptiveKl | FixedKl = FixedKl(stage.kl_coef)
    if stage.kl_control == "adaptive":
        kl = AdaptiveKl(stage.kl_coef, stage.target_kl, stage.kl_horizon)
    return Actors(loaded.model, reference, head, loaded.tokenizer, load_scorer(session), kl)


def prepare_state(session: Session, ppo: Ppo) -> None:
    """The score's mean and std and the KL weight, measured or restored from the checkpoint."""
    if session.snapshot is not None:
        carried = session.snapshot.state["carried"]
        ppo.actors.kl.coef = carried["kl_coef"]
        ppo.actors.normalizer = Normalizer(*carried["score"])
    elif ppo.stage.normalize and ppo.stage.normalize_prompts:
        chosen = ppo.prompts[: ppo.stage.normalize_prompts]
        ppo.actors.normalizer = reference_normalizer(session, ppo.actors, chosen, ppo.stage)


def evaluate(ppo: Ppo) -> dict[str, float]:
    """Score and KL on held-out prompts; `loss` is PPO's objective at the initial KL weight.

    Standard errors are over prompts, and left out for a single prompt, which has none.
    """
    if not ppo.held_out:
        return {}
    session, stage, actors = ppo.session, ppo.stage, ppo.actors
    samples = draw(session, actors, actors.policy, ppo.held_out, stage, EVAL_SEED)
    scores = scores_of(actors, ppo.held_out, samples)
    flat = [c for row in samples for c in row]
    completed = with_samples(ppo.held_out, samples)
    tokens = session.within_memory(lambda: measure(session, actors, completed, stage))
    kl, error = mean_and_error([float((t.logprobs - t.reference).sum()) for t in tokens])
    score, score_error = mean_and_error(scores.view(len(samples), -1).mean(1).tolist())
    objective = float(final_scores(actors, scores, flat, stage).mean())
    figures = {
        "loss": stage.kl_coef * kl / stage.completions - objective,
        "score": score,
        "score_se": score_error,
        "kl": kl / stage.completions,
        "kl_se": error / stage.completions,
        "tokens": sum(len(c.ids) for c in flat) / len(flat),
        **finished_share([c.finished for c in flat], len(samples)),
    }
    errors = ("score_se", "kl_se")
    return {k: v for k, v in figures.items() if k not in errors or math.isfinite(v)}
