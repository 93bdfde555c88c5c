"""Shapes of the models that `bench.py` measures: published architectures, random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder of one family. kv_heads, inner (MLP width) and tied (embedding and output layer
    are one weight) are read by `llama` alone. stored: dtype of the published weights' files."""

    family: str  # gpt2 | llama
    layers: int
    width: int
    heads: int
    vocab: int
    context: int = 1024
    kv_heads: int = 0
    inner: int = 0
    tied: bool = True
    stored: str = "float32"


PRESETS = {
    "tiny4x256": Shape("gpt2", 4, 256, 4, 50257),
    "gpt2": Shape("gpt2", 12, 768, 12, 50257),
    "gpt2-medium": Shape("gpt2", 24, 1024, 16, 50257),
    "gpt2-large": Shape("gpt2", 36, 1280, 20, 50257),
    "gpt2-xl": Shape("gpt2", 48, 1600, 25, 50257),
    "llama-160m-shape": Shape("llama", 12, 768, 12, 32000, 2048, 12, 3072),
    "llama-1b-shape": Shape("llama", 16, 2048, 32, 128256, 8192, 8, 8192),
    "llama-3b-shape": Shape("llama", 28, 3072, 24, 128256, 8192, 8, 8192),
    "llama-7b": Shape("llama", 32, 4096, 32, 32000, 4096, 32, 11008, False, "bfloat16"),
    "mistral-7b": Shape("llama", 32, 4096, 32, 32768, 8192, 8, 14336, False, "bfloat16"),  # v0.3
}
CHANGEABLE = ("layers", "width", "heads", "vocab")


def resized(preset: str, changes: dict[str, int | None]) -> tuple[str, Shape]:
    """A preset with some numbers changed, and the name of the result."""
    base = PRESETS[preset]
    given = {key: value for key, value in changes.items() if value is not None}
    assert set(given) <= set(CHANGEABLE)
    shape = replace(base, **given)
    if shape.width % shape.heads:
        raise SystemExit(f"--width {shape.width}: must be a multiple of --heads {shape.heads}")
    if shape.family == "llama":
        shape = replace(
            shape,
            kv_heads=max(1, shape.heads * base.kv_heads // base.heads),
            inner=shape.width * base.inner // base.width,
        )
    if shape == base:
        return preset, shape
    name = f"{base.family}-{shape.layers}x{shape.width}-h{shape.heads}-v{shape.vocab}"
    return name, shape


def hf_config(shape: Shape, context: int, **token_ids: int) -> Any:
    """The transformers configuration. No dropout: both sides must compute the same thing."""
    import transformers

    if shape.family == "gpt2":
        return transformers.GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocab,
            n_positions=context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **token_ids,
        )  # fmt: skip
    return transformers.LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.width, vocab_size=shape.vocab,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner, max_position_embeddings=context,
        tie_word_embeddings=shape.tied, attention_dropout=0.0, **token_ids,
    )  # fmt: skip
