"""Lengths of the texts that a stage processes, for the memory estimate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpo_cli.config import RunConfig, SamplingConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.records import EncodedExample
from dpo_cli.session.lengths import needed_tokens
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.rows import steps_of

Lengths = tuple[int, Sequence[int]]  # tokens of a prompt and of each of its responses
STEPS_READ = 200  # the largest of them is used for all


@dataclass(frozen=True)
class Workload:
    """lengths: of each example; steps: the examples of each optimizer step, empty without training;
    new_tokens: maximum per completion, 0 without sampling."""

    lengths: Sequence[Lengths]
    steps: Iterable[Sequence[int]] = ()
    new_tokens: int = 0


def training_workload(config: RunConfig, examples: Sequence[EncodedExample]) -> Workload:
    """The workload of a stage whose steps use the rows as examples."""
    plan = steps_of(config, len(examples))
    steps = [plan.indices(step) for step in range(min(plan.steps, STEPS_READ))]
    return Workload(lengths_of(examples), steps)


def sampling_workload(stage: SamplingConfig, splits: EncodedSplits) -> Workload:
    """The workload of a stage that samples from the distinct prompts, with completions of maximum
    length."""
    rows = [*splits.train, *splits.eval]
    new_tokens = stage.max_new_tokens or needed_tokens(rows)
    responses = [new_tokens] * stage.completions
    lengths = [(len(e.prompt_ids), responses) for e in distinct_prompts(rows)]
    return Workload(lengths, new_tokens=new_tokens)


def lengths_of(examples: Sequence[EncodedExample]) -> list[Lengths]:
    return [(len(e.prompt_ids), [len(ids) for ids in e.response_ids]) for e in examples]
