"""Losses on lists of K responses, best first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.losses.ranked import RankedLogprobs, smoothed_nll

if TYPE_CHECKING:
    from torch import Tensor


def plackett_luce_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """DPO on a ranked list, arXiv 2305.18290 eq. 20 (appendix A.3); K = 2 is plain DPO.

    -sum_k [beta rho_k - logsumexp_{j >= k} beta rho_j]
    """
    return ranking_nll(beta * logprobs.logratios)


def ranking_nll(scores: Tensor) -> Tensor:
    """-log P of the ranking under Plackett-Luce, (E,). scores: (E, K), best first."""
    tails = scores.flip(1).logcumsumexp(dim=1).flip(1)  # (E, K) over j >= k
    return (tails - scores).sum(dim=1)


def reward_loss(
    rewards: Tensor,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of the ranking under a reward model, (E,).

    rewards: (E, K), best first. Pairs: -log sigmoid(r_w - r_l - m), the Bradley-Terry model
    (arXiv 2203.02155 eq. 1) with the margins m of Llama 2 (2307.09288 eq. 2), (E,), and label
    smoothing as in cDPO. Longer lists: Plackett-Luce, without margins and smoothing. The centering
    term c (sum_k r_k)^2 keeps rewards around zero (2312.09244 eq. 2).
    """
    if rewards.shape[1] == 2:
        logits = rewards[:, 0] - rewards[:, 1]
        losses = smoothed_nll(logits if margins is None else logits - margins, label_smoothing)
    else:
        assert margins is None and label_smoothing == 0.0, "for pairs only"
        losses = ranking_nll(rewards)
    return losses + center_coefficient * rewards.sum(dim=1) ** 2
