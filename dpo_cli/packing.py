"""Pack examples into rows `[p|c|r][p|c|r]...`: each prompt once, then its branches.

Rows have no padding, and responses share their prompt. The last token of a branch predicts no
target, so it is left out unless a stage reads it (`keep_last`).
Layout and gains: prefix sharing for preference pairs, arXiv 2410.20305.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from dpo_cli.records import Batch, EncodedExample, Segment


def fill_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices grouped so that each group's sizes sum to <= budget.

    A size above the budget gets a group of its own. Deterministic: ties keep their order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for b, free in enumerate(room):
            if sizes[index] <= free:
                bins[b].append(index)
                room[b] -= sizes[index]
                break
        else:
            bins.append([index])
            room.append(budget - sizes[index])
    return bins


def deal(sizes: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """As `fill_bins`, into groups of about equal size whose number is a multiple of `ranks`.

    Largest first, each into the smallest group so far; with one more group per rank until all fit.
    Groups stay empty if there are fewer sizes than ranks. Deterministic.
    """
    rounds = max(1, -(-sum(sizes) // (budget * ranks)))
    while True:
        groups: list[list[int]] = [[] for _ in range(rounds * ranks)]
        loads = [0] * len(groups)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            least = loads.index(min(loads))
            groups[least].append(index)
            loads[least] += sizes[index]
        crowded = any(
            load > budget and len(group) > 1 for load, group in zip(loads, groups, strict=True)
        )
        if not crowded:
            return groups
        rounds += 1


def kinds_of(prompt: int, responses: Sequence[int], cuts: Sequence[int]) -> tuple[int, ...]:
    """The distinct kinds of an example's sequences: how many of the ascending `cuts` their lengths
    exceed. Without responses, the kind of the prompt."""
    return tuple(sorted({bisect_left(cuts, prompt + length) for length in responses or (0,)}))


class _Row:
    """A packed row under construction."""

    def __init__(self, keep_last: bool, cuts: Sequence[int]) -> None:
        self.drop, self.cuts = 0 if keep_last else 1, cuts
        self.pieces: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.sources: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.last: list[int] = []
        self.layout: list[Segment] = []
        self.end = 0

    def add(self, example: EncodedExample) -> None:
        """Append an example: its prompt once per kind of its sequences, each with its responses."""
        places: dict[int, tuple[int, int, int]] = {}
        prompt = len(example.prompt_ids)
        for kind in kinds_of(prompt, [len(r) for r in example.response_ids], self.cuts):
            numbers = [
                number
                for number, ids in enumerate(example.response_ids)
                if kinds_of(prompt, [len(ids)], self.cuts) == (kind,)
            ]
            places |= self._segment(example, numbers)
        for number, response in enumerate(example.response_ids):
            last_of_prompt, offset, length = places[number]
            # The prompt's last token predicts the first token of every branch.
            inner = np.arange(offset, offset + len(response) - 1)
            self.sources.append(np.concatenate([[last_of_prompt], inner])[: len(response)])
            self.targets.append(response)
            self.last.append(offset + length - 1 if length else last_of_prompt)

    def _segment(
        self, example: EncodedExample, numbers: Sequence[int]
    ) -> dict[int, tuple[int, int, int]]:
        """Append a prompt and some of its responses. Returns for each response: the index of the
        prompt's last token, the index of its own first token, and its number of tokens."""
        branches = [example.response_ids[n] for n in numbers]
        branches = [ids[: len(ids) - self.drop] for ids in branches]
        prompt, start = len(example.prompt_ids), self.end
        self.pieces += [example.prompt_ids, *branches]
        self.positions += [np.arange(prompt)]
        self.positions += [np.arange(prompt, prompt + len(b)) for b in branches]
        self.layout.append(Segment(start, prompt, tuple(len(b) for b in branches)))
        places, self.end = {}, start + prompt
        for number, ids in zip(numbers, branches, strict=True):
            places[number] = start + prompt - 1, self.end, len(ids)
            self.end += len(ids)
        return places


def pack(
    examples: Sequence[EncodedExample],
    example_ids: Sequence[int],
    keep_last: bool = False,
    cuts: Sequence[int] = (),
) -> Batch:
    """Pack examples with the same number of responses into one row.

    cuts: lengths at which the model's rotary frequencies change (`model.rope`). An example with
    sequences on both sides of a cut has its prompt twice, and a row beyond a cut keeps last tokens,
    which count towards the length.
    """
    branches = len(examples[0].response_ids)
    assert all(len(e.response_ids) == branches for e in examples), "a row has one K"
    keep_last = keep_last or any(max(_kinds(e, cuts)) for e in examples)
    row = _Row(keep_last, cuts)
    for example in examples:
        row.add(example)
    lengths = [len(ids) for ids in row.targets]
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    return Batch(
        input_ids=_long(np.concatenate(row.pieces)),
        position_ids=_long(np.concatenate(row.positions)),
        source_index=_long(np.concatenate(row.sources)),
        targets=_long(np.concatenate(row.targets)),
        sequence_index=_long(sequences),
        sequence_lengths=_long(np.asarray(lengths)),
        example_ids=_long(np.asarray(example_ids)),
        layout=tuple(row.layout),
        branches=branches,
        counts=tuple(sum(map(len, e.response_ids)) for e in examples),
        last_index=_long(np.asarray(row.last)) if keep_last else None,
        places=tuple(map(int, example_ids)),
        cuts=tuple(cuts),
    )


def _kinds(example: EncodedExample, cuts: Sequence[int]) -> tuple[int, ...]:
    return kinds_of(len(example.prompt_ids), [len(r) for r in example.response_ids], cuts)


def _size(example: EncodedExample, cuts: Sequence[int]) -> int:
    """Tokens of an example in a row."""
    copies = len(_kinds(example, cuts)) - 1 if cuts else 0
    return example.packed_tokens + copies * len(example.prompt_ids)


def _long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


def pack_all(
    examples: Sequence[EncodedExample],
    indices: Sequence[int],
    token_budget: int,
    keep_last: bool = False,
    cuts: Sequence[int] = (),
) -> list[Batch]:
    """The given examples as packed rows of at most `token_budget` tokens each."""
    sizes = [_size(examples[i], cuts) for i in indices]
    return [
        pack([examples[indices[j]] for j in group], [indices[j] for j in group], keep_last, cuts)
        for group in fill_bins(sizes, token_budget)
    ]


def pack_share(
    examples: Sequence[EncodedExample],
    indices: Sequence[int],
    token_budget: int,
    rank: int,
    ranks: int,
    keep_last: bool = False,
    cuts: Sequence[int] = (),
) -> list[Batch]:
    """One rank's share of `pack_all`: the same number of rows on every rank, of similar lengths.

    If there are too few examples, the shortest is repeated as a filler row.
    """
    sizes = [_size(examples[i], cuts) for i in indices]
    groups = deal(sizes, token_budget, ranks)
    shortest = min(range(len(sizes)), key=sizes.__getitem__)
    rows = []
    for group in groups[rank::ranks]:
        chosen = [indices[j] for j in group or [shortest]]
        row = pack([examples[i] for i in chosen], chosen, keep_last, cuts)
        rows.append(row if group else replace(row, filler=True))
    return rows


def pack_sorted(
    examples: Sequence[EncodedExample],
    token_budget: int,
    keep_last: bool = False,
    cuts: Sequence[int] = (),
) -> Iterable[Batch]:
    """Every example once, longest first, in rows of similar lengths: for forward-only passes
    (reference log-probabilities, evaluation)."""
    sizes = [_size(example, cuts) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: -sizes[i])
    group: list[int] = []
    used = 0
    for index in order:
        size = sizes[index]
        if group and used + size > token_budget:
            yield pack([examples[i] for i in group], group, keep_last, cuts)
            group, used = [], 0
        group.append(index)
        used += size
    if group:
        yield pack([examples[i] for i in group], group, keep_last, cuts)
