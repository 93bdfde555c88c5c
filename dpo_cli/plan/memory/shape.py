"""The sizes that determine a model's memory, counted on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
PER_HEAD = {"q_norm": "heads", "k_norm": "kv_heads"}  # norms over the width of one head


@dataclass(frozen=True)
class Linear:
    """One weight matrix. name: from the model's root, as PEFT matches `lora.target_modules`."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    linears: its matrices. norms: total width of PyTorch's layer norms; written_norms: of norms
    written in Python, which save more; head_norms: of norms of queries and keys. readers: number of
    norms that read the hidden state (two; one if attention and MLP share it). parameters: number of
    weights.
    """

    linears: tuple[Linear, ...]
    norms: int
    written_norms: int
    head_norms: int
    readers: int
    parameters: int


@dataclass(frozen=True)
class Shape:
    """A causal language model.

    parameters: number of weights, tied ones once. head: weights of the output layer. inner: width
    of the MLP. gated: whether it multiplies two activations of that width. packed: whether its
    attention uses transformers' interface; otherwise it gets a dense mask.
    """

    parameters: int
    layers: int
    hidden: int
    inner: int
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head: int
    tied: bool
    packed: bool
    block: Block
    linears: tuple[Linear, ...]

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def root_parameters(self) -> int:
        """Embeddings, output layer and last norm."""
        return self.parameters - self.layers * self.block.parameters

    def targets(self, names: Sequence[str]) -> list[Linear]:
        """The matrices that `lora.target_modules` names."""
        if ALL_LINEAR in names:
            return list(self.linears)
        ends = tuple(f".{name}" for name in names)
        return [linear for linear in self.linears if f".{linear.name}".endswith(ends)]


def shape_of(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> Shape:
    """Count the weights of a configuration's model, without allocating any."""
    with torch.device("meta"):
        model = auto.from_config(config)
    text = config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", None) or 1)  # Mamba has none
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    output = model.get_output_embeddings()
    head = 0 if output is None else sum(p.numel() for p in output.parameters())
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    blocks = max(_lists(model, layers), key=_parameters)
    layers = len(blocks)
    largest = max(blocks, key=_parameters)
    block = _block(largest, {"heads": heads, "kv_heads": kv_heads}, head_dim)
    inner, gated = _mlp(text, block.linears, hidden)
    return Shape(
        parameters=_parameters(model), layers=layers, hidden=hidden, inner=inner, gated=gated,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=int(text.vocab_size), head=head,
        tied=tied, packed=bool(getattr(model, "_supports_attention_backend", False)), block=block,
        linears=tuple(_linears(model, skip=output)),
    )  # fmt: skip


def _lists(model: Any, layers: int) -> list[torch.nn.ModuleList]:
    """Lists of the model's layers; the complete model as one layer if no list has that length."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
    return lists or [torch.nn.ModuleList([model.base_model])]


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linears(model: torch.nn.Module, skip: torch.nn.Module | None = None) -> list[Linear]:
    """All matrices except `skip` and a reward model's score, which is negligible."""
    linears = []
    for name, module in model.named_modules():
        if module is skip or name.rpartition(".")[2] == "score":
            continue
        if isinstance(module, torch.nn.Linear):
            linears.append(Linear(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):  # GPT-2: (inputs, outputs)
            linears.append(Linear(name, *module.weight.shape))
    return linears


def _block(layer: torch.nn.Module, heads: dict[str, int], head_dim: int) -> Block:
    native = written = per_head = readers = 0
    for name, module in layer.named_modules():
        weights = list(module.parameters(recurse=False))
        if not weights or weights[0].ndim != 1:  # linears have matrices
            continue
        width, leaf = weights[0].numel(), name.rpartition(".")[2]
        if leaf in PER_HEAD:
            per_head += width * (heads[PER_HEAD[leaf]] if width == head_dim else 1)
        elif isinstance(module, torch.nn.LayerNorm):
            native, readers = native + width, readers + 1
        else:
            written, readers = written + width, readers + 1
    linears = tuple(_linears(layer))
    return Block(linears, native, written, per_head, min(2, readers), _parameters(layer))


def _mlp(text: Any, linears: Sequence[Linear], hidden: int) -> tuple[int, bool]:
    """Width of the MLP a token goes through, and whether it is gated."""
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    up = [x for x in linears if x.inputs == hidden and x.outputs in (inner, 2 * inner)]
    if up:
        return int(inner), sum(x.outputs for x in up) == 2 * inner
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)  # experts are not Linear modules
    return int(getattr(text, "moe_intermediate_size", None) or inner) * chosen, True
