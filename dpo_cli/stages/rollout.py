"""Rollouts of PPO: completions of the policy, scored, with advantages for every token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import OnlineDpoConfig, PpoConfig, RunConfig
from dpo_cli.data.loader import StepPlan, plan_steps
from dpo_cli.errors import ConfigError
from dpo_cli.logprobs import Head, promote, target_logprobs
from dpo_cli.losses.ppo import (
    AdaptiveKl,
    FixedKl,
    Normalizer,
    fit_normalizer,
    whiten,
)
from dpo_cli.model.forward import head_of, target_states
from dpo_cli.model.sampling.generate import Completion, SamplingOptions
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.rewards.scorers import Completed, Scorer
from dpo_cli.session.lengths import new_tokens
from dpo_cli.session.reference import Reference
from dpo_cli.session.rows import over_rows
from dpo_cli.session.sampling import completion_text, decoded_together, draw_samples
from dpo_cli.session.session import Session
from dpo_cli.stages.advantages import Tokens, estimate, on_device
from dpo_cli.statistics import mean_and_error

EVAL_SEED = 7_919  # the same random numbers at every evaluation
FALSE_KL = -3.0  # a mean KL this many standard errors below zero is reported as wrong


class Sampler(Protocol):
    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...


@dataclass
class Actors:
    """The models of PPO. value_head: (D,) -> (1,), read at the hidden state of each token; None
    for advantages without a critic."""

    policy: PreTrainedModel
    reference: Reference
    value_head: torch.nn.Linear | None
    tokenizer: PreTrainedTokenizerFast
    score: Scorer
    kl: AdaptiveKl | FixedKl
    normalizer: Normalizer = field(default_factory=Normalizer)


@dataclass
class Rollout:
    """examples: prompts with the sampled completions as responses."""

    examples: list[EncodedExample]
    tokens: list[Tokens]
    figures: dict[str, float]


def steps_of_rollout(config: RunConfig) -> int:
    """Optimizer steps between two rollouts."""
    stage = cast(PpoConfig, config.stage)
    return stage.rollout_samples // config.train.batch_size * stage.ppo_epochs


def plan_rollouts(config: RunConfig, prompts: int) -> StepPlan:
    """The prompts of each rollout, for `train.epochs` over the prompts or `train.max_steps`."""
    train, stage = config.train, cast(PpoConfig, config.stage)
    size = stage.rollout_samples // stage.completions
    rollouts = None if train.max_steps is None else train.max_steps // steps_of_rollout(config)
    if rollouts is None and prompts * train.epochs < size:
        raise ConfigError(
            f"stage.rollout_samples={stage.rollout_samples}: {prompts} distinct prompts are too "
            "few for one rollout; lower it, or raise train.epochs"
        )
    return plan_steps(prompts, size, train.epochs, rollouts, train.shuffle, config.seed)


def at_temperature(head: Head, temperature: float) -> Head:
    """The head with its logits, also soft-capped ones, divided by a temperature."""
    softcap = None if head.softcap is None else head.softcap / temperature
    return replace(head, scale=head.scale / temperature, softcap=softcap)


def values_of(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """(N, D) hidden states -> (N,) float32 values."""
    with torch.autocast(hidden.device.type, enabled=False):  # bf16 would round to 3 digits
        values: Tensor = head(promote(hidden)).squeeze(1)
    return values


def draw(
    session: Session, actors: Sampler, model: PreTrainedModel, examples: Sequence[EncodedExample],
    stage: PpoConfig | OnlineDpoConfig, seed: int, completions: int | None = None,
) -> list[list[Completion]]:  # fmt: skip
    """Completions of each example's prompt, at the stage's temperature."""
    options = SamplingOptions(
        completions=completions or stage.completions,
        temperature=stage.temperature,
        max_new_tokens=new_tokens(stage),
        seed=seed,
        batch_size=decoded_together(session, stage),
    )
    return draw_samples(session, model, actors.tokenizer, [e.prompt_ids for e in examples], options)


def scores_of(
    actors: Actors, examples: Sequence[EncodedExample], samples: Sequence[Sequence[Completion]]
) -> Tensor:
    """(S,) raw scores, in the order of the samples."""
    rows = [c for row in completed(actors.tokenizer, examples, samples) for c in row]
    return torch.tensor(actors.score(rows), dtype=torch.float32)


def completed(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[EncodedExample],
    samples: Sequence[Sequence[Completion]],
) -> list[list[Completed]]:
    """The samples of each prompt as text."""
    return [
        [Completed(e.prompt, completion_text(tokenizer, c.ids), c.finished) for c in row]
        for e, row in zip(examples, samples, strict=True)
    ]


def reference_normalizer(
    session: Session, actors: Actors, examples: Sequence[EncodedExample], stage: PpoConfig
) -> Normalizer:
    """Mean and standard deviation of the score on one reference sample of each prompt."""
    with actors.reference.active() as model:
        samples = draw(session, actors, model, examples, stage, session.config.seed, 1)
    normalizer = fit_normalizer(scores_of(actors, examples, samples))
    session.note(f"reference scores: mean {normalizer.mean:.4g}, std {normalizer.std:.4g}")
    return normalizer


def roll_out(
    session: Session,
    actors: Actors,
    examples: Sequence[EncodedExample],
    stage: PpoConfig,
    seed: int,
) -> Rollout:
    """Sample, score, and run policy and reference on the samples.

    The KL weight is updated afterwards: this rollout's rewards use the previous one.
    """
    started = time.perf_counter()
    samples = draw(session, actors, actors.policy, examples, stage, seed)
    sampled = time.perf_counter()
    raw = scores_of(actors, examples, samples)
    flat = [c for row in samples for c in row]
    scored = time.perf_counter()
    full = with_samples(examples, samples)
    tokens = session.within_memory(lambda: measure(session, actors, full, stage))
    lengths = torch.tensor([len(c.ids) for c in flat])
    coefficient = actors.kl.coef
    scores = final_scores(actors, whiten(raw) if stage.whiten_scores else raw, flat, stage)
    figures = estimate(tokens, scores, lengths, stage, coefficient)
    kl = sequence_kl(session, tokens, lengths)
    actors.kl.update(kl, len(flat))
    finished, count = sum(c.finished for c in flat), int(lengths.sum())
    if stage.no_eos_score is not None and not finished:
        session.note(
            f"no completion ended within stage.max_new_tokens={stage.max_new_tokens}: all get "
            f"stage.no_eos_score={stage.no_eos_score:g}, so nothing is learned from their scores; "
            "increase stage.max_new_tokens, or use stage.no_eos_score=null"
        )
    figures |= {
        "score": float(raw.mean()),
        "kl": kl,
        "kl_coef": coefficient,
        "entropy_nats": -float(torch.cat([t.logprobs for t in tokens]).sum()) / len(flat),
        "rollout/tokens": count / len(flat),
        "rollout/finished": finished / len(flat),
        "rollout/seconds": time.perf_counter() - started,
        "rollout/sampling_seconds": sampled - started,
        "rollout/scoring_seconds": scored - sampled,
        "rollout/tokens_per_second": count / (sampled - started),
    }
    return Rollout(full, on_device(tokens, session.runtime.device), figures)


def sequence_kl(session: Session, tokens: Sequence[Tokens], lengths: Tensor) -> float:
    """Mean KL per completion, in nats; a note if it is significantly negative."""
    logratios = torch.cat([t.logprobs - t.reference for t in tokens])
    return mean_kl(session, [float(part.sum()) for part in logratios.split(lengths.tolist())])


def mean_kl(session: Session, logratios: Sequence[float]) -> float:
    """As `sequence_kl`, of the completions' log-ratios."""
    kl, error = mean_and_error(logratios)
    if kl < FALSE_KL * error:
        session.note(f"KL of {kl:.3f} is below zero: the samples do not come from the policy")
    return kl


def with_samples(
    examples: Sequence[EncodedExample], samples: Sequence[Sequence[Completion]]
) -> list[EncodedExample]:
    """The prompts with their samples as responses."""
    return [
        replace(e, response_ids=tuple(c.ids for c in row), scores=None)
        for e, row in zip(examples, samples, strict=True)
    ]


def final_scores(
    actors: Actors, raw: Tensor, samples: Sequence[Completion], stage: PpoConfig
) -> Tensor:
    """(S,) scores that PPO maximizes: normalized, clipped, and a fixed low score without EOS."""
    scores = actors.normalizer(raw)
    if stage.score_clip is not None:
        scores = scores.clamp(-stage.score_clip, stage.score_clip)
    if stage.no_eos_score is not None:
        unfinished = torch.tensor([not c.finished for c in samples])
        scores = scores.masked_fill(unfinished, stage.no_eos_score)
    return scores


@torch.no_grad()
def measure(
    session: Session, actors: Actors, examples: Sequence[EncodedExample], stage: PpoConfig
) -> list[Tokens]:
    """Log-probabilities of policy and reference, and values, on the CPU; no advantages yet."""
    critic = actors.value_head

    def columns(row: Batch) -> list[Tensor]:
        own, logprobs = states_and_logprobs(actors.policy, row, stage)
        values = [] if critic is None else [values_of(critic, own)]
        with actors.reference.active() as model:
            reference = states_and_logprobs(model, row, stage)[1]
        return [part.cpu() for part in (logprobs, reference, *values)]

    tokens: dict[int, Tokens] = {}
    for row, results in over_rows(session, examples, columns):
        parts = [part.split(row.counts) for part in results]
        for index, *own in zip(row.example_ids.tolist(), *parts, strict=True):
            tokens[index] = Tokens(*own)
    return [tokens[i] for i in range(len(examples))]


def states_and_logprobs(
    model: PreTrainedModel, row: Batch, stage: PpoConfig
) -> tuple[Tensor, Tensor]:
    """(N, D) hidden states; (N,) log-probabilities of the targets at the temperature."""
    hidden = target_states(model, row)
    head = at_temperature(head_of(model), stage.temperature)
    return hidden, target_logprobs(hidden, head, row.targets)
