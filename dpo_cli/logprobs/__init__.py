"""Log-probabilities of target tokens, without ever holding logits of shape (N, V).

Only the N hidden states that predict a target meet the output embedding, a block of rows at a
time: on a CPU its float32 logits stay in the cache through softmax, on CUDA one kernel reads them.
A loss needs whole examples: their slopes (n, V) are kept, in the compute dtype, for a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from dpo_cli.logprobs import fused_head
from dpo_cli.logprobs.fused_head import add_product, product

BLOCK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}  # of float32 logits alive at once
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}  # of slopes alive at once
EAGER_BLOCKS = 3  # alive at once without a kernel: logits, softmax, and the next block's logits
TILE_ROWS = 128  # of a matmul on CUDA


@dataclass(frozen=True)
class Head:
    """A model's output layer: logits = cap(scale * (h W^T + b)).

    weight: (V, D); bias: (V,) or None; scale: Cohere's logit_scale, 1/Granite's
    logits_scaling; softcap: Gemma 2's final_logit_softcapping (cap(z) = c tanh(z/c));
    vocab: V where rows of zeros follow in the weight (`cast`), which are no tokens.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    vocab: int | None = None

    @property
    def tokens(self) -> int:
        return len(self.weight) if self.vocab is None else self.vocab

    def refused(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why no kernel computes its log-probabilities there, or None; tried once a process."""
        shape = fused_head.Shape(
            device, dtype, self.tokens, self.bias is not None, self.softcap is not None
        )
        return fused_head.refused(shape)

    @property
    def fused(self) -> bool:
        return self.refused(self.weight.device, self.weight.dtype) is None

    def rounding(self, device: torch.device, dtype: torch.dtype) -> str:
        """What decides how its log-probabilities are rounded there, "" on a CPU."""
        if device.type != "cuda":
            return ""
        kind = "eager" if self.refused(device, dtype) else "fused"
        return f" {kind} head" + " in float32" * fused_head.unrounded(device, dtype)

    def rows_without_kernel(self) -> int:
        return self._rows(BLOCK_BYTES, 4)

    def rows_per_block(self) -> int:
        rows = self.rows_without_kernel()
        return rows * EAGER_BLOCKS // TILE_ROWS * TILE_ROWS or rows if self.fused else rows

    def rows_per_chunk(self) -> int:
        return self._rows(CHUNK_BYTES, self.weight.element_size())

    def _rows(self, budget: dict[str, int], size: int) -> int:
        limit = budget.get(self.weight.device.type, budget["cpu"])
        return max(16, limit // (size * self.weight.shape[0]))

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype, and aligned: once, not once a chunk."""
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = fused_head.aligned(self.weight, self.tokens, dtype)
        return replace(self, weight=weight, bias=bias, vocab=self.tokens)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast's dtype, else the input's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def promoted(dtype: torch.dtype) -> torch.dtype:
    """Float32, in which softmax is taken; float64 stays (for the exactness tests)."""
    return torch.promote_types(dtype, torch.float32)


def promote(x: Tensor) -> Tensor:
    return x.to(promoted(x.dtype))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(n, D) -> (n, V), float32 (float64 stays), computed in the head's dtype. For one chunk."""
    weight, bias = head.weight, head.bias
    hidden = hidden.to(weight.dtype)
    if hidden.is_cuda and not torch.is_grad_enabled():
        logits = promote(product(hidden, weight.t()))[:, : head.tokens]
        logits = logits if bias is None else logits + bias
    else:
        weight = weight[: head.tokens]
        logits = promote(torch.nn.functional.linear(hidden, weight, bias))
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-probabilities of the targets and (n, V) probabilities.

    Log-sum-exp is max - log(max probability), two passes cheaper than its own. The maximum is
    taken off first: a confident token's log-probability would drown in the logits' rounding.
    """
    probabilities = logits.softmax(dim=1)
    below_best = logits.gather(1, targets[:, None]).squeeze(1) - logits.amax(dim=1)
    return below_best + probabilities.amax(dim=1).log(), probabilities


@torch.no_grad()
def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """(N, D) hidden states, (N,) token ids -> (N,) log-probabilities, float32. No gradient."""
    head = head.cast(_compute_dtype(hidden))
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
    """(n,) log-probabilities of rows whose logits may live at once; their slopes go to `out`."""
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
    # Not 1 - probability in a low precision: that is 0 long before the truth is.
    at_target = 1.0 - slope.gather(1, targets[:, None])
    slope.neg_().scatter_(1, targets[:, None], at_target)
    if head.softcap is not None:
        slope *= 1.0 - (logits / head.softcap) ** 2
    out[:, : head.tokens] = slope
    out[:, head.tokens :] = 0.0
    return logprobs


# loss_of(logprobs, examples): the summed loss of the examples in the slice, whose targets'
# log-probabilities are given, (n,).
LossOf = Callable[[Tensor, slice], Tensor]


def fused_loss(
    hidden: Tensor, head: Head, targets: Tensor, counts: Sequence[int], loss_of: LossOf
) -> tuple[Tensor, Tensor]:
    """Loss on target log-probabilities, its gradients formed while each chunk's slopes live.

    Three matmuls a chunk instead of four: a loss needs only the log-probabilities of whole
    examples, so chunks hold whole examples and no logits are computed twice. What the loss
    multiplies a row of slopes by is applied to the hidden states, which are V / D narrower.

    hidden: (N, D); targets: (N,); counts: targets of each example, in order, summing to N.
    Returns the loss summed over examples, with gradient, and the (N,) log-probabilities,
    without. The head's gradient is an autograd gradient like any other.
    """
    # Inside a Function gradients look wanted even under no_grad.
    leaves = (hidden, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    loss, logprobs = _FusedLoss.apply(*leaves, targets, head, counts, loss_of, wanted)
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
        counts: Sequence[int],
        loss_of: LossOf,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        head = head.cast(_compute_dtype(hidden))
        grads = _Gradients((hidden, weight, bias), wanted)
        loss = torch.zeros((), dtype=promoted(hidden.dtype), device=hidden.device)
        parts = []
        for examples, rows in _whole_examples(counts, head.rows_per_chunk()):
            if any(wanted):
                logprobs, slopes = _logprobs_and_slopes(hidden[rows], head, targets[rows])
            else:
                logprobs = target_logprobs(hidden[rows], head, targets[rows])
            with torch.enable_grad():
                leaf = logprobs.detach().requires_grad_()
                part = loss_of(leaf, examples)
                (weights,) = torch.autograd.grad(part, leaf)
            loss += part.detach()
            parts.append(logprobs)
            if any(wanted):
                grads.add(rows, head, slopes, weights[:, None] * head.scale)
                del slopes  # or they would live beside the next chunk's
        ctx.save_for_backward(*grads.sums)
        logprobs = torch.cat(parts)
        ctx.mark_non_differentiable(logprobs)
        return loss, logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = [g if g is None else g.mul_(grad_outputs[0]) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


class _Gradients:
    """Gradients of hidden states, weight and bias, those that are wanted, chunk by chunk."""

    def __init__(self, leaves: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        self.leaves = leaves
        self.wanted = wanted
        self.hidden = torch.empty_like(cast(Tensor, leaves[0]))
        self.sums: list[Tensor | None] = [self.hidden if wanted[0] else None, None, None]

    def add(self, rows: slice, head: Head, slopes: Tensor, weights: Tensor) -> None:
        """slopes: (n, V); weights: (n, 1) d loss / d log-probability, times the head's scale."""
        hidden = cast(Tensor, self.leaves[0])
        if self.wanted[0]:
            self.hidden[rows] = product(slopes, head.weight) * weights
        tokens = slopes[:, : head.tokens].t()
        if self.wanted[1]:
            self._accumulate(1, tokens, (hidden[rows] * weights).to(slopes.dtype))
        if self.wanted[2]:
            self._accumulate(2, tokens, weights.to(slopes.dtype))

    def _accumulate(self, index: int, slopes: Tensor, factor: Tensor) -> None:
        total, leaf = self.sums[index], cast(Tensor, self.leaves[index])
        if total is None:  # a leaf in bf16, as FSDP gathers it, would lose digits chunk by chunk
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
    head = head.cast(_compute_dtype(policy))
    reference_head = reference_head.cast(_compute_dtype(reference))
    parts = []
    for p, q in zip(policy.split(rows), reference.split(rows), strict=True):
        logp = logits_of(p, head).log_softmax(1)
        logq = logits_of(q, reference_head).log_softmax(1)
        parts.append((logp.exp() * (logp - logq)).sum(1))
    return torch.cat(parts)
