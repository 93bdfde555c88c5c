"""Rotary embeddings whose factors depend on the length of the sequence (longrope).

transformers uses either the short or the long factors for a complete forward, by its largest
position. Sequences of both kinds therefore never share a forward: a row is split at the model's
original length (`cuts` of `packing.pack`), and each part is a separate forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.layout import Layout
from dpo_cli.packing import kinds_of
from dpo_cli.records import Batch, EncodedExample, Segment

Row = TypeVar("Row", bound=Sequence[int])

ORIGINAL = "original_max_position_embeddings"
SHORT_ORIGINAL = 5  # so that the probe's few tokens are on both sides


def cuts_of(config: PretrainedConfig) -> tuple[int, ...]:
    """Lengths at which the rotary factors change; empty for most models. (`dynamic` factors change
    only beyond the context.)"""
    return tuple(sorted({int(parameters[ORIGINAL]) for parameters in _dependent(config)}))


def _dependent(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary parameters that depend on the length; some families have a set per layer type."""
    by_layer_type = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for parameters in (by_layer_type, *by_layer_type.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            yield parameters


def split_at_cuts(rows: Sequence[Row], config: PretrainedConfig) -> Iterator[list[Row]]:
    """Consecutive rows of token ids that may share a forward, in order."""
    cuts = cuts_of(config)
    for _, part in groupby(rows, key=lambda row: kinds_of(0, [len(row)], cuts)):
        yield list(part)


@dataclass(frozen=True)
class CutCrossing:
    """The side of the cuts on which a completion starts, and whether it crosses one.

    crossing: 0, or the length of a prompt whose completion crosses a cut. Such prompts are decoded
    only with prompts of equal length, as all cross at the same token, where the cache becomes
    invalid because its keys have the other factors.
    """

    kind: int
    crossing: int = 0


def cut_crossing(config: PretrainedConfig, prompt: int, steps: int) -> CutCrossing:
    """For a prompt of `prompt` tokens and `steps` new ones, the last of which is never read."""
    cuts = cuts_of(config)
    kinds = kinds_of(prompt, [0, max(0, steps - 1)], cuts)
    return CutCrossing(kinds[0], prompt if len(kinds) > 1 else 0)


@contextmanager
def short_original_length(model: PreTrainedModel) -> Iterator[None]:
    """In the body, the original length is short, so that a probe covers both sets of factors."""
    places = list(_dependent(model.config))
    config = vars(model.config.get_text_config())
    if places and ORIGINAL in config:  # some families read it here in every forward
        places.append(config)
    before = [place[ORIGINAL] for place in places]
    for place in places:
        place[ORIGINAL] = SHORT_ORIGINAL
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place[ORIGINAL] = value


@dataclass
class SplitLayout(Layout):
    """Parts of a row that are run through the model separately.

    parts: the packed tokens of each, (n,), and its layout; place: (T,) position of each packed
    token in the concatenation of the parts.
    """

    parts: tuple[tuple[Tensor, Layout], ...]
    place: Tensor

    @classmethod
    def split(cls, segments: Sequence[Segment], cuts: Sequence[int], kind: type[Layout]) -> Layout:
        """The layout of a row; of that `kind` where none of its sequences lies beyond a cut."""
        by_kind: dict[int, list[Segment]] = {}
        for segment in segments:
            (number,) = kinds_of(segment.prompt, segment.branches, cuts) or (0,)
            by_kind.setdefault(number, []).append(segment)
        if len(by_kind) == 1:
            return kind.build(segments)
        tokens = [np.concatenate([_tokens(s) for s in part]) for part in by_kind.values()]
        parts = [
            (torch.from_numpy(places), kind.build(_from_zero(part)))
            for places, part in zip(tokens, by_kind.values(), strict=True)
        ]
        return cls(tuple(parts), torch.from_numpy(np.argsort(np.concatenate(tokens))))

    def spread(self, weights: Tensor) -> Tensor:
        return torch.cat([layout.spread(weights[tokens]) for tokens, layout in self.parts])

    def states(self, base_model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
        states = [
            layout.states(base_model, _part(batch, tokens), dtype) for tokens, layout in self.parts
        ]
        return torch.cat(states).index_select(0, self.place)


def _part(batch: Batch, tokens: Tensor) -> Batch:
    return replace(
        batch, input_ids=batch.input_ids[tokens], position_ids=batch.position_ids[tokens]
    )


def _tokens(segment: Segment) -> np.ndarray:
    return np.arange(segment.start, segment.start + segment.prompt + sum(segment.branches))


def _from_zero(segments: Sequence[Segment]) -> list[Segment]:
    moved, start = [], 0
    for segment in segments:
        moved.append(replace(segment, start=start))
        start += segment.prompt + sum(segment.branches)
    return moved


def refuse_beyond_cuts(examples: Sequence[EncodedExample], cuts: Sequence[int]) -> None:
    """ConfigError if ranks, which must run the same forwards, would run different ones."""
    for example in examples:
        lengths = [len(ids) for ids in example.response_ids]
        if any(kinds_of(len(example.prompt_ids), lengths, cuts)):
            raise ConfigError(
                f"row {example.row} is longer than the model's original context of {cuts[0]:,} "
                "tokens (longrope) and needs a separate forward, which is not supported on several "
                f"devices: set data.max_length={cuts[0]} or use hardware.devices=1"
            )
