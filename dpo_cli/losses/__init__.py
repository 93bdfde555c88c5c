"""Preference losses: pure functions of log-probabilities, and their table.

A new loss is one function and one line of `LOSSES`. The keys of `stage=dpo` that it reads are
the names of its arguments. Free of torch until a loss is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dpo_cli.losses.pairwise import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    discopop_loss,
    dpop_loss,
    exo_loss,
    file_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    nca_loss,
    orpo_loss,
    rdpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
    sppo_loss,
    unlikelihood_loss,
)
from dpo_cli.losses.ranked import DIVERGENCES, Comparisons, RankedLogprobs
from dpo_cli.losses.ranking import plackett_luce_loss, ranking_nll, reward_loss

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "ROW_ARGUMENTS",
    "Comparisons",
    "Loss",
    "RankedLogprobs",
    "preferences",
    "ranking_nll",
    "reward_loss",
]

OF_EVERY_LOSS = frozenset({"nll_weight", "ld_alpha", "extra_losses"})
ROW_ARGUMENTS = {"smoothing": "label_smoothing", "margin": "margin"}  # of rows -> the losses'
OF_DIVERGENCES = frozenset({"divergence", "divergence_alpha"})


@dataclass(frozen=True)
class Loss:
    """compute: (logprobs, **keys) -> (E,) losses of (E, 2) log-probabilities, or (E, K) of lists.

    title: what pages call training with it; method: what a model card says the model is the
    result of. lists: it ranks K responses itself; the others are averaged over all pairs of a list.
    reference: it compares with one. difference: of log-ratios alone, so that those of another
    divergence may stand for them. together: it needs all pairs of a pack at once.
    """

    compute: Callable[..., Tensor]
    title: str
    method: str
    lists: bool = False
    reference: bool = True
    difference: bool = False
    together: bool = False

    @cached_property
    def arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.compute).parameters) - {"logprobs", "margin"}

    @cached_property
    def terms(self) -> frozenset[str]:
        """The numbers of rows (`data.<name>_field`) that it can take."""
        if self.together:
            return frozenset()  # what it compares belongs to no single row
        takes = inspect.signature(self.compute).parameters
        own = {
            term
            for term, argument in ROW_ARGUMENTS.items()
            if argument in takes and "Tensor" in takes[argument].annotation
        }
        return frozenset({"weight", *own})

    @property
    def options(self) -> frozenset[str]:
        """The keys of `stage=dpo` that it reads."""
        return self.arguments | OF_EVERY_LOSS | (OF_DIVERGENCES if self.difference else frozenset())


_DPO = "Direct Preference Optimization"
LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid_loss, "DPO", _DPO, difference=True),
    "robust": Loss(robust_loss, "rDPO", f"robust {_DPO} (rDPO)", difference=True),
    "hinge": Loss(
        hinge_loss, "DPO with the hinge loss", f"{_DPO} with the hinge loss (SLiC)", difference=True
    ),
    "ipo": Loss(ipo_loss, "IPO", "Identity Preference Optimization", difference=True),
    "ipo_sum": Loss(
        ipo_sum_loss, "IPO on summed log-ratios",
        "Identity Preference Optimization on summed log-ratios", difference=True,
    ),
    "exo": Loss(exo_loss, "EXO", "Efficient Exact Optimization (EXO)", difference=True),
    "dpop": Loss(dpop_loss, "DPOP", "DPO-Positive"),
    "rdpo": Loss(rdpo_loss, "R-DPO", f"length-regularized {_DPO} (R-DPO)"),
    "nca": Loss(nca_loss, "NCA", "Noise Contrastive Alignment"),
    "bco": Loss(bco_loss, "BCO", "Binary Classifier Optimization"),
    "sppo": Loss(sppo_loss, "SPPO", "Self-Play Preference Optimization (hard labels)"),
    "aot": Loss(aot_loss, "AOT", "Alignment via Optimal Transport", together=True),
    "apo_zero": Loss(apo_zero_loss, "APO-zero", "Anchored Preference Optimization (APO-zero)"),
    "apo_down": Loss(apo_down_loss, "APO-down", "Anchored Preference Optimization (APO-down)"),
    "discopop": Loss(discopop_loss, "DiscoPOP", "DiscoPOP", difference=True),
    "unlikelihood": Loss(
        unlikelihood_loss, "Unlikelihood", "unlikelihood training on pairs", reference=False
    ),
    "simpo": Loss(simpo_loss, "SimPO", "Simple Preference Optimization", reference=False),
    "cpo": Loss(cpo_loss, "CPO", "Contrastive Preference Optimization", reference=False),
    "orpo": Loss(orpo_loss, "ORPO", "Odds Ratio Preference Optimization", reference=False),
    "file": Loss(file_loss, "DPO with a loss of its own", "training with a loss of its own"),
    "plackett_luce": Loss(
        plackett_luce_loss, "Plackett-Luce DPO", f"{_DPO} on rankings (Plackett-Luce)", lists=True
    ),
}  # fmt: skip

ROUNDING = 2.0**-20  # relative error of a difference of float32 sums


def preferences(margins: Tensor, sizes: Tensor) -> Tensor:
    """(E,) 1 if the chosen response ranks above the rejected one, 0 if below, and 1/2 if the margin
    is zero up to rounding, as for a policy that equals its reference: the same tokens in another
    packed row differ in the last bits. sizes: (E,) sums of the absolute log-probabilities whose
    difference a margin is."""
    right = (margins.sign() + 1.0) / 2.0
    return right.masked_fill(margins.abs() <= ROUNDING * sizes, 0.5)
