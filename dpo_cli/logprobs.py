"""Log-probabilities of target tokens, without ever holding logits of shape (N, V).

Only the N hidden states that predict a target meet the output embedding, in chunks;
the backward recomputes each chunk's logits. Log-sum-exp is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}  # of float32 logits alive at once


@dataclass(frozen=True)
class Head:
    """A model's output layer: logits = cap(scale * (h W^T + b)).

    weight: (V, D); bias: (V,) or None; scale: Cohere's logit_scale, 1/Granite's
    logits_scaling; softcap: Gemma 2's final_logit_softcapping (cap(z) = c tanh(z/c)).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def rows_per_chunk(self) -> int:
        budget = CHUNK_BYTES.get(self.weight.device.type, CHUNK_BYTES["cpu"])
        return max(16, budget // (4 * self.weight.shape[0]))

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype: once, not once a chunk."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast's dtype, else the input's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def promote(logits: Tensor) -> Tensor:
    """Float32, in which log-softmax is taken; float64 stays (for the exactness tests)."""
    return logits if logits.dtype == torch.float64 else logits.float()


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(n, D) -> (n, V), float32 (float64 stays), computed in the head's dtype. For one chunk."""
    weight, bias = head.weight, head.bias
    logits = promote(torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias))
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


class _TargetLogprobs(torch.autograd.Function):
    """log softmax(head(h))[target] with a recomputing, chunked backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                scale: float, softcap: float | None) -> Tensor:  # fmt: skip
        dtype = _compute_dtype(hidden)
        head = Head(weight, bias, scale, softcap).cast(dtype)
        rows = head.rows_per_chunk()
        parts = []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = logits_of(h, head)
            picked = logits.gather(1, t[:, None]).squeeze(1)
            parts.append(picked - logits.logsumexp(dim=1))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale, ctx.softcap, ctx.dtype = scale, softcap, dtype
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_logprobs, dtype = grad_outputs[0], ctx.dtype
        rows = Head(weight).rows_per_chunk()
        need_weight = ctx.needs_input_grad[1]
        need_bias = bias is not None and ctx.needs_input_grad[2]
        head = Head(weight, bias, ctx.scale, ctx.softcap).cast(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        start = 0
        for h, t, g in zip(
            hidden.split(rows), targets.split(rows), grad_logprobs.split(rows), strict=True
        ):
            chunk = slice(start, start + len(h))
            start += len(h)
            logits = logits_of(h, head)
            grad = torch.softmax(logits, dim=1).neg_()  # d logp / d logits = onehot - p
            grad.scatter_add_(1, t[:, None], torch.ones_like(g[:, None]))
            grad.mul_(g[:, None])
            if ctx.softcap is not None:
                grad.mul_(1.0 - (logits / ctx.softcap) ** 2)
            if ctx.scale != 1.0:
                grad.mul_(ctx.scale)
            low = grad.to(dtype)
            grad_hidden[chunk] = low @ head.weight
            if grad_weight is not None:
                grad_weight += low.t() @ h.to(dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """(N, D) hidden states, (N,) token ids -> (N,) log-probabilities, float32."""
    return _TargetLogprobs.apply(hidden, head.weight, head.bias, targets, head.scale, head.softcap)


def sum_by_sequence(values: Tensor, sequence_index: Tensor, sequences: int) -> Tensor:
    """(N,) values of tokens -> (S,) sums over the tokens of each sequence."""
    return values.new_zeros(sequences).index_add_(0, sequence_index, values)


@torch.no_grad()
def token_kl(policy: Tensor, head: Head, reference: Tensor, reference_head: Head) -> Tensor:
    """KL(pi || pi_ref) over the vocabulary at each position. (N, D) hidden states -> (N,)."""
    rows = head.rows_per_chunk()
    head = head.cast(_compute_dtype(policy))
    reference_head = reference_head.cast(_compute_dtype(reference))
    parts = []
    for p, q in zip(policy.split(rows), reference.split(rows), strict=True):
        logp = logits_of(p, head).log_softmax(1)
        logq = logits_of(q, reference_head).log_softmax(1)
        parts.append((logp.exp() * (logp - logq)).sum(1))
    return torch.cat(parts)
