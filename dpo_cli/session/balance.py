"""The auxiliary loss of a mixture of experts, added to a stage's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel

from dpo_cli.config import RunConfig
from dpo_cli.model.routers import Routers
from dpo_cli.records import Batch, LossOutput

LossOf = Callable[[Batch], LossOutput]


def balanced(config: RunConfig, model: PreTrainedModel, compute: LossOf) -> LossOf:
    """`compute` of a micro-batch with `train.router_aux_loss_coef` times the router loss of the
    policy on it, which the step's mean weighs as it weighs the micro-batch. ConfigError for a
    model without such a loss."""
    coefficient = config.train.router_aux_loss_coef
    if not coefficient:
        return compute
    routers = Routers(model, coefficient)

    def with_router_loss(batch: Batch) -> LossOutput:
        with routers.watched():
            out = compute(batch)
        found = routers.loss(batch)
        if found is None:
            return out
        metrics = {**out.metrics, "router_aux_loss": (out.weight * found.detach(), out.weight)}
        total = out.loss_sum + coefficient * out.weight * found
        return replace(out, loss_sum=total, metrics=metrics)

    return with_router_loss
