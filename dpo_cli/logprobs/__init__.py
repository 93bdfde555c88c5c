"""Log-probabilities of target tokens without materializing logits of shape (N, V).

Only the N hidden states that predict a target are multiplied with the output embedding, a block of
rows at a time: on a CPU the float32 logits stay in the cache through softmax, on CUDA one kernel
reads them. A loss needs all tokens of an example: gradients of log-probabilities with respect to
logits ("slopes", (n, V)) are kept in the compute dtype for a chunk of complete examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dpo_cli.logprobs import fused_head
from dpo_cli.logprobs.fused_head import add_product, product
from dpo_cli.logprobs.head import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    EAGER_BLOCKS,
    Head,
    compute_dtype,
    logits_of,
    promote,
    promoted,
)

__all__ = [
    "BLOCK_BYTES",
    "CHUNK_BYTES",
    "EAGER_BLOCKS",
    "Head",
    "LossOf",
    "fused_head",
    "fused_loss",
    "logits_of",
    "promote",
    "promoted",
    "sum_by_sequence",
    "target_logprobs",
    "token_kl",
]


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-probabilities of the targets and (n, V) probabilities.

    Log-sum-exp is max - log(max probability), which saves two passes. The maximum is subtracted
    first, or a confident token's log-probability would be lost in the logits' rounding.
    """
    probabilities = logits.softmax(dim=1)
    below_best = logits.gather(1, targets[:, None]).squeeze(1) - logits.amax(dim=1)
    return below_best + probabilities.amax(dim=1).log(), probabilities


@torch.no_grad()
def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """(N, D) hidden states, (N,) token ids -> (N,) log-probabilities, float32. No gradient."""
    head = head.cast(compute_dtype(hidden))
    rows = head.rows_per_block()
    blocks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([_block(h, head, t) for h, t in blocks])


@torch.no_grad()
def _logprobs_and_slopes(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> (n,) log-probabilities and their slopes d logp / d logits, (n, V), in the
    head's dtype: onehot - softmax, through the soft-capping where there is one; 0 in the columns
    of a padded head's rows."""
    slopes = hidden.new_empty(len(hidden), len(head.weight), dtype=head.weight.dtype)
    rows = head.rows_per_block()
    blocks = zip(hidden.split(rows), targets.split(rows), slopes.split(rows), strict=True)
    return torch.cat([_block(h, head, t, out) for h, t, out in blocks]), slopes


def _block(hidden: Tensor, head: Head, targets: Tensor, out: Tensor | None = None) -> Tensor:
    """(n,) log-probabilities of a block of rows; their slopes are written to `out`."""
    if head.fused:
        from dpo_cli.logprobs.kernel import softmax_rows

        logits = product(hidden.to(head.weight.dtype), head.weight.t())
        return softmax_rows(
            logits.float(), targets, head.tokens, head.bias, head.scale, head.softcap, out
        )
    logits = logits_of(hidden, head)
    logprobs, slope = _softmax(logits, targets)
    if out is None:
        return logprobs
    # In float32: 1 - probability underflows to 0 early in a lower precision.
    at_target = 1.0 - slope.gather(1, targets[:, None])
    slope.neg_().scatter_(1, targets[:, None], at_target)
    if head.softcap is not None:
        slope *= 1.0 - (logits / head.softcap) ** 2
    out[:, : head.tokens] = slope
    out[:, head.tokens :] = 0.0
    return logprobs


# loss_of(logprobs, examples): the summed loss of a slice of examples, given the log-probabilities
# of their targets, (n,).
LossOf = Callable[[Tensor, slice], Tensor]


def fused_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    counts: Sequence[int],
    loss_of: LossOf,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss on target log-probabilities; gradients are computed chunk by chunk in the forward.

    Three matmuls per chunk instead of four: as chunks consist of complete examples, no logits are
    computed twice. The loss's factor on a row of slopes is applied to the hidden states, which are
    narrower by V / D.

    hidden: (N, D); targets: (N,); counts: targets of each example, in order, summing to N.
    together: the loss is no sum over examples, so it gets them all in one call, for which the
    logits are computed twice.
    Returns the loss summed over examples, with gradient, and the (N,) log-probabilities,
    without. The head's gradient is an autograd gradient like any other.
    """
    # Inside a Function requires_grad is set even under no_grad.
    leaves = (hidden, head.weight, head.bias)
    needs_grad = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    loss, logprobs = _FusedLoss.apply(*leaves, targets, head, counts, loss_of, needs_grad, together)
    return loss, logprobs


def _chunks_of_examples(counts: Sequence[int], rows: int) -> list[tuple[slice, slice]]:
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
        counts: Sequence[int],
        loss_of: LossOf,
        needs_grad: Sequence[bool],
        together: bool,
    ) -> tuple[Tensor, Tensor]:
        head = head.cast(compute_dtype(hidden))
        grads = _Gradients((hidden, weight, bias), needs_grad)
        loss = torch.zeros((), dtype=promoted(hidden.dtype), device=hidden.device)
        parts = []
        if together:
            logprobs = target_logprobs(hidden, head, targets)
            loss, every = _with_gradient(loss_of, logprobs, slice(0, len(counts)))
        for examples, rows in _chunks_of_examples(counts, head.rows_per_chunk()):
            if any(needs_grad):
                logprobs, slopes = _logprobs_and_slopes(hidden[rows], head, targets[rows])
            else:
                logprobs = target_logprobs(hidden[rows], head, targets[rows])
            if together:
                weights = every[rows]
            else:
                part, weights = _with_gradient(loss_of, logprobs, examples)
                loss += part
            parts.append(logprobs)
            if any(needs_grad):
                grads.add(rows, head, slopes, weights[:, None] * head.scale)
                del slopes  # or they would be alive together with the next chunk's
        ctx.save_for_backward(*grads.sums)
        logprobs = torch.cat(parts)
        ctx.mark_non_differentiable(logprobs)
        return loss, logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = [g if g is None else g.mul_(grad_outputs[0]) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None, None)


def _with_gradient(loss_of: LossOf, logprobs: Tensor, examples: slice) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient with respect to the log-probabilities, (n,)."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = loss_of(leaf, examples)
        (weights,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), weights


class _Gradients:
    """Gradients of hidden states, weight and bias, if needed, accumulated chunk by chunk."""

    def __init__(self, leaves: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> None:
        self.leaves = leaves
        self.needs_grad = needs_grad
        self.hidden = torch.empty_like(cast(Tensor, leaves[0]))
        self.sums: list[Tensor | None] = [self.hidden if needs_grad[0] else None, None, None]

    def add(self, rows: slice, head: Head, slopes: Tensor, weights: Tensor) -> None:
        """slopes: (n, V); weights: (n, 1) d loss / d log-probability, times the head's scale."""
        hidden = cast(Tensor, self.leaves[0])
        if self.needs_grad[0]:
            self.hidden[rows] = product(slopes, head.weight) * weights
        tokens = slopes[:, : head.tokens].t()
        if self.needs_grad[1]:
            self._accumulate(1, tokens, (hidden[rows] * weights).to(slopes.dtype))
        if self.needs_grad[2]:
            self._accumulate(2, tokens, weights.to(slopes.dtype))

    def _accumulate(self, index: int, slopes: Tensor, factor: Tensor) -> None:
        total, leaf = self.sums[index], cast(Tensor, self.leaves[index])
        if total is None:  # accumulated in float32, also if FSDP unshards the leaf in bf16
            self.sums[index] = product(slopes, factor).to(promoted(leaf.dtype)).view_as(leaf)
        else:
            add_product(total.view(len(slopes), -1), slopes, factor)


def sum_by_sequence(values: Tensor, sequence_index: Tensor, sequences: int) -> Tensor:
    """(N,) values of tokens -> (S,) sums over the tokens of each sequence."""
    return values.new_zeros(sequences).index_add_(0, sequence_index, values)


@torch.no_grad()
def token_kl(policy: Tensor, head: Head, reference: Tensor, reference_head: Head) -> Tensor:
    """KL(pi || pi_ref) over the vocabulary at each position. (N, D) hidden states -> (N,)."""
    rows = head.rows_without_kernel()
    head = head.cast(compute_dtype(policy))
    reference_head = reference_head.cast(compute_dtype(reference))
    parts = []
    for p, q in zip(policy.split(rows), reference.split(rows), strict=True):
        logp = logits_of(p, head).log_softmax(1)
        logq = logits_of(q, reference_head).log_softmax(1)
        parts.append((logp.exp() * (logp - logq)).sum(1))
    return torch.cat(parts)
