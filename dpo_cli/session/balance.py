"""The auxiliary load-balancing loss of a mixture of experts, added to a stage's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel

from dpo_cli.config import RunConfig
from dpo_cli.model.routers import Routers
from dpo_cli.records import Batch, LossOutput

LossOf = Callable[[Batch], LossOutput]


def balanced(config: RunConfig, model: PreTrainedModel, compute: LossOf) -> LossOf:
    """`compute` plus `train.router_aux_loss_coef` times the policy's router loss on the
    micro-batch, with the same weight. ConfigError for a model without a router loss."""
    coefficient = config.train.router_aux_loss_coef
    if not coefficient:
        return compute
    routers = Routers(model, coefficient)

    def with_router_loss(batch: Batch) -> LossOutput:
        with routers.watched():
            out = compute(batch)
        router_loss = routers.loss(batch)
        if router_loss is None:
            return out
        metrics = {
            **out.metrics,
            "router_aux_loss": (out.weight * router_loss.detach(), out.weight),
        }
        total = out.loss_sum + coefficient * out.weight * router_loss
        return replace(out, loss_sum=total, metrics=metrics)

    return with_router_loss
