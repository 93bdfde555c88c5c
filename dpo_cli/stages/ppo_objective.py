"""The objective of stage=ppo-baseline on a pack."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from dpo_cli.config import PpoConfig
from dpo_cli.logprobs import fused_loss, sum_by_sequence
from dpo_cli.losses.ppo import kl_penalty, policy_loss, token_shares, value_loss
from dpo_cli.model.forward import head_of, target_states
from dpo_cli.records import Batch, LossOutput
from dpo_cli.session.lengths import new_tokens
from dpo_cli.stages.advantages import Tokens
from dpo_cli.stages.rollout import Actors, Rollout, at_temperature, values_of


def ppo_loss(actors: Actors, batch: Batch, rollout: Rollout, stage: PpoConfig) -> LossOutput:
    """Clipped policy loss, and value loss and KL penalty if there are any, summed over tokens; the
    step divides by the number of tokens or completions (`stage.loss_average`)."""
    tokens = [rollout.tokens[i] for i in batch.places]
    old, advantages = column(tokens, "logprobs"), column(tokens, "advantages")
    penalty = rollout.figures["kl_coef"] if stage.kl_in == "loss" else 0.0
    reference = column(tokens, "reference") if penalty else None
    hidden = target_states(actors.policy, batch)
    ends = np.cumsum([0, *batch.counts])
    lengths = batch.sequence_lengths[batch.sequence_index]
    shares = token_shares(lengths, stage.loss_average, new_tokens(stage))
    trust = torch.zeros_like(old)  # 1 where a completion's mean ratio is acceptable
    losses, ratios, kls = (torch.zeros_like(old) for _ in range(3))

    def loss_of(logprobs: Tensor, examples: slice) -> Tensor:
        part = slice(int(ends[examples.start]), int(ends[examples.stop]))
        loss, ratio = policy_loss(logprobs, old[part], advantages[part], stage.clip_range)
        index = batch.sequence_index[part]
        sums = sum_by_sequence(ratio.detach(), index, len(batch.sequence_lengths))
        mean = sums / batch.sequence_lengths
        trust[part] = (mean <= stage.ratio_limit)[index].to(loss.dtype)
        losses[part], ratios[part] = loss.detach(), ratio.detach()
        if reference is not None:
            kl = penalty * kl_penalty(logprobs - reference[part], stage.kl_estimator)
            loss, kls[part] = loss + kl, kl.detach()
        return torch.where(trust[part] > 0, shares[part] * loss, 0.0).sum()

    head = at_temperature(head_of(actors.policy), stage.temperature)
    total, logprobs = fused_loss(hidden, head, batch.targets, batch.counts, loss_of)
    count = float(len(old))
    weight = count if stage.loss_average == "tokens" else float(len(batch.sequence_lengths))
    change = (logprobs - old) * trust
    figures = {
        "policy_loss": ((losses * trust * shares).sum(), weight),
        "clip_fraction": (((ratios - 1.0).abs() > stage.clip_range).float().sum(), count),
        "approx_kl": ((change.exp() - 1.0 - change).sum(), count),
        "skipped": ((1.0 - trust).sum(), count),
    }
    if reference is not None:
        figures["kl_loss"] = ((kls * trust * shares).sum(), weight)
    if actors.value_head is not None:
        values = values_of(actors.value_head, hidden), column(tokens, "values")
        errors = value_loss(*values, column(tokens, "returns"), stage.value_clip_range)
        critic = (shares * errors).sum()
        figures["value_loss"] = (critic.detach(), weight)
        total = total + stage.vf_coef * critic
    return LossOutput(total, weight, figures)


def column(tokens: list[Tokens], name: str) -> Tensor:
    """(N,) values of the pack's tokens."""
    return torch.cat([cast(Tensor, getattr(own, name)) for own in tokens])
