"""Log-probabilities of ranked responses, the input of every preference loss.

This module does not import torch at import time: the configuration, which is checked before torch
is loaded, reads the table of losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# u = pi / pi_ref -> f'(u), as functions of rho = log u and alpha, each 0 at rho = 0 (2309.16240,
# table 1; constants cancel in a difference).
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda rho, alpha: rho,
    "forward_kl": lambda rho, alpha: 1.0 - _exp(-rho),
    "jensen_shannon": lambda rho, alpha: 0.6931471805599453 + log_sigmoid(rho),
    "alpha": lambda rho, alpha: (1.0 - _exp(-alpha * rho)) / alpha,
}
LARGEST_EXPONENT = 80.0  # e^80 is still a float32


@dataclass(frozen=True)
class Comparisons:
    """Some of the pairs of E lists of K responses, at least one of each list.

    pairs: (P, 2) chosen and rejected, as places in the E K responses; lists: (P,) whose pair each
    is; weights: (P,) one over the number of pairs of that list.
    """

    pairs: Tensor
    lists: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RankedLogprobs:
    """Log-probabilities of K ranked responses to each of E prompts, best first.

    policy: (E, K) float32, summed over the tokens of a response.
    reference: the same of the reference; None for losses without a reference.
    lengths: (E, K) number of tokens of each response.
    compared: the pairs that are compared; None: all, the better one chosen.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    compared: Comparisons | None = None

    @property
    def logratios(self) -> Tensor:
        """rho = log pi - log pi_ref, (E, K); log pi without a reference."""
        return self.policy if self.reference is None else self.policy - self.reference

    @property
    def likelihoods(self) -> Tensor:
        """Log-probabilities per token, (E, K)."""
        return self.policy / self.lengths

    def pairs(self) -> RankedLogprobs:
        """The compared pairs, the chosen response first, (P, 2); all: P = E K (K - 1) / 2."""
        if self.compared is None and self.policy.shape[1] == 2:
            return self
        reference = None if self.reference is None else self._paired(self.reference)
        return RankedLogprobs(self._paired(self.policy), reference, self._paired(self.lengths))

    def _paired(self, values: Tensor) -> Tensor:
        if self.compared is None:
            return _all_pairs(values)
        return values.flatten()[self.compared.pairs]

    def mean_of_lists(self, losses: Tensor) -> Tensor:
        """(P,) values of the compared pairs -> (E,) their mean over each list."""
        if self.compared is None:
            return losses.view(len(self.policy), -1).mean(dim=1)
        sums = losses.new_zeros(len(self.policy))
        return sums.index_add(0, self.compared.lists, losses * self.compared.weights)

    def under(self, divergence: str, alpha: float) -> RankedLogprobs:
        """With f'(pi / pi_ref) of another divergence instead of the log-ratios."""
        if divergence == "reverse_kl":
            return self
        score = DIVERGENCES[divergence](self.logratios, alpha)
        return replace(self, policy=score, reference=None)


def _all_pairs(values: Tensor) -> Tensor:
    import torch

    # One slice per column: a list as an index would be copied to the device.
    columns = [
        torch.stack((values[:, better], values[:, worse]), dim=1)
        for better, worse in combinations(range(values.shape[1]), 2)
    ]
    return torch.stack(columns, dim=1).flatten(0, 1)


def difference(values: Tensor) -> Tensor:
    """(E, 2) -> (E,): of the chosen minus that of the rejected response."""
    assert values.shape[1] == 2, "pairwise losses take exactly two responses"
    return values[:, 0] - values[:, 1]


def log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def _exp(values: Tensor) -> Tensor:
    return values.clamp(max=LARGEST_EXPONENT).exp()


def smoothed_nll(logits: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z): each label is wrong with probability e."""
    right = -log_sigmoid(logits) * (1.0 - label_smoothing)
    return right - log_sigmoid(-logits) * label_smoothing
