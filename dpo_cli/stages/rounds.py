"""Rounds of online DPO: completions of the policy, ranked, as pairs with reference log-probs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import torch
from torch import Tensor

from dpo_cli.config import OnlineDpoConfig
from dpo_cli.evaluation.judge import Judge, without_verdict
from dpo_cli.evaluation.labels import Pair, all_pairs
from dpo_cli.logprobs import target_logprobs
from dpo_cli.model.forward import head_of, target_states
from dpo_cli.model.sampling.generate import Completion
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.rewards.scorers import Scorer
from dpo_cli.session.lengths import finished_share, new_tokens, unfinished_line
from dpo_cli.session.models import Loaded
from dpo_cli.session.reference import Reference
from dpo_cli.session.rows import over_rows
from dpo_cli.session.session import Session
from dpo_cli.stages.pairing import Compared, by_judge, compare, most_pairs
from dpo_cli.stages.rollout import (
    EVAL_SEED,
    at_temperature,
    completed,
    draw,
    mean_kl,
    with_samples,
)
from dpo_cli.statistics import mean_and_error

Samples = Sequence[Sequence[Completion]]  # of each prompt
Scores = Sequence[Sequence[float] | None]  # of each prompt's completions; None: judged


@dataclass
class Actors:
    """What samples and ranks. reference: None for losses without one; score or judge: the one that
    `stage.by` names."""

    session: Session
    stage: OnlineDpoConfig
    loaded: Loaded
    reference: Reference | None
    score: Scorer | None
    judge: Judge | None
    noted: set[str] = field(default_factory=set)

    def note_once(self, kind: str, line: str | None) -> None:
        if line and kind not in self.noted:
            self.noted.add(kind)
            self.session.note(line)


@dataclass
class Round:
    """examples: prompts with the completions that are compared, best first; of each, pairs: (P, 2)
    places of chosen and rejected; reference: (n,) token log-probabilities, if the loss reads them.
    """

    examples: list[EncodedExample] = field(default_factory=list)
    pairs: Sequence[Tensor] = ()
    reference: Sequence[Tensor] = ()
    figures: dict[str, float] = field(default_factory=dict)


def new_round(actors: Actors, examples: Sequence[EncodedExample], number: int) -> Round:
    """Sample, rank, and compute the reference's log-probabilities of what is compared."""
    session, stage, loaded = actors.session, actors.stage, actors.loaded
    seed = int(np.random.SeedSequence([session.config.seed, number]).generate_state(1)[0])
    started = time.perf_counter()
    samples = draw(session, loaded, loaded.model, examples, stage, seed)
    sampled = time.perf_counter()
    scores, decided, figures = rank(actors, examples, samples)
    scored = time.perf_counter()
    rng = Random(f"{session.config.seed} labels {number}")
    found = [
        compare(pairs, [c.ids for c in row], stage, own, rng)
        for pairs, row, own in zip(decided, samples, scores, strict=True)
    ]
    made = with_pairs(session, examples, samples, found)
    if actors.reference is not None:
        logprobs, logratios = measure(actors, actors.reference, examples, samples)
        parts = [
            torch.cat([own[i] for i in one.responses])
            for own, one in zip(logprobs, found, strict=True)
            if one
        ]
        made.reference = on_device(session, parts)
        figures["kl"] = mean_kl(session, [x for row in logratios for x in row])
    made.figures = figures | pair_figures(stage, scores, found) | sample_figures(actors, samples)
    made.figures |= {
        "rollout/samples": float((number + 1) * sum(map(len, samples))),
        "rollout/seconds": time.perf_counter() - started,
        "rollout/sampling_seconds": sampled - started,
        "rollout/scoring_seconds": scored - sampled,
    }
    return made


def rank(
    actors: Actors, examples: Sequence[EncodedExample], samples: Samples
) -> tuple[Scores, list[list[Pair]], dict[str, float]]:
    """The scores; every two completions of a prompt of which one is preferred; and figures."""
    stage = actors.stage
    rows = completed(actors.loaded.tokenizer, examples, samples)
    if actors.judge is not None:
        decided, decisions = by_judge(actors.session, actors.judge, rows)
        for line in without_verdict(decisions):
            actors.note_once("judge", line)
        judged = sum(map(len, decided)) / len(decisions)
        return [None] * len(rows), decided, {"rollout/decided": judged}
    raw = scores_of(actors, examples, samples)
    scores = [
        [
            s if c.finished or stage.no_eos_score is None else stage.no_eos_score
            for s, c in zip(own, row, strict=True)
        ]
        for own, row in zip(raw, samples, strict=True)
    ]
    mean, _ = mean_and_error([s for own in raw for s in own])
    return scores, [all_pairs(own) for own in scores], {"score": mean}


def scores_of(
    actors: Actors, examples: Sequence[EncodedExample], samples: Samples
) -> list[list[float]]:
    """The raw scores of each prompt's completions."""
    assert actors.score is not None
    rows = completed(actors.loaded.tokenizer, examples, samples)
    values = iter(actors.score([c for row in rows for c in row]))
    return [[next(values) for _ in row] for row in rows]


def with_pairs(
    session: Session,
    examples: Sequence[EncodedExample],
    samples: Samples,
    found: Sequence[Compared | None],
) -> Round:
    """The prompts of which completions are compared, with these as responses."""
    kept = [(e, row, one) for e, row, one in zip(examples, samples, found, strict=True) if one]
    learned = [
        replace(e, response_ids=tuple(row[i].ids for i in one.responses), scores=None)
        for e, row, one in kept
    ]
    pairs = [torch.tensor([[p.chosen, p.rejected] for p in one.pairs]) for _, _, one in kept]
    return Round(learned, on_device(session, pairs))


def on_device(session: Session, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Move them to the run's device in one copy: a copy per step would block each step."""
    if not parts:
        return ()
    return torch.cat(list(parts)).to(session.runtime.device).split([len(part) for part in parts])


@torch.no_grad()
def measure(
    actors: Actors,
    reference: Reference,
    examples: Sequence[EncodedExample],
    samples: Samples,
) -> tuple[list[Sequence[Tensor]], list[list[float]]]:
    """Of each prompt's completions: the reference's token log-probabilities, and the log-ratio
    between the distribution that was sampled from and the reference's at the same temperature."""
    session, heat = actors.session, actors.stage.temperature

    def columns(row: Batch) -> list[Tensor]:
        with reference.active() as model:
            hidden, head = target_states(model, row), head_of(model)
            heads = [head] if heat == 1.0 else [head, at_temperature(head, heat)]
            return [target_logprobs(hidden, each, row.targets).cpu() for each in heads]

    full, logprobs, logratios = with_samples(examples, samples), {}, {}
    for row, found in session.within_memory(lambda: list(over_rows(session, full, columns))):
        plain, heated = (part.split(row.counts) for part in (found[0], found[-1]))
        for index, own, hot in zip(row.example_ids.tolist(), plain, heated, strict=True):
            lengths = [len(c.ids) for c in samples[index]]
            logprobs[index] = own.split(lengths)
            logratios[index] = [
                math.fsum(c.logprobs) - math.fsum(part.tolist())
                for c, part in zip(samples[index], hot.split(lengths), strict=True)
            ]
    every = range(len(full))
    return [logprobs[i] for i in every], [logratios[i] for i in every]


def pair_figures(
    stage: OnlineDpoConfig, scores: Scores, found: Sequence[Compared | None]
) -> dict[str, float]:
    """rollout/tied: share of the possible pairs without a preference; rollout/score_gap: mean score
    of chosen minus rejected completions."""
    made = [(own, one) for own, one in zip(scores, found, strict=True) if one]
    count = sum(len(one.pairs) for _, one in made)
    figures = {"rollout/tied": 1.0 - count / (len(found) * most_pairs(stage))}
    gaps = [
        own[one.responses[p.chosen]] - own[one.responses[p.rejected]]
        for own, one in made
        if own is not None
        for p in one.pairs
    ]
    return figures | ({"rollout/score_gap": math.fsum(gaps) / len(gaps)} if gaps else {})


def sample_figures(actors: Actors, samples: Samples) -> dict[str, float]:
    """Length of the completions, and the share that finished, which is noted if it is small."""
    stage, flat = actors.stage, [c for row in samples for c in row]
    finished = sum(c.finished for c in flat) / len(flat)
    actors.note_once("finished", unfinished_line(finished, new_tokens(stage)))
    tokens = sum(len(c.ids) for c in flat) / len(flat)
    return {"rollout/tokens": tokens, "rollout/finished": finished}


def held_out_figures(actors: Actors, examples: Sequence[EncodedExample]) -> dict[str, float]:
    """Score and KL on held-out prompts; `loss` is beta KL - score / label_temperature, which DPO on
    labels drawn by Bradley-Terry minimizes.

    Standard errors are over prompts, and left out for a single one. Nothing is judged.
    """
    if not examples:
        return {}
    stage, loaded = actors.stage, actors.loaded
    samples = draw(actors.session, loaded, loaded.model, examples, stage, EVAL_SEED)
    figures: dict[str, float] = {}
    if actors.reference is not None:
        logratios = measure(actors, actors.reference, examples, samples)[1]
        figures |= _mean("kl", logratios)
    if actors.score is not None:
        figures |= _mean("score", scores_of(actors, examples, samples))
        penalty = stage.beta * figures.get("kl", 0.0)
        figures["loss"] = penalty - figures["score"] / stage.label_temperature
    flat = [c for row in samples for c in row]
    figures["tokens"] = sum(len(c.ids) for c in flat) / len(flat)
    return figures | finished_share([c.finished for c in flat], len(samples))


def _mean(name: str, rows: Sequence[Sequence[float]]) -> dict[str, float]:
    mean, error = mean_and_error([math.fsum(row) / len(row) for row in rows])
    return {name: mean} | ({f"{name}_se": error} if math.isfinite(error) else {})
