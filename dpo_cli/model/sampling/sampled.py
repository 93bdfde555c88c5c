"""Tokens sampled for a batch, and the completions built from them."""

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
    """temperature 0 is greedy. seed: each batch of prompts has its own random stream."""

    completions: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 48
    seed: int = 0
    batch_size: int | None = 64  # sequences decoded together; None: by GPU memory


@dataclass
class DecodingLimit:
    """Maximum number of sequences decoded together, lowered when memory runs out. A run keeps one,
    so that later passes start from it; the token budget of training is separate."""

    sequences: int = sys.maxsize


@dataclass(frozen=True)
class Completion:
    """ids: sampled tokens, including the end token if one was sampled. logprobs: (len(ids),) under
    the sampling distribution. finished: ended by such a token, not by max_new_tokens."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


Ends = int | Sequence[int]  # the token ids that end a completion


def ended_by(tokens: Tensor, ends: Ends) -> Tensor:
    """(R,) whether each token ends its completion. Only comparisons, which a CUDA graph can
    capture."""
    first, *others = [ends] if isinstance(ends, int) else ends
    ended = tokens == first
    for token in others:
        ended |= tokens == token
    return ended


class Sampled:
    """Tokens sampled so far for all rows of a batch; those after an end token are ignored."""

    def __init__(self, rows: int, steps: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, steps, dtype=dtype, device=device)

    def add(self, step: int | Tensor, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Store the `step`-th token of the batch's `rows` and its log-probability, (R,) each."""
        self.tokens[rows, step], self.logprobs[rows, step] = tokens, logprobs

    def completions(self, rows: int, steps: int, ends: Ends) -> list[Completion]:
        """Completions from the first `rows` rows and `steps` tokens. NonFiniteError if a
        log-probability is not finite."""
        tokens = self.tokens[:rows, :steps].cpu().numpy()
        logprobs = self.logprobs[:rows, :steps].cpu().numpy()
        completions = []
        for ids, logp in zip(tokens, logprobs, strict=True):
            places = np.flatnonzero(np.isin(ids, ends))
            length = int(places[0]) + 1 if len(places) else len(ids)
            if not np.isfinite(logp[:length]).all():
                raise NonFiniteError("sampling: the model's logits are not finite")
            until_end = ids[:length].astype(np.int32), logp[:length].copy()
            completions.append(Completion(*until_end, finished=len(places) > 0))
        return completions
