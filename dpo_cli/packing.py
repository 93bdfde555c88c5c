"""Examples -> packed rows `[p|c|r][p|c|r]...`: the prompt once, then its branches.

No padding, and the prompt shared by its responses. The last token of a branch predicts
nothing that is scored, so it is left out unless a stage reads it (`keep_last`).
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
    """As `fill_bins`, in groups of about equal sizes whose number is a multiple of `ranks`.

    Largest first, each to the group with the least so far; groups stay empty where there are
    fewer sizes than ranks. One group more a rank until all fit. Deterministic.
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
    """Which kinds the sequences of an example are, by their lengths, each kind once: how many of
    the `cuts`, ascending, they exceed. Without responses that of the prompt."""
    return tuple(sorted({bisect_left(cuts, prompt + length) for length in responses or (0,)}))


class _Row:
    """A row as it grows, example by example."""

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
        """Its prompt, once for each kind of length of its responses, and they behind it."""
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
            last_of_prompt, offset, kept = places[number]
            # The prompt's last token predicts the first token of every branch.
            inner = np.arange(offset, offset + len(response) - 1)
            self.sources.append(np.concatenate([[last_of_prompt], inner])[: len(response)])
            self.targets.append(response)
            self.last.append(offset + kept - 1 if kept else last_of_prompt)

    def _segment(
        self, example: EncodedExample, numbers: Sequence[int]
    ) -> dict[int, tuple[int, int, int]]:
        """A prompt and some of its responses. Of each: the prompt's last token, its own first and
        how many tokens of it there are."""
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

    cuts: lengths that a model cuts rows at (`model.rope`). An example that lies on both sides of
    one has its prompt on both, and a row beyond one keeps last tokens: they count for the length.
    """
    branches = len(examples[0].response_ids)
    assert all(len(e.response_ids) == branches for e in examples), "a row holds one K"
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
    """Tokens it takes in a row."""
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
    """One rank's part of `pack_all`: as many rows on every rank, of about equal lengths.

    Where there are too few examples for that, the shortest is computed again as a filler.
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
    """Every example once, longest first, in rows of about equal lengths: for passes that
    only measure (reference log-probs, evaluation)."""
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
