"""PPO as pure functions of tensors (arXiv 1707.06347; for language models 1909.08593, 2009.01325).

Token values are flat, (N,): the sampled tokens of S completions concatenated, with lengths (S,).
The state of a token is its prefix; the episode ends with a completion's last token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def ends_of(lengths: Tensor) -> Tensor:
    """(S,) lengths, each at least 1 -> (S,) index of each completion's last token."""
    return lengths.cumsum(0) - 1


def token_rewards(
    scores: Tensor, logratios: Tensor, lengths: Tensor, kl_coef: float
) -> Tensor:  # fmt: skip
    """-kl_coef (log pi - log pi_ref) at each token, plus the score at the last one. (N,)

    scores: (S,); logratios: (N,).
    """
    rewards = -kl_coef * logratios
    rewards[ends_of(lengths)] += scores
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates (arXiv 1506.02438 eq. 16) and returns A + V. (N,) each.

    delta_t = r_t + gamma V_t+1 - V_t, with V = 0 after the end; A_t = delta_t + gamma lambda
    A_t+1. All completions are processed together, from their last tokens to their first.
    """
    ends, starts = ends_of(lengths), lengths.cumsum(0) - lengths
    advantages = torch.zeros_like(rewards)
    last = rewards.new_zeros(len(lengths))  # A of the next token
    following = torch.zeros_like(last)  # V of the next token
    for back in range(int(lengths.max())):
        rows = (lengths > back).nonzero().squeeze(1)
        place = ends[rows] - back
        assert bool((place >= starts[rows]).all())
        delta = rewards[place] + gamma * following[rows] - values[place]
        last[rows] = delta + gamma * gae_lambda * last[rows]
        following[rows] = values[place]
        advantages[place] = last[rows]
    return advantages, advantages + values


def whiten(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all tokens; a constant becomes 0."""
    centered = values - values.mean()
    return centered * torch.rsqrt(centered.square().mean() + 1e-8)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A) of each token (1707.06347 eq. 7), and the ratio. (N,) each."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the larger squared error of the value and of its clipped update. (N,)"""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(returns: Tensor, values: Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for a constant one."""
    spread = float(returns.var(unbiased=False))
    return 1.0 - float((returns - values).var(unbiased=False)) / spread if spread > 0 else 0.0


@dataclass
class AdaptiveKl:
    """The KL penalty's weight, steered towards a target (1909.08593 section 2.2).

    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon, after n completions.
    """

    coef: float
    target: float  # nats per sequence
    horizon: int  # completions

    def update(self, kl: float, completions: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= max(1.0 + error * completions / self.horizon, 0.1)


@dataclass
class FixedKl:
    """A constant KL penalty."""

    coef: float

    def update(self, kl: float, completions: int) -> None:
        """Nothing changes."""


@dataclass(frozen=True)
class Normalizer:
    """Scales scores to mean 0 and standard deviation 1 on samples of the reference."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


def fit_normalizer(scores: Tensor) -> Normalizer:
    """Fit to (n,) scores of reference samples; constant scores are centered, not scaled."""
    std = float(scores.std(unbiased=False))
    return Normalizer(float(scores.mean()), std if std > 1e-8 else 1.0)
