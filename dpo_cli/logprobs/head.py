"""A model's output layer, its logits, and the dtypes they are computed in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_cli.logprobs import fused_head
from dpo_cli.logprobs.fused_head import product

BLOCK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}  # of float32 logits per block
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}  # of slopes per chunk
EAGER_BLOCKS = 3  # alive at once without the kernel: logits, softmax, the next block's logits
TILE_ROWS = 128  # of a matmul on CUDA


@dataclass(frozen=True)
class Head:
    """A model's output layer: logits = cap(scale * (h W^T + b)).

    weight: (V, D); bias: (V,) or None; scale: Cohere's logit_scale, 1/Granite's
    logits_scaling; softcap: Gemma 2's final_logit_softcapping (cap(z) = c tanh(z/c));
    vocab: V if the weight is padded with rows of zeros (`cast`), which are not tokens.
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
        """Why the fused kernel cannot be used on a device, or None; probed once per process."""
        shape = fused_head.Shape(
            device, dtype, self.tokens, self.bias is not None, self.softcap is not None
        )
        return fused_head.refused(shape)

    @property
    def fused(self) -> bool:
        return self.refused(self.weight.device, self.weight.dtype) is None

    def rounding(self, device: torch.device, dtype: torch.dtype) -> str:
        """How log-probabilities are rounded on a device, for cache keys; "" on a CPU."""
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
        """The head in another dtype, with aligned weight rows: once, rather than per chunk."""
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = fused_head.aligned(self.weight, self.tokens, dtype)
        return replace(self, weight=weight, bias=bias, vocab=self.tokens)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in: autocast's, else the input's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def promoted(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax: float32, or float64 for float64 (in tests)."""
    return torch.promote_types(dtype, torch.float32)


def promote(x: Tensor) -> Tensor:
    return x.to(promoted(x.dtype))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(n, D) -> (n, V), in float32 (float64 stays), computed in the head's dtype."""
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
