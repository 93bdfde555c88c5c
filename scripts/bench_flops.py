"""Floating-point operations of a training step, and how many this machine can do a second.

Counted are the matrix products that the model needs (a product of (m, k) and (k, n) is
2 m k n), over the tokens of the packed rows and without padding: what a kernel computes
beyond that, such as masked attention scores, is its loss. The backward is twice the forward;
norms, activations and the optimiser are left out, as is usual (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_job import synchronise
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.records import Batch, Segment

SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # of square matrices
PEAK_SECONDS = 0.5  # for each size, kernel and precision
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """What packed rows hold. visible: (query, key) pairs that see each other; scored: targets."""

    tokens: int = 0
    scored: int = 0
    visible: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> Iterable[int]:
        return asdict(self).values()

    @classmethod
    def of(cls, batch: Batch) -> Work:
        visible = sum(map(visible_pairs, batch.layout))
        return cls(batch.input_ids.numel(), batch.targets.numel(), visible)


def visible_pairs(segment: Segment) -> int:
    """Causal in the prompt; a branch sees the whole prompt and, causally, itself."""
    prompt = segment.prompt
    own = sum(size * (size + 1) // 2 for size in (prompt, *segment.branches))
    return own + prompt * sum(segment.branches)


@dataclass(frozen=True)
class Sizes:
    """Of a model. matmul_weights: of the backbone, without embeddings and vectors."""

    matmul_weights: int
    layers: int
    attention_width: int  # heads x width of a head
    hidden: int
    vocab: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        config, head = model.config.get_text_config(), model.get_output_embeddings().weight
        heads = config.num_attention_heads
        each = getattr(config, "head_dim", None) or config.hidden_size // heads
        modules = (m for m in model.base_model.modules() if not isinstance(m, torch.nn.Embedding))
        weights = (p for m in modules for p in m.parameters(recurse=False) if p.ndim >= 2)
        return cls(
            sum(p.numel() for p in weights), config.num_hidden_layers, heads * each,
            head.shape[1], head.shape[0],
        )  # fmt: skip


def step_flops(sizes: Sizes, work: Work) -> dict[str, float]:
    """Of each part of a step that computes `work`, and of the whole step."""
    attention = 4.0 * work.visible * sizes.attention_width * sizes.layers  # q k^T, weights v
    forward = 2.0 * work.tokens * sizes.matmul_weights + attention
    head = 6.0 * work.scored * sizes.hidden * sizes.vocab  # logits and two gradients
    return {
        "forward": forward,
        "attention forward": attention,
        "head and loss": head,
        "backward": 2.0 * forward,
        "attention backward": 2.0 * attention,
        "step": 3.0 * forward + head,
    }


def matmul_peaks(device: str) -> dict[str, dict[str, Any]]:
    """Precision -> the fastest product of two square matrices: its FLOP/s, size and kernel."""
    found: dict[str, dict[str, Any]] = {}
    for precision, dtype in DTYPES.items():
        tried = [
            {"flops_per_second": speed(kernel, size, dtype, device), "size": size, "kernel": name}
            for size in SIZES[device]
            for name, kernel in kernels(device).items()
        ]
        found[precision] = max(tried, key=lambda one: one["flops_per_second"])
    return found


def kernels(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """PyTorch's own choice; on a CPU oneDNN as well, which it passes over in float32."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"matmul": torch.matmul}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        found["oneDNN"] = lambda a, b: linear(a, b, None, "none", [], "")
    return found


def speed(
    kernel: Callable[[Tensor, Tensor], Tensor], size: int, dtype: torch.dtype, device: str
) -> float:
    """FLOP/s of the fastest of the calls that fit in PEAK_SECONDS."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    kernel(a, b)
    synchronise(device)
    best, until = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        kernel(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
