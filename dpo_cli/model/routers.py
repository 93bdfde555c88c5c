"""Load-balancing auxiliary loss of mixtures of experts, by transformers' own function.

(Switch Transformers, arXiv 2101.03961 equations 4-6.) Sequences count as if unpacked: the prompt of
a packed row once per branch, padding never.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.interface import layout_for
from dpo_cli.records import Batch

KEY = "train.router_aux_loss_coef"
TOP_K = ("num_experts_per_tok", "moe_k", "moe_top_k")  # names of the experts per token
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def loss_function(family: type, coefficient: float) -> Callable[..., Tensor]:
    """transformers' loss function for a model class. ConfigError if it has none."""
    modules = [sys.modules[kind.__module__] for kind in family.__mro__]  # FSDP derives a class
    named = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    loss = next((function for function in named if function is not None), None)
    if loss is None or list(inspect.signature(loss).parameters) != ARGUMENTS or not _kinds(family):
        raise ConfigError(
            f"{KEY}={coefficient}: transformers has no load-balancing loss for "
            f"{family.__name__}: set {KEY}=0"
        )
    return loss


def _kinds(family: Any) -> list[OutputRecorder]:
    """The modules from which transformers records router logits."""
    recorded = (getattr(family, "_can_record_outputs", None) or {}).get("router_logits", [])
    listed = recorded if isinstance(recorded, list) else [recorded]
    return [kind for kind in listed if isinstance(kind, OutputRecorder)]


class Routers:
    """The routers of a loaded model, which record their logits within `watched`."""

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        self.model = model
        self.function = loss_function(type(model), coefficient)
        self.top_k = experts_per_token(model.config)
        self.seen: list[list[Tensor]] | None = None  # logits of each router, within `watched`
        self.logits: list[Tensor] = []
        count = 0
        for name, part in model.named_modules():
            for kind in _kinds(type(model)):
                if isinstance(part, kind.target_class) and (kind.layer_name or "") in name:
                    part.register_forward_hook(self._hook(count, kind.index))
                    count += 1
        self.count = count

    def _hook(self, number: int, index: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, given: Any, output: Any) -> None:
            # Without gradients the reference runs, which may be this model without its adapter.
            if self.seen is not None and torch.is_grad_enabled():
                logits = output[index] if isinstance(output, tuple) else output
                self.seen[number].append(logits.flatten(0, -2))

        return keep

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record logits of the forwards in the body, but not of recomputed blocks."""
        self.seen = [[] for _ in range(self.count)]
        try:
            yield
        finally:
            self.logits = [torch.cat(calls) for calls in self.seen if calls]
            self.seen = None

    def loss(self, batch: Batch) -> Tensor | None:
        """The loss of the row whose forward was recorded; None without gradients."""
        logits = self.logits
        if not logits:
            return None
        weights = layout_for(self.model, batch).spread(sequences_through(batch))
        return self.function(tuple(logits), logits[0].shape[-1], self.top_k, weights[None])


def experts_per_token(config: PretrainedConfig) -> int:
    text: Any = config.get_text_config()
    places = (text, getattr(text, "ffn_config", None))  # DBRX has a configuration inside
    return next(
        int(value) for place in places for name in TOP_K
        if (value := getattr(place, name, None)) is not None
    )  # fmt: skip


def sequences_through(batch: Batch) -> Tensor:
    """(T,) number of sequences that each packed token belongs to."""
    counts = [
        part for segment in batch.layout
        for part in (
            np.full(segment.prompt, max(1, len(segment.branches))),
            np.ones(sum(segment.branches)),
        )
    ]  # fmt: skip
    weights = torch.from_numpy(np.concatenate(counts).astype(np.float32))
    return weights.to(batch.input_ids.device)
