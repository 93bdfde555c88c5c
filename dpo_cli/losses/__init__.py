"""Preference losses as pure functions of log-probabilities, and their table.

rho = log pi(y|x) - log pi_ref(y|x), (E, K), responses best first; h = rho_w - rho_l.
A loss returns one value per example, (E,). Lengths count a response's scored tokens.
A new loss is a function here, a `LOSSES` line and its row in `config.LOSS_FACTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RankedLogprobs:
    """Log-probabilities of K ranked responses to each of E prompts.

    policy, reference: (E, K) float32, summed over the tokens of a response.
    lengths: (E, K) number of tokens of each response.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor

    @property
    def logratios(self) -> Tensor:
        """rho, (E, K)."""
        return self.policy - self.reference


def _pair_difference(rho: Tensor) -> Tensor:
    assert rho.shape[1] == 2, "pairwise losses take exactly two responses"
    return rho[:, 0] - rho[:, 1]


def sigmoid_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with label_smoothing e the conservative cDPO.

    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h). `length_normalized`: each rho is divided
    by its response's length first.
    """
    rho = logprobs.logratios / logprobs.lengths if length_normalized else logprobs.logratios
    return _smoothed_nll(beta * _pair_difference(rho), label_smoothing)


def _smoothed_nll(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z): each label is wrong with probability e."""
    right = -F.logsigmoid(logits) * (1.0 - label_smoothing)
    return right - F.logsigmoid(-logits) * label_smoothing


def hinge_loss(
    logprobs: RankedLogprobs, beta: float = 0.1, length_normalized: bool = False
) -> Tensor:
    """relu(1 - beta h), SLiC-HF (arXiv 2305.10425) on log-ratios as in RSO (2309.06657)."""
    rho = logprobs.logratios / logprobs.lengths if length_normalized else logprobs.logratios
    return torch.relu(1.0 - beta * _pair_difference(rho))


def ipo_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """(h - 1/(2 tau))^2 with tau = beta and rho averaged over tokens, arXiv 2310.12036 eq. 17."""
    h = _pair_difference(logprobs.logratios / logprobs.lengths)
    return (h - 1.0 / (2.0 * beta)) ** 2


def unlikelihood_loss(logprobs: RankedLogprobs, alpha: float = 0.1) -> Tensor:
    """-(log pi(y_w) - alpha log pi(y_l)): the paper's Unlikelihood baseline; no reference."""
    return -(logprobs.policy[:, 0] - alpha * logprobs.policy[:, 1])


def plackett_luce_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """DPO on a ranked list, arXiv 2305.18290 eq. 20 (appendix A.3); K = 2 is plain DPO.

    -sum_k [beta rho_k - logsumexp_{j >= k} beta rho_j]
    """
    return ranking_nll(beta * logprobs.logratios)


def ranking_nll(scores: Tensor) -> Tensor:
    """-log P of the ranking under Plackett-Luce, (E,). scores: (E, K), best first."""
    tails = torch.logcumsumexp(scores.flip(1), dim=1).flip(1)  # (E, K) over j >= k
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
        losses = _smoothed_nll(logits if margins is None else logits - margins, label_smoothing)
    else:
        assert margins is None and label_smoothing == 0.0, "for pairs only"
        losses = ranking_nll(rewards)
    return losses + center_coefficient * rewards.sum(dim=1) ** 2


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "unlikelihood": unlikelihood_loss,
    "plackett_luce": plackett_luce_loss,
}


ROUNDING = 2.0**-20  # relative error of a difference of float32 sums


def preferences(margins: Tensor, sizes: Tensor) -> Tensor:
    """(E,) 1 if the chosen response ranks above the rejected one, 0 if below, and 1/2 if the margin
    is zero up to rounding, as for a policy that equals its reference: the same tokens in another
    packed row differ in the last bits. sizes: (E,) sums of the absolute log-probabilities whose
    difference a margin is."""
    right = (margins.sign() + 1.0) / 2.0
    return torch.where(margins.abs() <= ROUNDING * sizes, 0.5, right)
