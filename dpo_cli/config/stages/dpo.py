"""Keys of the preference losses, and stage=dpo; which loss reads which, `losses.LOSSES` knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_cli.config.datasets import row_terms
from dpo_cli.config.keys import LOCAL, above, at_least, key, within
from dpo_cli.config.stages.base import (
    StageConfig,
    StageSpec,
    changed,
    frozen_reference_key,
    no_effect,
)
from dpo_cli.config.stages.shared import unpaired
from dpo_cli.losses import DIVERGENCES, LOSSES

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig

OF_REFERENCE = ("reference", "reference_logprobs")


@dataclass
class PreferenceConfig(StageConfig):
    """Preference losses, against a reference."""

    default_lr: float = key(
        1e-6, "of full fine-tuning; optim.lr takes precedence", bound=at_least(0, 1)
    )
    loss: str = key("sigmoid", "sigmoid is DPO's own", choices=tuple(LOSSES))
    beta: float = key(
        0.1,
        "strength of the KL penalty towards the reference (ipo: tau; simpo, cpo: scale of the "
        "reward; orpo: lambda)",
        bound=above(0, 1e6),
    )
    label_smoothing: float = key(
        0.0, "probability that a label is flipped (sigmoid: cDPO; robust; exo needs one, as 0.001)",
        bound=within("[0, 0.5)"),
    )  # fmt: skip
    length_normalized: bool = key(
        False, "divide log-ratios by the response's tokens", old="length_normalised"
    )
    nll_weight: float = key(
        0.0, "weight of the chosen response's NLL per token (RPO)", bound=at_least(0, 1e6)
    )
    alpha: float = key(0.1, "unlikelihood: weight of the rejected response", bound=at_least(0, 1e6))
    simpo_gamma: float = key(1.0, "simpo: the reward margin to reach", bound=at_least(0, 1e6))
    dpop_lambda: float = key(
        50.0, "dpop: weight of a chosen response that became less likely", bound=at_least(0, 1e6)
    )
    length_penalty: float = key(
        0.05, "rdpo: reward that a token of length is taken to be worth", bound=at_least(0, 1e6)
    )
    discopop_tau: float = key(0.05, "discopop: temperature of its mixture", bound=above(0, 1e6))
    divergence: str = key(
        "reverse_kl", "f-divergence from the reference; reverse_kl is DPO's own",
        choices=tuple(DIVERGENCES),
    )  # fmt: skip
    divergence_alpha: float = key(
        0.5, "divergence=alpha: towards 0 reverse_kl, towards 1 forward_kl", bound=within("(0, 1)")
    )
    ld_alpha: float | None = key(
        None, "LD-DPO: weight of the tokens beyond the shortest response's length; null: 1",
        bound=within("[0, 1]"),
    )  # fmt: skip
    loss_file: str | None = key(
        None, "loss=file: a Python file with loss(logprobs, beta), which runs as yourself",
        path=LOCAL, code=True,
    )  # fmt: skip
    extra_losses: dict[str, float] = key(
        {}, "losses added to stage.loss, each with its weight, such as {bco: 0.2}"
    )
    reference: str | None = frozen_reference_key()


@dataclass
class DpoConfig(PreferenceConfig):
    """Preference losses on pairs, against a frozen reference."""

    name: str = key("dpo", "which stage")
    reference_logprobs: str = key(
        "cached", "cached: one pass before training | live: every step",
        choices=("cached", "live"),
    )  # fmt: skip


def losses_of(stage: PreferenceConfig) -> dict[str, float]:
    """The losses of a run and their weights, `stage.loss` first."""
    return {stage.loss: 1.0, **stage.extra_losses}


def reads_reference(stage: PreferenceConfig) -> bool:
    """Whether any loss of the run compares with a reference."""
    return any(LOSSES[name].reference for name in losses_of(stage))


def problems(config: RunConfig) -> Iterator[str]:
    stage = cast(DpoConfig, config.stage)
    yield from unpaired(config)
    yield from loss_problems(stage, OF_REFERENCE)
    if all(name in LOSSES for name in losses_of(stage)):
        yield from _unable(config, stage)


def loss_problems(stage: PreferenceConfig, of_reference: Sequence[str]) -> Iterator[str]:
    """Options that the chosen losses would silently ignore or cannot take.

    of_reference: keys that losses without a reference do not read.
    """
    if stage.loss not in LOSSES:
        return  # reported as an unknown choice
    if wrong := list(_wrong_extra_losses(stage)):
        yield from wrong
        return
    chosen = [LOSSES[name] for name in losses_of(stage)]
    options = frozenset[str]().union(*(loss.options for loss in LOSSES.values()))
    unread = sorted(options.difference(*(loss.options for loss in chosen)))
    if not reads_reference(stage):
        unread += of_reference
    losses = " and ".join(losses_of(stage))
    for name, value in changed(stage, unread):
        yield no_effect(name, value, f"stage.loss={losses}")
    if stage.divergence != "alpha" and "divergence_alpha" not in unread:
        for name, value in changed(stage, ["divergence_alpha"]):
            yield no_effect(name, value, f"stage.divergence={stage.divergence}")
    if "file" in losses_of(stage) and not stage.loss_file:
        yield "stage.loss=file needs stage.loss_file=<Python file with loss(logprobs, beta)>"
    if "exo" in losses_of(stage) and stage.label_smoothing == 0:
        yield "stage.label_smoothing=0: exo needs one above 0; its paper takes 0.001"


def _unable(config: RunConfig, stage: PreferenceConfig) -> Iterator[str]:
    """Numbers of the rows that a loss cannot take."""
    for term, field in (columns := row_terms(config.data)).items():
        if unable := [name for name in losses_of(stage) if term not in LOSSES[name].terms]:
            able = ", ".join(name for name, loss in LOSSES.items() if term in loss.terms)
            yield f"data.{term}_field={field}: stage.loss={unable[0]} takes none, only {able} do"
    if "smoothing" in columns:
        for name, value in changed(stage, ["label_smoothing"]):
            yield no_effect(name, value, f"data.smoothing_field={columns['smoothing']}")


def _wrong_extra_losses(stage: PreferenceConfig) -> Iterator[str]:
    for name, weight in stage.extra_losses.items():
        if name not in LOSSES:
            yield f"stage.extra_losses: {name} is none of {', '.join(LOSSES)}"
        elif name == stage.loss:
            yield f"stage.extra_losses: {name} is stage.loss already"
        elif (
            isinstance(weight, bool)
            or not isinstance(weight, (int, float))
            or not (0 < weight <= 1e6)
        ):
            yield (
                f"stage.extra_losses: the weight of {name} must be a number above 0, at most 1e6, "
                f"not {weight}"
            )


SPEC = StageSpec(
    DpoConfig,
    title="DPO",
    method="Direct Preference Optimization",
    trains=True,
    reference=reads_reference,
    paired=True,
    reported=True,
    unit="pair",
    best_metrics={
        "loss": "lowest", "rewards/accuracies": "highest", "rewards/margins": "highest"
    },
    problems=problems,
)  # fmt: skip
