"""The token limit of completions, and how many finish within it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpo_cli.config import SamplingConfig
from dpo_cli.errors import ConfigError
from dpo_cli.records import EncodedExample
from dpo_cli.statistics import share_interval

PERCENTILE = 95  # of response lengths: the longest few would double the work
MIN_FINISHED = 0.9  # below this share of finished completions a note is printed

Sampling = TypeVar("Sampling", bound=SamplingConfig)


def needed_tokens(examples: Sequence[EncodedExample]) -> int:
    """The 95th percentile of response lengths, EOS included."""
    lengths = [len(ids) for e in examples for ids in e.response_ids]
    return int(np.percentile(lengths, PERCENTILE, method="inverted_cdf")) if lengths else 1


def with_new_tokens(
    stage: Sampling, examples: Sequence[EncodedExample], note: Callable[[str], None]
) -> Sampling:
    """The stage with its `max_new_tokens`, taken from the rows if it is null."""
    if stage.max_new_tokens is not None:
        return stage
    if not any(e.response_ids for e in examples):
        raise ConfigError("stage.max_new_tokens=null: the rows have no responses to set it by")
    tokens = needed_tokens(examples)
    note(f"stage.max_new_tokens={tokens}: {PERCENTILE}% of the data's responses are no longer")
    return replace(stage, max_new_tokens=tokens)


def new_tokens(stage: SamplingConfig) -> int:
    """`max_new_tokens` after `with_new_tokens`."""
    assert stage.max_new_tokens is not None
    return stage.max_new_tokens


def new_tokens_of(folder: Path, stage: Mapping[str, Any]) -> Any:
    """`max_new_tokens` of an earlier evaluation: as configured, else as recorded in its points."""
    if stage.get("max_new_tokens") is not None:
        return stage["max_new_tokens"]
    points = folder / "points.jsonl"
    rows = points.read_text(encoding="utf-8").strip("\n") if points.is_file() else ""
    return json.loads(rows.rpartition("\n")[2]).get("max_new_tokens") if rows else None


def finished_share(finished: Sequence[bool], prompts: int) -> dict[str, float]:
    """`finished`, the fraction of completions that finished with EOS, and its 95% interval `_low`,
    `_high` over `prompts`, as the samples of one prompt are not independent."""
    share = share_interval(sum(finished) / len(finished), prompts)
    return {"finished": share.value, "finished_low": share.low, "finished_high": share.high}


def unfinished_line(finished: float, limit: int) -> str | None:
    """A note if too few completions finished with EOS."""
    if finished >= MIN_FINISHED:
        return None
    return (
        f"only {finished:.0%} of completions finished with EOS, the others were truncated to "
        f"{limit} tokens: raise stage.max_new_tokens"
    )
