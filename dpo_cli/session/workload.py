"""How long the texts are that a stage computes on: what an estimate of its memory needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpo_cli.config import RunConfig
from dpo_cli.records import EncodedExample
from dpo_cli.session.rows import steps_of

Lengths = tuple[int, Sequence[int]]  # tokens of a prompt and of each of its responses
STEPS_READ = 200  # the fullest of them stands for all


@dataclass(frozen=True)
class Workload:
    """lengths: of each example; steps: the examples of each optimizer step, empty where nothing is
    trained; new_tokens: what a completion may take, 0 where the stage samples none."""

    lengths: Sequence[Lengths]
    steps: Iterable[Sequence[int]] = ()
    new_tokens: int = 0


def training_workload(config: RunConfig, examples: Sequence[EncodedExample]) -> Workload:
    """Of a stage whose steps take their examples from the rows."""
    plan = steps_of(config, len(examples))
    steps = [plan.indices(step) for step in range(min(plan.steps, STEPS_READ))]
    return Workload(lengths_of(examples), steps)


def sampling_workload(
    prompts: Sequence[EncodedExample], completions: int, new_tokens: int
) -> Workload:
    """As if every completion took all the tokens it may."""
    lengths = [(len(e.prompt_ids), [new_tokens] * completions) for e in prompts]
    return Workload(lengths, new_tokens=new_tokens)


def lengths_of(examples: Sequence[EncodedExample]) -> list[Lengths]:
    return [(len(e.prompt_ids), [len(ids) for ids in e.response_ids]) for e in examples]
