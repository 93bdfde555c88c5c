"""Bytes of weights, gradients and optimizer state on one device."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config import HardwareConfig, LoraConfig, OptimConfig
from dpo_cli.plan.memory.shape import Linear, Shape

FLOAT, HALF = 4, 2
# NF4, double-quantized: half a byte, one byte of scale per 64 weights, and one float32 per 256
# of those scales (arXiv 2305.14314, section 3).
NF4 = 0.5 + 1 / 64 + FLOAT / (64 * 256)
STATES = {"adamw": 2, "rmsprop": 1}  # numbers per weight, in its dtype
STATES_8BIT = 2 * (1 + FLOAT / 256)  # bytes: two of 8 bits, a float32 scale for 256 of each


@dataclass(frozen=True)
class Sharing:
    """FSDP over ranks. shards: number of parts of weights, gradients and optimizer state."""

    shards: int = 1

    @classmethod
    def of(cls, hardware: HardwareConfig) -> Sharing:
        nodes = hardware.nodes if hardware.sharding == "full" else 1
        return cls(hardware.devices * nodes)


@dataclass(frozen=True)
class Trainable:
    """What a run trains. full: all weights, otherwise adapters on `adapted` matrices. parameters:
    number of trained weights; size: bytes per weight."""

    full: bool
    parameters: int
    size: int
    adapted: tuple[Linear, ...] = ()


def trainable_of(lora: LoraConfig, hardware: HardwareConfig, shape: Shape) -> Trainable:
    if lora.name == "none":
        size = HALF if hardware.weights == "bf16" else FLOAT
        return Trainable(True, shape.parameters, size)
    adapted = tuple(shape.targets(lora.target_modules))
    return Trainable(False, adapter_parameters(lora, shape), FLOAT, adapted)


def adapter_parameters(lora: LoraConfig, shape: Shape) -> int:
    """Number of trained weights of an adapter: r (in + out) per matrix, with DoRA also its
    magnitudes, and all of `modules_to_save`."""
    adapted = shape.targets(lora.target_modules)
    low_rank = sum(lora.r * (x.inputs + x.outputs) + lora.use_dora * x.outputs for x in adapted)
    return low_rank + sum(x.weights for x in shape.targets(lora.modules_to_save))


def frozen_bytes(lora: LoraConfig, shape: Shape, half: bool) -> float:
    """The base under an adapter. half: computed in, and therefore stored in, bf16. Embeddings,
    norms and the output layer are never quantized."""
    size = HALF if half else FLOAT
    if lora.quantization is None:
        return float(size * shape.parameters)
    matrices = sum(x.weights for x in shape.linears)
    scales = FLOAT * sum(x.outputs for x in shape.linears)
    quantized = NF4 * matrices if lora.quantization == "nf4" else matrices + scales
    return quantized + size * (shape.parameters - matrices)


def state_bytes(optim: OptimConfig, trainable: Trainable) -> float:
    if optim.name == "adamw8bit":
        return STATES_8BIT * trainable.parameters
    return float(STATES[optim.name] * trainable.size * trainable.parameters)


def cast_bytes(trainable: Trainable, shape: Shape, half: bool, sharing: Sharing) -> float:
    """Half-precision copies of float32 weights, which autocast caches until the backward has used
    them. FSDP casts the weights that it gathers, one block at a time."""
    if not (half and trainable.full and trainable.size == FLOAT) or sharing.shards > 1:
        return 0.0
    return float(HALF * sum(x.weights for x in shape.linears))


def gathered_bytes(trainable: Trainable, lora: LoraConfig, shape: Shape, half: bool) -> float:
    """Unsharded weights at FSDP's peak: the root's, and those of the current and the next block, in
    their compute dtype; and float32 gradients of trained ones."""
    size = HALF if half else FLOAT
    full = shape.block.parameters + shape.root_parameters
    gradients = FLOAT * full if trainable.full else 0
    quantized = lora.name != "none" and lora.quantization is not None  # replicated on every rank
    weights = 0 if quantized else size * (full + shape.block.parameters)
    return float(weights + gradients)


def dequantized_bytes(lora: LoraConfig, shape: Shape, half: bool) -> float:
    """The largest quantized matrix, dequantized for its product."""
    if lora.name == "none" or lora.quantization is None:
        return 0.0
    return float((HALF if half else FLOAT) * max(x.weights for x in shape.linears))
