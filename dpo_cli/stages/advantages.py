"""Advantages of a rollout's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from dpo_cli.config import PpoConfig
from dpo_cli.config.stages.ppo_baseline import ADVANTAGES
from dpo_cli.logprobs import sum_by_sequence
from dpo_cli.losses.ppo import (
    advantages_and_returns,
    explained_variance,
    group_relative,
    leave_one_out,
    token_rewards,
    whiten,
)


@dataclass
class Tokens:
    """The n tokens of one prompt's completions, (n,) each; `estimate` fills in the last two.

    Computed on the CPU, then moved to the run's device (`on_device`). Without a critic there are
    neither values nor returns.
    """

    logprobs: Tensor
    reference: Tensor
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


def estimate(
    tokens: list[Tokens], scores: Tensor, lengths: Tensor, stage: PpoConfig, kl_coef: float
) -> dict[str, float]:
    """Fill in advantages, and with a critic returns; returns figures of the rollout.

    scores, lengths: (S,), the completions of each prompt together.
    """
    logratios = torch.cat([t.logprobs - t.reference for t in tokens])
    penalty = kl_coef if stage.kl_in == "reward" else 0.0
    rewards = token_rewards(scores, logratios, lengths, penalty)
    figures = {"score_normalised": float(scores.mean())}
    counts = [len(t.logprobs) for t in tokens]
    if tokens[0].values is None:
        advantages = without_critic(rewards, lengths, stage)
    else:
        values = torch.cat([cast(Tensor, t.values) for t in tokens])
        advantages, returns = advantages_and_returns(
            rewards, values, lengths, stage.gamma, stage.gae_lambda
        )
        figures["explained_variance"] = explained_variance(returns, values)
        for own, return_ in zip(tokens, returns.split(counts), strict=True):
            own.returns = return_
    if stage.whiten_advantages and not ADVANTAGES[stage.advantage].grouped:
        advantages = whiten(advantages)
    for own, part in zip(tokens, advantages.split(counts), strict=True):
        own.advantages = part
    return figures


def without_critic(rewards: Tensor, lengths: Tensor, stage: PpoConfig) -> Tensor:
    """(N,) advantages of (N,) token rewards: the same for all tokens of a completion if it is
    compared with the others of its prompt; otherwise the discounted rewards from a token on."""
    if not ADVANTAGES[stage.advantage].grouped:
        nothing = torch.zeros_like(rewards)
        return advantages_and_returns(rewards, nothing, lengths, stage.gamma, 1.0)[0]
    index = torch.repeat_interleave(lengths)
    totals = sum_by_sequence(rewards, index, len(lengths)).view(-1, stage.completions)
    if stage.advantage == "rloo":
        return leave_one_out(totals).view(-1)[index]
    return group_relative(totals, stage.group_std).view(-1)[index]


def on_device(tokens: Sequence[Tokens], device: torch.device) -> list[Tokens]:
    """Move the tokens to the run's device in one copy: a copy per step would block each step."""
    names = [f.name for f in fields(Tokens) if getattr(tokens[0], f.name) is not None]
    columns = torch.stack([torch.cat([getattr(t, name) for t in tokens]) for name in names])
    parts = columns.to(device).split([len(t.logprobs) for t in tokens], dim=1)
    return [Tokens(**dict(zip(names, part, strict=True))) for part in parts]
