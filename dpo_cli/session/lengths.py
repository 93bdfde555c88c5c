"""How many tokens a completion may take, and whether that was enough."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpo_cli.config import EvaluateConfig, PpoConfig, SampleConfig
from dpo_cli.records import EncodedExample
from dpo_cli.statistics import share_interval

PERCENTILE = 95  # of the responses' lengths: the longest few would double the work
MOST_FINISH = 0.9  # a smaller share of finished completions is told

Sampling = TypeVar("Sampling", SampleConfig, EvaluateConfig, PpoConfig)


def needed_tokens(examples: Sequence[EncodedExample]) -> int:
    """What 95% of the rows' responses do not exceed, their end of text among the tokens."""
    lengths = [len(ids) for e in examples for ids in e.response_ids]
    return int(np.percentile(lengths, PERCENTILE, method="inverted_cdf")) if lengths else 1


def with_new_tokens(
    stage: Sampling, examples: Sequence[EncodedExample], note: Callable[[str], None]
) -> Sampling:
    """The stage with its `max_new_tokens`, from the rows where it is null."""
    if stage.max_new_tokens is not None:
        return stage
    found = needed_tokens(examples)
    note(f"stage.max_new_tokens={found}: {PERCENTILE}% of the data's responses are no longer")
    return replace(stage, max_new_tokens=found)


def new_tokens(stage: SampleConfig | EvaluateConfig | PpoConfig) -> int:
    """Of a stage that `with_new_tokens` has seen."""
    assert stage.max_new_tokens is not None
    return stage.max_new_tokens


def new_tokens_of(folder: Path, stage: Mapping[str, Any]) -> Any:
    """Of an earlier evaluation: as it was set, else as it was found in its data."""
    if stage.get("max_new_tokens") is not None:
        return stage["max_new_tokens"]
    points = folder / "points.jsonl"
    lines = points.read_text(encoding="utf-8").splitlines() if points.is_file() else []
    return json.loads(lines[-1]).get("max_new_tokens") if lines else None


def finished_share(finished: Sequence[bool], prompts: int) -> dict[str, float]:
    """`finished`, the share of completions that ended by themselves, and its 95% interval, `_low`
    and `_high`: of so many prompts, as the samples of one may all be cut alike."""
    found = share_interval(sum(finished) / len(finished), prompts)
    return {"finished": found.value, "finished_low": found.low, "finished_high": found.high}


def unfinished_line(finished: float, most: int) -> str | None:
    """What is told where too few completions ended by themselves."""
    if finished >= MOST_FINISH:
        return None
    return (
        f"only {finished:.0%} of the completions ended within {most} tokens, the others were cut: "
        "raise stage.max_new_tokens"
    )
