"""Draw the next token with few passes over (rows, vocabulary)."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_cli.logprobs import promote

BLOCK = 256  # about the square root of a vocabulary: first a block is drawn, then a token in it
EPS = torch.finfo(torch.float64).eps


def draw(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(B, V) logits -> (B,) tokens and their (B,) log-probabilities as sampled.

    temperature 0 is greedy. Non-finite logits give non-finite log-probabilities.
    """
    logits = promote(logits)
    if temperature == 0.0:
        best, chosen = logits.max(-1)
        return chosen, best - logits.logsumexp(-1)
    p = (logits if temperature == 1.0 else logits / temperature).softmax(-1)
    if top_p < 1.0:
        p = _nucleus(p, top_p)
    chosen = _choose(p, generator)
    return chosen.squeeze(1), p.gather(1, chosen).squeeze(1).log()


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with mass `top_p` (Holtzman et al. 2020, section 3.1)."""
    ordered, index = p.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass ahead of each token
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    return torch.empty_like(p).scatter_(1, index, ordered / ordered.sum(-1, keepdim=True))


def _choose(p: Tensor, generator: torch.Generator) -> Tensor:
    """(B, V) weights -> (B, 1) indices drawn in proportion, from one random number per row.

    `torch.multinomial` takes V random numbers a row, a third of a step of GPT-2 on a CPU.
    """
    rows, vocab = p.shape
    blocks = vocab // BLOCK
    full_blocks, rest = p.split([blocks * BLOCK, vocab - blocks * BLOCK], -1)
    sums = torch.cat([
        full_blocks.unflatten(1, (blocks, BLOCK)).sum(-1), rest.sum(-1, keepdim=True)
    ], 1)  # fmt: skip
    uniform = torch.rand(rows, 1, dtype=torch.float64, device=p.device, generator=generator)
    block, uniform = _invert(sums, uniform)
    index = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, index.clamp_max(vocab - 1)).masked_fill(index >= vocab, 0.0)
    chosen = block * BLOCK + _invert(inside, uniform)[0]
    return chosen.clamp_max(vocab - 1)  # NaN must not index out of range


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF of the (B, n) weights at each number in [0, 1): the index, and the relative
    position within that weight.

    A float32 CDF would be biased: steps in a vocabulary's tail are smaller than its rounding.
    """
    edges = weights.double().cumsum(-1)
    target = uniform.clamp_max(1.0 - EPS) * edges[:, -1:]  # below the last edge after rounding
    index = torch.searchsorted(edges, target, right=True).clamp_max(weights.shape[1] - 1)
    weight = weights.double().gather(1, index)
    return index, ((target - edges.gather(1, index)) / weight + 1.0).clamp(0.0, 1.0)
