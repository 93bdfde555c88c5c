"""What the forward saves for the backward, in bytes, counted operation by operation.

Per packed token and layer: D hidden width, Q and K widths of queries and of keys, I of the MLP.

    norms        their float32 inputs; norms written in Python also save their output before the
                 weight
    matrices     their inputs, for the gradients of their weights; frozen ones save none
    attention    queries, keys and values, and the probabilities if the kernel saves them
    MLP          the input of the activation function, and both sides of a gate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.plan.memory.shape import Linear, Shape

BLOCK = 128  # as in model/attention/grouped.py: queries at once ...
SAVED_BYTES = 2048  # ... and of probabilities per query and head; for longer rows recomputed


@dataclass(frozen=True)
class Numbers:
    """Bytes per number. compute: in matrix products; stream: of the hidden state between layers,
    which is float32 if autocast computes with float32 weights."""

    compute: int
    stream: int

    @property
    def casts(self) -> bool:
        """Whether every matrix saves its own half-precision copy of its input."""
        return self.stream > self.compute


@dataclass(frozen=True)
class Trained:
    """What is trained. full: all weights, including norms; adapted: matrices with an adapter, which
    save their inputs (with lora.dropout each its own, and a mask) and with DoRA the two outputs
    that the magnitudes multiply."""

    full: bool
    adapted: Sequence[Linear] = ()
    dropout: bool = False
    dora: bool = False
    int8: bool = False  # bitsandbytes also saves the input of the frozen matrix


@dataclass(frozen=True)
class Rows:
    """The packed rows. tokens: of the largest micro-batch; example: of a typical example; keys:
    keys per packed token, counting prompts once per branch."""

    tokens: int
    example: int
    keys: float = 1.0


def block_bytes(shape: Shape, numbers: Numbers, trained: Trained, rows: Rows, kernel: str) -> float:
    """Bytes that one decoder layer saves for the row. kernel: a key of `layouts.LAYOUTS`."""
    token = (
        _norms(shape, numbers, trained)
        + _matrices(shape, numbers, trained)
        + numbers.compute * (shape.queries + 2 * shape.keys * rows.keys)
        + numbers.compute * shape.inner * (3 if shape.gated else 1)
    )
    return rows.tokens * (token + _probabilities(shape, numbers, rows, kernel))


def _norms(shape: Shape, numbers: Numbers, trained: Trained) -> float:
    block = shape.block
    saved = 4.0 * (block.norms + block.written_norms + block.head_norms)
    if trained.full:  # of a weight's gradient
        saved += numbers.stream * block.written_norms + numbers.compute * block.head_norms
    return saved


def _matrices(shape: Shape, numbers: Numbers, trained: Trained) -> float:
    layers = max(1, shape.layers)
    if trained.full and numbers.casts:
        return numbers.compute * float(sum(x.inputs for x in shape.block.linears))
    shared = float(shape.block.readers * shape.hidden + shape.queries + shape.inner)
    if trained.full:
        return numbers.compute * shared
    adapted = sum(x.inputs for x in trained.adapted) / layers
    # Dropped-out inputs are not shared between adapters, nor DoRA's float32 casts under autocast.
    separate = trained.dropout or (trained.dora and numbers.compute == 2)
    saved = adapted if separate else min(adapted, shared)
    saved += shared if trained.int8 else 0.0
    saved += 2 * sum(x.outputs for x in trained.adapted) / layers if trained.dora else 0.0
    return numbers.compute * saved + (adapted if trained.dropout else 0.0)


def _probabilities(shape: Shape, numbers: Numbers, rows: Rows, kernel: str) -> float:
    """Bytes per token: the grouped kernel on a CPU saves those of short examples; attention with a
    dense mask saves several numbers per pair of tokens of the row."""
    if kernel == "dense":
        softmax = 4.0 + (numbers.compute if numbers.casts else 0.0)  # and its half copy
        return softmax * shape.heads * rows.tokens
    if kernel != "grouped" or rows.example * numbers.compute > SAVED_BYTES:
        return 0.0
    keys = rows.example if rows.example <= BLOCK else (rows.example + BLOCK) / 2
    return float(numbers.compute) * shape.heads * keys


def activation_bytes(
    shape: Shape, numbers: Numbers, trained: Trained, rows: Rows, kernel: str, every: int
) -> float:
    """Bytes that a forward saves. every: hardware.activation_checkpointing; each every-th layer
    saves only its input and is recomputed in the backward."""
    block = block_bytes(shape, numbers, trained, rows, kernel)
    again = -(-shape.layers // every) if every else 0
    inputs = rows.tokens * shape.hidden * numbers.stream
    ends = rows.tokens * shape.hidden * (4.0 + 2 * numbers.stream)  # embeddings, last norm
    alone = block if again else 0.0  # the one at work
    return (shape.layers - again) * block + again * inputs + alone + ends


def working_bytes(shape: Shape, numbers: Numbers, rows: Rows) -> float:
    """Bytes that a layer's forward or backward needs besides saved activations: its gradients."""
    wide = shape.inner * (3 if shape.gated else 2) * numbers.compute
    return float(rows.tokens * (wide + shape.hidden * (4 + 2 * numbers.stream)))
