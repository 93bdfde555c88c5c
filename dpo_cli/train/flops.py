"""FLOPs of a training step and model FLOPs utilization, MFU (arXiv 2204.02311, appendix B).

Counts the matrix products that the model needs ((m, k) by (k, n) is 2 m k n) over the tokens of
the packed rows. Masked attention scores and recomputation by activation checkpointing are not
counted, nor are norms, activations and the optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cli.distributed.ranks import ALONE, Ranks
from dpo_cli.records import Batch, Segment

# Dense peaks in TFLOP/s: bf16 tensor cores with float32 accumulation, and float32 without tensor
# cores, by the end of torch.cuda.get_device_name (MIG slices and laptop GPUs have another name).
# From NVIDIA's datasheets (half of the sparse figures) and, for GeForce, the appendices of the
# GA102 and Ada whitepapers.
PEAKS: dict[str, dict[str, float]] = {
    r"A100-(SXM4|PCIE)-[48]0GB": {"bf16": 312, "fp32": 19.5},
    r"A100 80GB PCIe": {"bf16": 312, "fp32": 19.5},
    r"A10G": {"bf16": 70, "fp32": 35},
    r"L4": {"bf16": 121, "fp32": 30.3},
    r"L40S": {"bf16": 362, "fp32": 91.6},
    r"H100 80GB HBM3": {"bf16": 989, "fp32": 67},
    r"H100 PCIe": {"bf16": 756, "fp32": 51},
    r"H100 NVL": {"bf16": 835, "fp32": 60},
    r"H200": {"bf16": 989, "fp32": 67},
    r"B200": {"bf16": 2250, "fp32": 75},
    r"RTX 3090": {"bf16": 71, "fp32": 35.6},
    r"RTX 4090": {"bf16": 165, "fp32": 82.6},
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Peak TFLOP/s of the device for matrix products in `fp32` or `bf16`; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peaks[precision] for end, peaks in PEAKS.items() if re.search(rf"\b({end})$", name))
    return next(known, None)


@dataclass(frozen=True)
class Work:
    """Counts over packed rows. scored: targets; visible: unmasked (query, key) pairs; near: those
    within the model's attention window."""

    tokens: int = 0
    scored: int = 0
    visible: int = 0
    near: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of(cls, batch: Batch, window: int | None = None) -> Work:
        visible = sum(map(visible_pairs, batch.layout))
        near = visible if window is None else sum(visible_pairs(s, window) for s in batch.layout)
        return cls(batch.input_ids.numel(), batch.targets.numel(), visible, near)


def visible_pairs(segment: Segment, window: int | None = None) -> int:
    """Unmasked pairs: causal in the prompt; a branch sees the prompt and, causally, itself."""
    before = _causal_pairs(segment.prompt, window)
    ends = (_causal_pairs(segment.prompt + size, window) for size in segment.branches)
    return before + sum(end - before for end in ends)


def _causal_pairs(tokens: int, window: int | None) -> int:
    """Each token sees itself and those before it, at most `window` in all."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model. matmul_weights: of the backbone, without embeddings and vectors."""

    matmul_weights: int
    trained_weights: int  # those of matmul_weights that get a gradient
    layers: int
    windowed_layers: int
    window: int | None
    attention_width: int  # heads x head_dim
    hidden: int
    vocab: int  # 0 where the output layer is a single score
    trained_head: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        each = getattr(config, "head_dim", None) or config.hidden_size // heads
        weights = list(_matmul_weights(model.base_model))
        head: Any = model.get_output_embeddings()
        window, windowed = _windows(config)
        return cls(
            sum(size for size, _ in weights), sum(size for size, trained in weights if trained),
            config.num_hidden_layers, windowed, window, heads * each,
            config.hidden_size if head is None else head.weight.shape[1],
            0 if head is None else head.weight.shape[0],
            head is not None and head.weight.requires_grad,
        )  # fmt: skip


def sizes_of(model: PreTrainedModel) -> Sizes | None:
    """None for models whose FLOPs are not modeled: mixtures of experts, state-space models."""
    config = model.config.get_text_config()
    mixed = any((getattr(config, name, None) or 1) > 1 for name in EXPERTS)
    known = all(getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
    return Sizes.of(model) if known and not mixed else None


def _matmul_weights(base: torch.nn.Module) -> Iterable[tuple[int, bool]]:
    """(elements, requires_grad) of every weight matrix of the backbone."""
    for module in base.modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.Linear) and name == "weight":
                # Not its numel: quantized weights are packed.
                yield module.in_features * module.out_features, weight.requires_grad
            elif weight.ndim >= 2:
                yield weight.numel(), weight.requires_grad


def _windows(config: Any) -> tuple[int | None, int]:
    """The model's attention window, and the number of layers that use it."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None, 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return window, sum(kind == "sliding_attention" for kind in kinds)


def step_flops(sizes: Sizes, work: Work) -> dict[str, float]:
    """FLOPs of each part of a step over `work`, and of the whole step."""
    pairs = work.visible * (sizes.layers - sizes.windowed_layers)
    pairs += work.near * sizes.windowed_layers
    attention = 4.0 * pairs * sizes.attention_width  # q k^T, weights v
    forward = 2.0 * work.tokens * sizes.matmul_weights + attention
    # The gradients of every product's input, and of its weights if they are trained.
    backward = 2.0 * work.tokens * (sizes.matmul_weights + sizes.trained_weights)
    logits = 2.0 * work.scored * sizes.hidden * sizes.vocab
    head = logits * (3 if sizes.trained_head else 2)
    return {
        "forward": forward,
        "attention forward": attention,
        "logits": logits,
        "head and loss": head,
        "backward": backward + 2.0 * attention,
        "attention backward": 2.0 * attention,
        "step": forward + head + backward + 2.0 * attention,
    }


def speed_figures(
    sizes: Sizes | None,
    batches: Iterable[Batch],
    references: int,
    seconds: float,
    peak: float | None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """`tflops_per_second` of a step over all ranks, and `mfu` if the device's peak is known.

    references: reference models of the same shape whose forward the step runs. peak: TFLOP/s.
    """
    if sizes is None:
        return {}
    work = sum((Work.of(batch, sizes.window) for batch in batches), Work())
    flops = step_flops(sizes, work)
    total = flops["step"] + references * (flops["forward"] + flops["logits"])
    figures = {"tflops_per_second": ranks.total([total])[0] / seconds / 1e12}
    if peak is not None:
        figures["mfu"] = figures["tflops_per_second"] / (peak * ranks.size)
    return figures
