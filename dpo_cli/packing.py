"""Examples -> packed rows `[p|c|r][p|c|r]...`: the prompt once, then its branches.

No padding, and the prompt shared by its responses. The last token of a branch predicts
nothing that is scored, so it is left out unless a stage reads it (`keep_last`).
Layout and gains: prefix sharing for preference pairs, arXiv 2410.20305.
"""

from __future__ import annotations

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


def _row_of(example: EncodedExample, keep_last: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and positions of one example's pieces: prompt, branch, branch, ..."""
    drop = 0 if keep_last else 1
    branches = [ids[: len(ids) - drop] for ids in example.response_ids]
    prompt = len(example.prompt_ids)
    pieces = [example.prompt_ids, *branches]
    positions = [np.arange(prompt), *(np.arange(prompt, prompt + len(b)) for b in branches)]
    return pieces, positions


def pack(
    examples: Sequence[EncodedExample], example_ids: Sequence[int], keep_last: bool = False
) -> Batch:
    """Pack examples with the same number of responses into one row."""
    branches = len(examples[0].response_ids)
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    lengths: list[int] = []
    last: list[int] = []
    layout: list[Segment] = []
    start = 0
    for example in examples:
        assert len(example.response_ids) == branches, "a row holds one K"
        pieces, places = _row_of(example, keep_last)
        ids += pieces
        positions += places
        segment = Segment(start, len(pieces[0]), tuple(len(p) for p in pieces[1:]))
        layout.append(segment)
        last_of_prompt = start + segment.prompt - 1
        offset = last_of_prompt + 1
        for response, kept in zip(example.response_ids, segment.branches, strict=True):
            # The prompt's last token predicts the first token of every branch.
            inner = np.arange(offset, offset + len(response) - 1)
            sources.append(np.concatenate([[last_of_prompt], inner])[: len(response)])
            targets.append(response)
            lengths.append(len(response))
            last.append(offset + kept - 1 if kept else last_of_prompt)
            offset += kept
        start = offset
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    return Batch(
        input_ids=_long(np.concatenate(ids)),
        position_ids=_long(np.concatenate(positions)),
        source_index=_long(np.concatenate(sources)),
        targets=_long(np.concatenate(targets)),
        sequence_index=_long(sequences),
        sequence_lengths=_long(np.asarray(lengths)),
        example_ids=_long(np.asarray(example_ids)),
        layout=tuple(layout),
        branches=branches,
        counts=tuple(sum(map(len, e.response_ids)) for e in examples),
        last_index=_long(np.asarray(last)) if keep_last else None,
        places=tuple(map(int, example_ids)),
    )


def _long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


def pack_all(
    examples: Sequence[EncodedExample],
    indices: Sequence[int],
    token_budget: int,
    keep_last: bool = False,
) -> list[Batch]:
    """The given examples as packed rows of at most `token_budget` tokens each."""
    sizes = [examples[i].packed_tokens for i in indices]
    return [
        pack([examples[indices[j]] for j in group], [indices[j] for j in group], keep_last)
        for group in fill_bins(sizes, token_budget)
    ]


def pack_share(
    examples: Sequence[EncodedExample],
    indices: Sequence[int],
    token_budget: int,
    rank: int,
    ranks: int,
    keep_last: bool = False,
) -> list[Batch]:
    """One rank's part of `pack_all`: as many rows on every rank, of about equal lengths.

    Where there are too few examples for that, the shortest is computed again as a filler.
    """
    sizes = [examples[i].packed_tokens for i in indices]
    groups = deal(sizes, token_budget, ranks)
    shortest = min(range(len(sizes)), key=sizes.__getitem__)
    rows = []
    for group in groups[rank::ranks]:
        chosen = [indices[j] for j in group or [shortest]]
        row = pack([examples[i] for i in chosen], chosen, keep_last)
        rows.append(row if group else replace(row, filler=True))
    return rows


def pack_sorted(
    examples: Sequence[EncodedExample], token_budget: int, keep_last: bool = False
) -> Iterable[Batch]:
    """Every example once, longest first, in rows of about equal lengths: for passes that
    only measure (reference log-probs, evaluation)."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].packed_tokens)
    group: list[int] = []
    used = 0
    for index in order:
        size = examples[index].packed_tokens
        if group and used + size > token_budget:
            yield pack([examples[i] for i in group], group, keep_last)
            group, used = [], 0
        group.append(index)
        used += size
    if group:
        yield pack([examples[i] for i in group], group, keep_last)
