"""stage=online-dpo: preference losses on pairs of the policy's own completions.

In every round the policy samples, a reward or a judge ranks, and the steps of the round learn from
the pairs. A round of one step is fully online, a longer one semi-online (arXiv 2506.21495).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import HttpJudgeConfig, OnlineDpoConfig, RunConfig
from dpo_cli.config.stages.dpo import reads_reference
from dpo_cli.config.stages.online_dpo import prompts_of_round, steps_of_round
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.data.loader import StepPlan, plan_steps
from dpo_cli.errors import ConfigError
from dpo_cli.evaluation.win_rate import load_judge
from dpo_cli.losses import Comparisons
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.rewards.scoring import load_scorer, scorer_digest, scoring_rows
from dpo_cli.session.balance import balanced
from dpo_cli.session.lengths import with_new_tokens
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
from dpo_cli.stages.dpo import loss_line, own_loss
from dpo_cli.stages.pairing import comparisons, matches_of, most_pairs
from dpo_cli.stages.preference import dpo_loss, sequence_sums
from dpo_cli.stages.rounds import Actors, Round, held_out_figures, new_round
from dpo_cli.train.contents import CARRIED
from dpo_cli.train.loop import fit
from dpo_cli.train.task import TrainTask


@dataclass
class Online:
    """One run. plan: the prompts of each round; current: the round that is learned from."""

    actors: Actors
    prompts: list[EncodedExample]
    held_out: list[EncodedExample]
    plan: StepPlan
    current: Round = field(default_factory=Round)

    @property
    def config(self) -> RunConfig:
        return self.actors.session.config

    @property
    def steps_per_round(self) -> int:
        return steps_of_round(self.config)

    @property
    def steps(self) -> int:
        return self.plan.steps * self.steps_per_round

    def before_step(self, step: int) -> dict[str, float]:
        """Start a new round if one is due; returns its figures."""
        number, step_of_round = divmod(step, self.steps_per_round)
        if step_of_round:
            return {}
        stage, reference = self.actors.stage, self.actors.reference
        moves = stage.reference_every and number and number % stage.reference_every == 0
        if moves and reference is not None:
            follow(reference.model, self.actors.loaded.model, stage.reference_mix)
        examples = [self.prompts[i] for i in self.plan.indices(number)]
        self.current = new_round(self.actors, examples, number)
        return self.current.figures

    def batches(self, step: int) -> list[Batch]:
        """Packed rows of one step: an equal share of the round's examples, which every pass over
        them shuffles anew; none if there are fewer examples than steps."""
        number, within = divmod(step, self.steps_per_round)
        steps = self.steps_per_round // self.actors.stage.round_epochs
        epoch, place = divmod(within, steps)
        rng = np.random.default_rng([self.config.seed, number, epoch])
        examples = self.current.examples
        chosen = np.array_split(rng.permutation(len(examples)), steps)[place].tolist()
        keep_last = self.config.train.router_aux_loss_coef > 0
        return packed_rows(self.actors.session, examples, chosen, keep_last) if chosen else []

    def loss(self, batch: Batch) -> LossOutput:
        actors = self.actors
        return dpo_loss(
            actors.loaded.model, batch, self.reference_of, actors.stage,
            compared_in=self.compared_in,
        )  # fmt: skip

    def reference_of(self, batch: Batch) -> Tensor | None:
        """(E, K) log-probabilities under the reference of the round."""
        if self.actors.reference is None:
            return None
        tokens = torch.cat([self.current.reference[i] for i in batch.places])
        lengths = batch.sequence_lengths.view(-1, batch.branches)
        return sequence_sums(tokens, lengths, self.actors.stage.ld_alpha)

    def compared_in(self, places: Sequence[int]) -> Comparisons | None:
        """The pairs of these examples; None: all of them."""
        if self.actors.stage.pairs == "best_worst":
            return None
        branches = len(self.current.examples[0].response_ids)
        return comparisons([self.current.pairs[i] for i in places], branches)

    def carried_tensors(self) -> dict[str, Tensor]:
        """The weights of a moving reference."""
        reference = self.actors.reference
        if reference is None or self.actors.stage.reference_every is None:
            return {}
        return {name: weight.detach() for name, weight in reference.model.named_parameters()}


def run(session: Session) -> dict[str, Any]:
    """Alternate between sampling pairs and training on them."""
    config = session.config
    loaded = load_policy_and_data(session, policy_loading(session))
    stage = cast(OnlineDpoConfig, config.stage)
    named = reference_path(config, loaded) if reads_reference(stage) else None
    online, identity = prepare(session, loaded, named)
    begin_training(session, loaded.model, online.steps)
    task = TrainTask(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        steps=online.steps,
        batches=online.batches,
        compute_loss=balanced(config, loaded.model, online.loss),
        evaluate=lambda: held_out_figures(online.actors, online.held_out),
        budget=session.budget,
        on_eval=sample_writer(session, loaded),
        unit="prompts",
        provenance=provenance_of(
            session,
            loaded,
            loss=stage.loss,
            beta=stage.beta,
            **{stage.by: vars(config.judge if stage.by == "judge" else config.reward_fn)},
            reference=named or config.model.path or config.model.hub_id,
        ),
        files=trained_files(config, loaded.splits),
        identity=identity,
        before_step=online.before_step,
        save_multiple=online.steps_per_round,
        carried_tensors=online.carried_tensors,
    )
    fit(task, session)
    samples = online.plan.steps * online.plan.batch_size * stage.completions
    return {"samples": samples, "gradient_steps": online.steps}


def prepare(session: Session, loaded: Loaded, named: str | None) -> tuple[Online, dict[str, str]]:
    """The run, in the state of its checkpoint if it resumes one, and its identity."""
    config, device = session.config, session.runtime.device
    rows = [*loaded.splits.train, *loaded.splits.eval]
    stage = with_new_tokens(cast(OnlineDpoConfig, config.stage), rows, session.note)
    prompts, held_out = map(distinct_prompts, (loaded.splits.train, loaded.splits.eval))
    rounds = plan_rounds(config, len(prompts))
    reads = reads_reference(stage)
    reference = load_reference(session, loaded, named).frozen(device) if reads else None
    loaded.model.to(device)  # type: ignore[arg-type]
    score = load_scorer(session) if stage.by == "reward_fn" else None
    judge = load_judge(session, None) if score is None else None
    identity = identity_of(
        loaded,
        reference="none" if reference is None else reference.digest,
        reward_fn="none" if score is None else scorer_digest(score) or "none",
        **own_loss(stage),
    )
    if reference is not None and stage.reference_every is not None:
        restore(session, reference.model, loaded.model)
    actors = Actors(session, stage, loaded, reference, score, judge)
    return Online(actors, prompts, held_out[: stage.eval_prompts], rounds), identity


def plan_rounds(config: RunConfig, prompts: int) -> StepPlan:
    """The prompts of each round, for `train.epochs` over the prompts or `train.max_steps`.

    ConfigError if they are too few for a round, or the judge's calls for the run.
    """
    train, stage, size = config.train, cast(OnlineDpoConfig, config.stage), prompts_of_round(config)
    rounds = None if train.max_steps is None else train.max_steps // steps_of_round(config)
    if rounds is None and prompts * train.epochs < size:
        key = "train.batch_size" if stage.rollout_prompts is None else "stage.rollout_prompts"
        raise ConfigError(
            f"{key}={size}: {prompts} distinct prompts are too few for one round; lower it, or "
            "raise train.epochs"
        )
    found = plan_steps(prompts, size, train.epochs, rounds, train.shuffle, config.seed)
    if stage.by == "judge" and isinstance(config.judge, HttpJudgeConfig):
        calls = found.steps * size * matches_of(stage) * (1 + config.judge.both_orders)
        if calls > config.judge.max_calls:
            raise ConfigError(
                f"judge.max_calls={config.judge.max_calls}: the run asks up to {calls:,} "
                "questions; raise it, or use fewer steps or stage.completions"
            )
    return found


def plan(preview: Preview) -> Iterator[Row]:
    config, stage = preview.config, cast(OnlineDpoConfig, preview.config.stage)
    yield "stage", f"online-dpo, loss {loss_line(stage)}, beta {stage.beta:g}"
    yield from scoring_rows(config)
    yield from trained_model_rows(preview)
    if reads_reference(stage):
        yield reference_row(stage.reference)
    yield from data_rows(preview)
    prompts = len(distinct_prompts(preview.splits.train))
    rounds, steps = plan_rounds(config, prompts), steps_of_round(config)
    size = f"{rounds.batch_size:,} of {prompts:,} distinct prompts x {stage.completions}"
    pairs = f"{rounds.batch_size * most_pairs(stage):,} pairs without ties"
    yield "rounds", f"{rounds.steps:,} of {size} completions, {pairs}"
    yield "steps", f"{rounds.steps * steps:,}, {steps} after each round"
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    """The workload, with the largest step: that of the longest prompts."""
    stage = cast(OnlineDpoConfig, config.stage)
    sampled = sampling_workload(stage, splits)
    longest = sorted(range(len(sampled.lengths)), key=lambda i: sampled.lengths[i][0])
    branches = 2 if stage.pairs == "best_worst" else stage.completions
    lengths = [(prompt, responses[:branches]) for prompt, responses in sampled.lengths]
    return replace(sampled, lengths=lengths, steps=[longest[-config.train.batch_size :]])


def follow(reference: PreTrainedModel, policy: PreTrainedModel, mix: float) -> None:
    """reference = mix * policy + (1 - mix) * reference, TR-DPO's update (arXiv 2404.09656)."""
    with torch.no_grad():
        for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
            old.lerp_(new.to(old.dtype), mix)


def restore(session: Session, reference: PreTrainedModel, policy: PreTrainedModel) -> None:
    """A moving reference's weights from the checkpoint. ConfigError if it cannot move."""
    shapes = [[weight.shape for weight in model.parameters()] for model in (reference, policy)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            "stage.reference_every: stage.reference has other weights than the policy, towards "
            "which it cannot move; use a reference of the same architecture"
        )
    if session.snapshot is not None:
        saved = load_file(session.snapshot.folder / CARRIED)
        with torch.no_grad():
            for name, weight in reference.named_parameters():
                weight.copy_(saved[name])
