"""What has been sampled of a batch, and the completions that become of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_cli.errors import NonFiniteError


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy. seed: each prompt batch draws from its own stream."""

    completions: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 48
    seed: int = 0
    batch_size: int | None = 64  # sequences decoded together; None: as many as a GPU holds


@dataclass
class DecodingLimit:
    """Most sequences decoded together, as far as memory has shown so far; a run keeps one, so that
    no later pass fails again. It is no part of the token budget of training."""

    sequences: int = sys.maxsize


@dataclass(frozen=True)
class Completion:
    """ids: sampled tokens, with the token that ended them if it came. logprobs: (len(ids),) of the
    sampling distribution. finished: ended by such a token, not by max_new_tokens."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


Ends = int | Sequence[int]  # the token ids that end a completion


def ended_by(tokens: Tensor, ends: Ends) -> Tensor:
    """(R,) whether each token ends its completion; no more than comparisons, which can be recorded
    in a CUDA graph."""
    first, *others = [ends] if isinstance(ends, int) else ends
    found = tokens == first
    for token in others:
        found |= tokens == token
    return found


class Sampled:
    """Tokens sampled so far, for all rows of a batch; what follows an EOS counts for nothing."""

    def __init__(self, rows: int, steps: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, steps, dtype=dtype, device=device)

    def add(self, step: int | Tensor, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """What the batch's `rows`, (R,), have drawn as their `step`-th token, (R,) each."""
        self.tokens[rows, step], self.logprobs[rows, step] = tokens, logprobs

    def completions(self, rows: int, steps: int, ends: Ends) -> list[Completion]:
        """Of the first rows and steps. NonFiniteError where a log-probability is not finite."""
        tokens = self.tokens[:rows, :steps].cpu().numpy()
        logprobs = self.logprobs[:rows, :steps].cpu().numpy()
        made = []
        for ids, logp in zip(tokens, logprobs, strict=True):
            places = np.flatnonzero(np.isin(ids, ends))
            length = int(places[0]) + 1 if len(places) else len(ids)
            if not np.isfinite(logp[:length]).all():
                raise NonFiniteError("sampling: the model's logits are not finite")
            kept = ids[:length].astype(np.int32), logp[:length].copy()
            made.append(Completion(*kept, finished=len(places) > 0))
        return made
