"""Optimizer, learning-rate schedule, and one step over summed gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dpo_cli.config import OptimConfig
from dpo_cli.distributed.fsdp import local_part
from dpo_cli.distributed.ranks import Ranks
from dpo_cli.errors import ConfigError, NonFiniteError

LR_SCALE = "lr_scale"  # key of a parameter group: factor on the learning rate


def build_optimizer(
    model: torch.nn.Module,
    config: OptimConfig,
    lr: float,
    heads: torch.nn.Module | None = None,
    heads_lr_scale: float = 1.0,
) -> Optimizer:
    """AdamW, RMSprop (the DPO paper's) or 8-bit AdamW over the trainable weights.

    heads: further modules to train, at `heads_lr_scale` times the model's learning rate.
    """
    groups = _decay_groups(model, config.weight_decay)
    if heads is not None:
        own = _decay_groups(heads, config.weight_decay)
        groups += [{**group, LR_SCALE: heads_lr_scale} for group in own]
    if config.name == "adamw":
        betas = (config.betas[0], config.betas[1])
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)
    if config.name == "rmsprop":
        # foreach, the default on CUDA, needs another copy of the whole state during the step.
        return torch.optim.RMSprop(groups, lr=lr, alpha=config.alpha, eps=config.eps, foreach=False)
    return _adamw_8bit(groups, config, lr)


def _adamw_8bit(groups: list[dict], config: OptimConfig, lr: float) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optim=adamw8bit needs bitsandbytes: install it or use optim=adamw"
        ) from error
    betas = (config.betas[0], config.betas[1])
    return AdamW8bit(groups, lr=lr, betas=betas, eps=config.eps)


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weight decay for matrices, none for biases and norm scales."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def warmup_steps(config: OptimConfig, total: int) -> int:
    """Number of warm-up steps; the last of them has the full learning rate."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_ratio * total)


def learning_rate(config: OptimConfig, peak: float, step: int, total: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant, or cosine or linear to 0."""
    warmup = warmup_steps(config, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "linear":
        return peak * (1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))


def global_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all gradients (for sharded ones over all ranks), on the device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms: list[Tensor] = []
    plain = [g for g in grads if not isinstance(g, DTensor)]
    sharded = [g for g in grads if isinstance(g, DTensor)]
    half = any(g.dtype == torch.bfloat16 for g in grads)  # a norm in bf16 has 3 digits
    if plain:
        norms += torch._foreach_norm(plain, 2, dtype=torch.float32 if half else None)
    if sharded:
        wide = [g.float() for g in sharded] if half else sharded
        norms.append(cast(DTensor, get_total_norm(wide)).full_tensor())
    return torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))


def sum_over_ranks(model: torch.nn.Module, ranks: Ranks) -> None:
    """All-reduce the gradients of replicated weights; FSDP has reduced those of sharded ones."""
    if ranks.size == 1:
        return
    for weight in model.parameters():
        if weight.grad is not None and not isinstance(weight.grad, DTensor):
            dist.all_reduce(weight.grad)


def take_step(
    model: torch.nn.Module, optimizer: Optimizer, weight: float, max_grad_norm: float, lr: float
) -> float:
    """Divide the summed gradients by the step's total weight, clip, and step.

    Returns the gradient norm before clipping. Raises NonFiniteError, changing nothing.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = float(global_grad_norm(parameters)) / weight
    if not math.isfinite(norm):
        raise NonFiniteError(f"the gradient norm is {norm}")
    clip = min(1.0, max_grad_norm / (norm + 1e-12)) if max_grad_norm > 0 else 1.0
    torch._foreach_mul_([local_part(cast(Tensor, p.grad)) for p in parameters], clip / weight)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
