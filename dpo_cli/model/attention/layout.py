"""How the tokens of a packed row lie, and how a row goes through a model.

A branch sees its prompt and itself, never the other branches or examples. Index maps are
worked out on the host from the row's segments: asking the device would make it wait.
Notation: T tokens of the row, E examples, L the longest example, K branches an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from dpo_cli.model.attention.products import Call
from dpo_cli.records import Batch, Segment


class Layout:
    """Tensors that move with their batch, and how a row goes through the model.

    traced: a compiled block holds the attention, too; else it calls it, in two graphs.
    """

    traced = True

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> Self:
        """The layout of a row's segments, on the host."""
        raise NotImplementedError

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Self:
        old = cast(Any, self)
        return cast(Self, replace(old, **{
            f.name: _moved(getattr(old, f.name), move) for f in fields(old) if f.init
        }))  # fmt: skip

    def states(self, base_model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
        """(T, D) final hidden states of the row. dtype: the weights'."""
        out = base_model(**row_of(batch), packed_layout=self)
        return cast(Tensor, out.last_hidden_state).squeeze(0)

    def spread(self, weights: Tensor) -> Tensor:
        """(T,) weights of the row's tokens -> of the tokens that go through the model, (n,)."""
        return weights

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """q (1, H, T, d), k and v (1, H_kv, T, d) -> (1, T, H, d)"""
        raise NotImplementedError


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Layout):
        return value._each(move)
    return tuple(_moved(v, move) for v in value) if isinstance(value, tuple) else value


def row_of(batch: Batch) -> dict[str, Any]:
    """What every model is given of a packed row."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
    }


@dataclass(frozen=True)
class Span:
    """One branch behind its prompt. tokens: of the packed row; the last `asking` of them are
    its own (the first branch of an example owns the prompt as well). number: 0.. in the example.
    """

    tokens: np.ndarray
    asking: int
    number: int


def spans_of(segments: Sequence[Segment]) -> Iterator[Span]:
    """The branches of a row, without empty ones; a first one stands for its prompt as well."""
    for segment in segments:
        prompt = np.arange(segment.start, segment.start + segment.prompt)
        offset, number = segment.start + segment.prompt, 0
        for place, size in enumerate(segment.branches):
            if place and not size:
                continue
            tokens = np.concatenate([prompt, np.arange(offset, offset + size)])
            yield Span(tokens, size if place else len(tokens), number)
            offset, number = offset + size, number + 1


@dataclass(frozen=True)
class Grid:
    """Examples one below the other, padded on the right to the longest.

    tokens: (E, L) packed token of each place (padding points at the example's first);
    real: (E, L) False for padding; branch: (E, L) 0 for the prompt, 1.. for its branches,
    -1 for padding; positions: (E, L).
    """

    tokens: np.ndarray
    real: np.ndarray
    branch: np.ndarray
    positions: np.ndarray


def grid_of(segments: Sequence[Segment]) -> Grid:
    """Some or all examples of a row, in any order."""
    sizes = np.array([s.prompt + sum(s.branches) for s in segments])[:, None]
    starts = np.array([s.start for s in segments])[:, None]
    columns = np.arange(sizes.max())
    real = columns < sizes
    _, *maps = token_maps(segments)
    branch, positions = np.full(real.shape, -1), np.zeros(real.shape, dtype=np.int64)
    branch[real], positions[real] = maps
    return Grid(np.where(real, starts + columns, starts), real, branch, positions)


def visible(branch: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """(E, 1, L, L) who may look at whom in a `Grid`, made where its tensors are."""
    columns = torch.arange(branch.shape[1], device=branch.device)
    same = branch[:, :, None] == branch[:, None, :]
    allowed = (columns[:, None] >= columns) & (same | (branch[:, None, :] == 0))
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return allowed[:, None]


def token_maps(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) example, branch (0: the prompt) and position of each token of a row."""
    pieces = [(s.prompt, *s.branches) for s in segments]
    sizes = np.concatenate(pieces)
    example = np.repeat(np.arange(len(pieces)), [sum(p) for p in pieces])
    branch = np.repeat(np.concatenate([np.arange(len(p)) for p in pieces]), sizes)
    position = np.concatenate([
        np.arange(size) + (p[0] if place else 0) for p in pieces for place, size in enumerate(p)
    ])  # fmt: skip
    return example, branch, position
