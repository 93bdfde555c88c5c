"""Losses on pairs: rho = log pi(y|x) - log pi_ref(y|x); h = rho_w - rho_l; r = beta rho.

Each returns one value per pair, (E,), of (E, 2) log-probabilities. label_smoothing and the margin
that beta h must exceed may be those of each pair, (E,).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dpo_cli.losses.ranked import RankedLogprobs, difference, log_sigmoid, smoothed_nll
from dpo_cli.user_code import user_function

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    length_normalized: bool = False,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with label_smoothing e the conservative cDPO.

    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h). `length_normalized`: each rho is divided
    by its response's length first.
    """
    rho = logprobs.logratios / logprobs.lengths if length_normalized else logprobs.logratios
    return smoothed_nll(beta * difference(rho) - margin, label_smoothing)


def robust_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """rDPO, 2403.00409 eq. 12: DPO's loss on clean labels, estimated without bias from labels that
    are flipped with probability e.

    [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e)
    """
    logits = beta * difference(logprobs.logratios) - margin
    right, wrong = -log_sigmoid(logits), -log_sigmoid(-logits)
    return (right * (1.0 - label_smoothing) - wrong * label_smoothing) / (1.0 - 2 * label_smoothing)


def hinge_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    length_normalized: bool = False,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """relu(1 - beta h), SLiC-HF (arXiv 2305.10425) on log-ratios as in RSO (2309.06657)."""
    rho = logprobs.logratios / logprobs.lengths if length_normalized else logprobs.logratios
    return (1.0 - (beta * difference(rho) - margin)).relu()


def ipo_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """(h - 1/(2 tau))^2 with tau = beta and rho averaged over tokens, arXiv 2310.12036 eq. 17."""
    return (difference(logprobs.logratios / logprobs.lengths) - 1.0 / (2.0 * beta)) ** 2


def ipo_sum_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """IPO as in its paper (2310.12036 eq. 17): rho summed over tokens."""
    return (difference(logprobs.logratios) - 1.0 / (2.0 * beta)) ** 2


def exo_loss(logprobs: RankedLogprobs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """EXO on pairs, 2402.00856 eq. 16: KL(q || p) with q = sigmoid(beta h) of the chosen response
    and p = 1 - e. label_smoothing must be above 0; the paper takes 0.001."""
    logits = beta * difference(logprobs.logratios)
    log_right, log_wrong = log_sigmoid(logits), log_sigmoid(-logits)
    right = log_right.exp() * (log_right - math.log1p(-label_smoothing))
    return right + log_wrong.exp() * (log_wrong - math.log(label_smoothing))


def dpop_loss(logprobs: RankedLogprobs, beta: float = 0.1, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive, 2402.13228 eq. 3: a chosen response must not become less likely.

    -log sigmoid(beta (h - lambda max(0, -rho_w)))
    """
    rho = logprobs.logratios
    return -log_sigmoid(beta * (difference(rho) - dpop_lambda * (-rho[:, 0]).relu()))


def rdpo_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    length_penalty: float = 0.05,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """R-DPO, 2403.19159 eq. 9: the reward is beta rho plus a length term that absorbs the
    preference for length.

    -log sigmoid(beta h + alpha (|y_w| - |y_l|)), alpha = length_penalty
    """
    longer = difference(logprobs.lengths)
    return -log_sigmoid(beta * difference(logprobs.logratios) + length_penalty * longer - margin)


def nca_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """NCA on pairs, 2402.05369: -log sigmoid(r_w) - 1/2 sum over both of log sigmoid(-r)."""
    reward = beta * logprobs.logratios
    return -log_sigmoid(reward[:, 0]) - 0.5 * log_sigmoid(-reward).sum(dim=1)


def bco_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """BCO on pairs, 2404.04656, without its reward shift (delta = 0, as in TRL's bco_pair).

    -log sigmoid(r_w) - log sigmoid(-r_l)
    """
    reward = beta * logprobs.logratios
    return -log_sigmoid(reward[:, 0]) - log_sigmoid(-reward[:, 1])


def sppo_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """SPPO, 2405.00675 eq. 4.7, hard labels: (rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2."""
    rho, half = logprobs.logratios, 0.5 / beta
    return (rho[:, 0] - half) ** 2 + (rho[:, 1] + half) ** 2


def aot_loss(logprobs: RankedLogprobs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT on paired data, 2406.05882: the distribution of log pi_w - log pi_l should dominate the
    reference's, so both are sorted over the E pairs first; not a sum over pairs."""
    assert logprobs.reference is not None
    policy = difference(logprobs.policy).sort().values
    reference = difference(logprobs.reference).sort().values
    return smoothed_nll(beta * (policy - reference), label_smoothing)


def apo_zero_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """APO-zero, 2408.06266 eq. 7: 1 - sigmoid(r_w) + sigmoid(r_l); for chosen responses that are
    better than the model's own."""
    reward = beta * logprobs.logratios
    return (-reward[:, 0]).sigmoid() + reward[:, 1].sigmoid()


def apo_down_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """APO-down, 2408.06266 eq. 8: sigmoid(r_w) + 1 - sigmoid(r_w - r_l); for chosen responses that
    are worse than the model's own."""
    reward = beta * logprobs.logratios
    return reward[:, 0].sigmoid() + (-difference(reward)).sigmoid()


def discopop_loss(
    logprobs: RankedLogprobs, beta: float = 0.1, discopop_tau: float = 0.05
) -> Tensor:
    """DiscoPOP, 2406.08414 eq. 5: with z = beta h and m = sigmoid(z / tau),
    (1 - m) (-log sigmoid(z)) + m exp(-z)."""
    logits = beta * difference(logprobs.logratios)
    mixed = (logits / discopop_tau).sigmoid()
    # exp(-z) counts only where z is large; elsewhere it must not overflow to inf * 0.
    return -log_sigmoid(logits) * (1.0 - mixed) + (-logits).clamp(max=80.0).exp() * mixed


def file_loss(logprobs: RankedLogprobs, beta: float = 0.1, loss_file: str | None = None) -> Tensor:
    """`loss(logprobs, beta)` of the user's file: (E, 2) log-probabilities -> (E,)."""
    assert loss_file is not None  # checked with the configuration
    own = user_function("stage.loss_file", loss_file, "loss")
    losses: Tensor = own(logprobs, beta)
    shape = tuple(getattr(losses, "shape", ()))
    if shape != (len(logprobs.policy),):
        raise own.wrong(f"loss() returned shape {shape}, not one loss per pair")
    return losses


def unlikelihood_loss(logprobs: RankedLogprobs, alpha: float = 0.1) -> Tensor:
    """-(log pi(y_w) - alpha log pi(y_l)): the paper's Unlikelihood baseline; no reference."""
    return -(logprobs.policy[:, 0] - alpha * logprobs.policy[:, 1])


def simpo_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    simpo_gamma: float = 1.0,
    label_smoothing: float | Tensor = 0.0,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """SimPO, 2405.14734 eq. 6, without a reference: the reward is beta log pi per token.

    -log sigmoid(beta (log pi_w / |y_w| - log pi_l / |y_l|) - gamma); the paper takes beta 2 to 10.
    """
    logits = beta * difference(logprobs.likelihoods) - simpo_gamma
    return smoothed_nll(logits - margin, label_smoothing)


def cpo_loss(
    logprobs: RankedLogprobs,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """CPO, 2401.08417 eq. 5, without a reference: -log sigmoid(beta (log pi_w - log pi_l)) plus
    the chosen response's NLL per token."""
    preferred = smoothed_nll(beta * difference(logprobs.policy) - margin, label_smoothing)
    return preferred - logprobs.likelihoods[:, 0]


def orpo_loss(logprobs: RankedLogprobs, beta: float = 0.1) -> Tensor:
    """ORPO, 2403.07691 eq. 6, without a reference; lambda = beta.

    NLL per token of the chosen response - lambda log sigmoid(log odds_w - log odds_l), where the
    odds are P / (1 - P) of P = exp(log pi / |y|).
    """
    mean = logprobs.likelihoods.clamp(max=-1e-6)  # at P = 1 the odds are infinite
    log_odds = mean - (-mean.expm1()).log()
    return -logprobs.likelihoods[:, 0] - beta * log_sigmoid(difference(log_odds))
