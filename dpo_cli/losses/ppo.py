"""PPO as pure functions of tensors (arXiv 1707.06347; for language models 1909.08593, 2009.01325),
and advantages without a critic.

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


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO, arXiv 2402.14740: each reward minus the mean of the prompt's K - 1 others. (P, K)"""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def group_relative(rewards: Tensor, scaled: bool) -> Tensor:
    """GRPO, arXiv 2402.03300: (r - mean) / std over the prompt's K completions. (P, K)

    scaled: False leaves the division out (Dr. GRPO, 2503.20783), which gives prompts whose rewards
    are nearly equal a larger weight. std is that of a sample, plus 1e-4, as in TRL.
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if scaled else centered


def kl_penalty(logratios: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(pi || ref) as a loss of each token, of x = log pi - log ref. (N,)

    Their gradients are expectations over pi's tokens: k2, x^2 / 2, has that of KL(pi || ref);
    k3, exp(-x) - 1 + x, that of KL(ref || pi), which agrees with it near the reference. (k1, x,
    has none: it is for rewards.)
    """
    return logratios.square() / 2 if estimator == "k2" else torch.expm1(-logratios) + logratios


def token_shares(lengths: Tensor, average: str, constant: int) -> Tensor:
    """(N,) factor of each token in a sum that is then divided by the number of tokens ("tokens")
    or of completions: 1 / length of its completion, `lengths` (N,), for the mean of means
    ("sequences"); 1 / constant for Dr. GRPO ("constant"), where long completions count for more.
    """
    if average == "tokens":
        return torch.ones_like(lengths, dtype=torch.float32)
    if average == "sequences":
        return 1.0 / lengths.float()
    return torch.full_like(lengths, 1.0 / constant, dtype=torch.float32)


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
