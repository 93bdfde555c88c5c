"""What the forward saves for the backward, in bytes, counted operation by operation.

Per packed token and layer: D hidden width, Q and K widths of queries and of keys, I of the MLP.

    norms        their float32 inputs; one written in Python also its output before the weight
    matrices     their inputs, for the gradients of their weights: frozen ones keep none
    attention    queries, keys and values, and where it keeps them the probabilities
    MLP          what goes into the activation function, and both sides of a gate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.plan.memory.shape import Linear, Shape

BLOCK = 128  # model/attention/grouped.py: queries at once ...
KEPT_BYTES = 2048  # ... and of probabilities per query and head; longer rows are recomputed


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number. compute: what matrices multiply in; stream: the hidden state between
    layers, float32 where autocast computes over float32 weights."""

    compute: int
    stream: int

    @property
    def casts(self) -> bool:
        """Whether every matrix gets its own half-precision copy of its input."""
        return self.stream > self.compute


@dataclass(frozen=True)
class Trained:
    """What is trained. whole: every weight, norms too; adapted: matrices with an adapter, which
    keep their inputs, with lora.dropout each its own and a mask, with DoRA both outputs, which the
    magnitudes multiply."""

    whole: bool
    adapted: Sequence[Linear] = ()
    dropout: bool = False
    dora: bool = False
    int8: bool = False  # bitsandbytes keeps the input of the frozen matrix as well


@dataclass(frozen=True)
class Rows:
    """The packed rows. tokens: of the largest micro-batch; example: of a typical example (each
    token asks its own); keys: tokens attended to, prompts once a branch, per packed token."""

    tokens: int
    example: int
    keys: float = 1.0


def block_bytes(shape: Shape, numbers: Numbers, trained: Trained, rows: Rows, kernel: str) -> float:
    """Of one decoder layer over the row. kernel: of model/layouts.LAYOUTS."""
    token = (
        _norms(shape, numbers, trained)
        + _matrices(shape, numbers, trained)
        + numbers.compute * (shape.queries + 2 * shape.keys * rows.keys)
        + numbers.compute * shape.inner * (3 if shape.gated else 1)
    )
    return rows.tokens * (token + _probabilities(shape, numbers, rows, kernel))


def _norms(shape: Shape, numbers: Numbers, trained: Trained) -> float:
    block = shape.block
    kept = 4.0 * (block.norms + block.written_norms + block.head_norms)
    if trained.whole:  # of a weight's gradient
        kept += numbers.stream * block.written_norms + numbers.compute * block.head_norms
    return kept


def _matrices(shape: Shape, numbers: Numbers, trained: Trained) -> float:
    layers = max(1, shape.layers)
    if trained.whole and numbers.casts:
        return numbers.compute * float(sum(x.inputs for x in shape.block.linears))
    shared = float(shape.block.readers * shape.hidden + shape.queries + shape.inner)
    if trained.whole:
        return numbers.compute * shared
    adapted = sum(x.inputs for x in trained.adapted) / layers
    # A dropped-out input is the adapter's own, and so is what DoRA casts to float32 under autocast.
    own = trained.dropout or (trained.dora and numbers.compute == 2)
    kept = adapted if own else min(adapted, shared)
    kept += shared if trained.int8 else 0.0
    kept += 2 * sum(x.outputs for x in trained.adapted) / layers if trained.dora else 0.0
    return numbers.compute * kept + (adapted if trained.dropout else 0.0)


def _probabilities(shape: Shape, numbers: Numbers, rows: Rows, kernel: str) -> float:
    """A token: the grouped kernel of a CPU keeps those of short examples, and where attention
    takes a dense mask every pair of tokens of the row has several."""
    if kernel == "dense":
        softmax = 4.0 + (numbers.compute if numbers.casts else 0.0)  # and its half copy
        return softmax * shape.heads * rows.tokens
    if kernel != "grouped" or rows.example * numbers.compute > KEPT_BYTES:
        return 0.0
    seen = rows.example if rows.example <= BLOCK else (rows.example + BLOCK) / 2
    return float(numbers.compute) * shape.heads * seen


def kept_bytes(
    shape: Shape, numbers: Numbers, trained: Trained, rows: Rows, kernel: str, every: int
) -> float:
    """Of the whole forward. every: hardware.activation_checkpointing: every so many layers, one
    keeps its input alone and is recomputed in the backward."""
    block = block_bytes(shape, numbers, trained, rows, kernel)
    again = -(-shape.layers // every) if every else 0
    inputs = rows.tokens * shape.hidden * numbers.stream
    ends = rows.tokens * shape.hidden * (4.0 + 2 * numbers.stream)  # embeddings, last norm
    alone = block if again else 0.0  # the one at work
    return (shape.layers - again) * block + again * inputs + alone + ends


def working_bytes(shape: Shape, numbers: Numbers, rows: Rows) -> float:
    """What a layer's forward or backward needs beside saved activations: its gradients."""
    wide = shape.inner * (3 if shape.gated else 2) * numbers.compute
    return float(rows.tokens * (wide + shape.hidden * (4 + 2 * numbers.stream)))
