"""The base class of attention layouts, and index maps of a packed row.

A branch attends to its prompt and itself, never to other branches or examples. Index maps are
computed on the host from the row's segments, without a device synchronization.
Notation: T tokens of the row, E examples, L the longest example, K branches per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from dpo_cli.model.attention.kernels import Call
from dpo_cli.records import Batch, Segment


class Layout:
    """How a packed row is run through the model; its tensors move with the batch.

    traced: compiled blocks include the attention; otherwise it breaks them into two graphs.
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
        """(T,) weights of the row's tokens -> (n,) weights of the model's input tokens."""
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
    """A model's inputs for a packed row."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
    }


@dataclass(frozen=True)
class Span:
    """A prompt and one branch. tokens: indices in the packed row, of which the last `asking` are
    queries (for an example's first branch, the prompt too). number: 0.. in the example.
    """

    tokens: np.ndarray
    asking: int
    number: int


def spans_of(segments: Sequence[Segment]) -> Iterator[Span]:
    """The non-empty branches of a row; the first of an example includes its prompt."""
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
    """Examples as rows, padded on the right to the longest.

    tokens: (E, L) index of the packed token (for padding, the example's first);
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
    """(E, 1, L, L) boolean mask of a `Grid`, on the device of its tensors."""
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
