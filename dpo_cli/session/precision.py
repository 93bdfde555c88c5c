"""The precision of the trained weights."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dpo_cli.config import HardwareConfig, LoraConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.forward import head_of
from dpo_cli.train.runtime import Runtime

QUANTIZATION = "quantization"  # key of an adapter's provenance: how its base was stored


def quantized_base(lora: LoraConfig) -> dict[str, str]:
    """Provenance of an adapter trained on a quantized base, otherwise empty: the adapter gives
    another model on the unquantized base."""
    kind = lora.quantization if lora.name != "none" else None
    return {QUANTIZATION: kind} if kind else {}


def refuse_rounding(hardware: HardwareConfig, runtime: Runtime) -> None:
    """ConfigError for bf16 weights or hidden states unless the run computes in bf16; before weights
    are loaded."""
    for key in ("weights", "residual"):
        if getattr(hardware, key) == "bf16" and runtime.precision != "bf16":
            raise ConfigError(
                f"hardware.{key}=bf16: needs hardware.precision=bf16 (here {hardware.precision} "
                f"is {runtime.precision}); or use hardware.{key}=fp32"
            )


def hold_as_trained(model: PreTrainedModel, hardware: HardwareConfig) -> torch.dtype | None:
    """Keep float32 master weights; with hardware.weights=bf16, round them and return the dtype.

    Gradients and optimizer state have the same dtype. Buffers stay in float32: rounded rotary
    frequencies would be wrong at distant positions.
    """
    if hardware.weights != "bf16":
        return None
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.bfloat16)
    return torch.bfloat16


def note_head(model: PreTrainedModel, on: Placement, key: str) -> None:
    """Note if a GPU cannot use the kernel for log-probabilities."""
    if on.device.type != "cuda" or model.get_output_embeddings() is None:
        return
    if (why := head_of(model).refused(on.device, on.dtype)) is not None:
        on.note(f"{key}: log-probabilities use plain operations, which are slower ({why})")
