"""Log-probabilities of target tokens, without ever holding logits of shape (N, V).

Only the N hidden states that predict a target meet the output embedding, in chunks.
Log-sum-exp is in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@torch.no_grad()
def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """(N, D) hidden states, (N,) token ids -> (N,) log-probabilities, float32. No gradient."""
    head = head.cast(_compute_dtype(hidden))
    rows = head.rows_per_chunk()
    parts = []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = logits_of(h, head)
        parts.append(logits.gather(1, t[:, None]).squeeze(1) - logits.logsumexp(dim=1))
    return torch.cat(parts)


# loss_of(logprobs, examples): the summed loss of the examples in the slice, whose targets'
# log-probabilities are given, (n,).
LossOf = Callable[[Tensor, slice], Tensor]


def fused_loss(
    hidden: Tensor, head: Head, targets: Tensor, counts: Sequence[int], loss_of: LossOf
) -> tuple[Tensor, Tensor]:
    """Loss on target log-probabilities, its gradients formed while each chunk's logits live.

    Three matmuls a chunk instead of four: a loss needs only the log-probabilities of whole
    examples, so chunks hold whole examples and no logits are computed twice.

    hidden: (N, D); targets: (N,); counts: targets of each example, in order, summing to N.
    Returns the loss summed over examples, with gradient, and the (N,) log-probabilities,
    without. The head's gradient is an autograd gradient like any other.
    """
    chunks = _whole_examples(counts, head.rows_per_chunk())
    # Inside a Function gradients look wanted even under no_grad.
    leaves = (hidden, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    loss, logprobs = _FusedLoss.apply(*leaves, targets, head, chunks, loss_of, wanted)
    return loss, logprobs


def _whole_examples(counts: Sequence[int], rows: int) -> list[tuple[slice, slice]]:
    """(examples, their targets) of each chunk: about `rows` targets, at least one example."""
    chunks = []
    first, start, end = 0, 0, 0
    for i, count in enumerate(counts):
        if end > start and end + count - start > rows:
            chunks.append((slice(first, i), slice(start, end)))
            first, start = i, end
        end += count
    chunks.append((slice(first, len(counts)), slice(start, end)))
    return chunks


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        chunks: Sequence[tuple[slice, slice]],
        loss_of: LossOf,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        head = head.cast(_compute_dtype(hidden))
        grads = [
            torch.zeros_like(x) if x is not None and want else None
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        loss = torch.zeros((), dtype=promote(hidden[:0]).dtype, device=hidden.device)
        parts = []
        for examples, rows in chunks:
            logits = logits_of(hidden[rows], head)
            logsumexp = logits.logsumexp(dim=1)
            logprobs = logits.gather(1, targets[rows][:, None]).squeeze(1) - logsumexp
            with torch.enable_grad():
                leaf = logprobs.detach().requires_grad_()
                part = loss_of(leaf, examples)
                (weights,) = torch.autograd.grad(part, leaf)
            loss += part.detach()
            parts.append(logprobs)
            if any(wanted):
                _add_gradients(grads, hidden[rows], rows, head, logits, logsumexp,
                               targets[rows], weights)  # fmt: skip
        ctx.save_for_backward(*grads)
        logprobs = torch.cat(parts)
        ctx.mark_non_differentiable(logprobs)
        return loss, logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = [g if g is None else g.mul_(grad_outputs[0]) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


def _add_gradients(
    grads: Sequence[Tensor | None],
    hidden: Tensor,
    rows: slice,
    head: Head,
    logits: Tensor,
    logsumexp: Tensor,
    targets: Tensor,
    weights: Tensor,
) -> None:
    """Add a chunk's part to the gradients of hidden states, weight and bias.

    weights: (n,) d loss / d log-probability; d logp / d logits = onehot - softmax. Overwrites
    `logits`, which at a large vocabulary is the largest thing in memory.
    """
    slope = None if head.softcap is None else 1.0 - (logits / head.softcap) ** 2
    grad = logits.sub_(logsumexp[:, None]).exp_().mul_(-weights[:, None])
    grad.scatter_add_(1, targets[:, None], weights[:, None])
    if slope is not None:
        grad.mul_(slope)
    if head.scale != 1.0:
        grad.mul_(head.scale)
    low = grad.to(head.weight.dtype)
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is not None:
        grad_hidden[rows] = low @ head.weight
    if grad_weight is not None:
        grad_weight += low.t() @ hidden.to(low.dtype)
    if grad_bias is not None:
        grad_bias += grad.sum(0)


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
