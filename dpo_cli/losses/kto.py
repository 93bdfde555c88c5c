"""Losses on single responses, each labelled desirable or not.

rho = log pi(y|x) - log pi_ref(y|x), (E,); r = beta rho. Each returns (E,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.losses.ranked import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def kl_estimate(logratios: Tensor) -> Tensor:
    """z_0 of KTO, a scalar without gradient: the mean log-ratio of responses to other prompts,
    (E,), at least 0 (arXiv 2402.01306, section 4.1)."""
    return logratios.detach().mean().clamp(min=0.0)


def kto_loss(logratios: Tensor, desirable: Tensor, shift: Tensor, beta: float) -> Tensor:
    """KTO, arXiv 2402.01306 eq. 8: 1 - sigmoid(beta (rho - z_0)) of a desirable response,
    1 - sigmoid(beta (z_0 - rho)) of another. desirable: (E,) bool; shift: z_0."""
    advantage = beta * (logratios - shift)
    return advantage.where(~desirable, -advantage).sigmoid()


def bco_loss(logratios: Tensor, desirable: Tensor, shift: Tensor, beta: float) -> Tensor:
    """BCO, arXiv 2404.04656 eq. 15: the classifier -log sigmoid(+-(beta rho - delta)).

    shift: delta, (mean reward of desirable + mean of undesirable) / 2. The paper averages it over
    past batches; here it is that of the pack.
    """
    reward = beta * logratios - shift
    return -log_sigmoid(reward.where(desirable, -reward))


def apo_zero_loss(logratios: Tensor, desirable: Tensor, shift: Tensor, beta: float) -> Tensor:
    """APO-zero on single responses, arXiv 2408.06266 eq. 7: KTO with z_0 = 0."""
    return kto_loss(logratios, desirable, shift, beta)


def no_shift(logratios: Tensor, desirable: Tensor, beta: float) -> Tensor:
    return logratios.new_zeros(())


def mean_reward(logratios: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """delta of BCO, without gradient; the mean of one class if the other is absent."""
    reward, right = beta * logratios.detach(), desirable.float()
    counts = right.sum(), (1.0 - right).sum()
    sums = (reward * right).sum(), (reward * (1.0 - right)).sum()
    present = sum(count.clamp(max=1.0) for count in counts)
    means = [total / count.clamp(min=1.0) for total, count in zip(sums, counts, strict=True)]
    return (means[0] + means[1]) / present


@dataclass(frozen=True)
class SingleLoss:
    """compute: (logratios, desirable, shift, beta) -> (E,). shift: of the pack's (E,) log-ratios.
    mismatched: the shift is KTO's, of responses to other prompts."""

    compute: Callable[..., Tensor]
    title: str
    method: str
    shift: Callable[[Tensor, Tensor, float], Tensor] = no_shift
    mismatched: bool = False


SINGLE_LOSSES: dict[str, SingleLoss] = {
    "kto": SingleLoss(kto_loss, "KTO", "Kahneman-Tversky Optimization", mismatched=True),
    "bco": SingleLoss(
        bco_loss, "BCO", "Binary Classifier Optimization", shift=mean_reward
    ),
    "apo_zero": SingleLoss(
        apo_zero_loss, "APO-zero", "Anchored Preference Optimization (APO-zero)"
    ),
}  # fmt: skip
