"""Shapes of the measured models, from publications, and lengths of synthetic pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder of one family. kv_heads, inner (MLP width) and tied (embedding and output layer
    share a weight) are used by `llama` only. stored: dtype of the published weights' files."""

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
    """A preset with some sizes changed, and the name of the result."""
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
    """The transformers configuration, without dropout: both sides must compute the same."""
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


@dataclass(frozen=True)
class Lengths:
    """Of prompt, chosen (with EOS) and rejected (with EOS), in tokens.

    name: in labels. log_mean, log_sd, correlation: of the logarithms; shortest, longest: of each.
    kept: maximum tokens of prompt and response in training, half of them for the prompt.
    """

    name: str
    log_mean: tuple[float, float, float]
    log_sd: tuple[float, float, float]
    correlation: tuple[tuple[float, ...], ...]
    shortest: tuple[int, int, int]
    longest: tuple[int, int, int]
    kept: int


KNOWN = {
    # Fitted to the 2,312 pairs of Anthropic HH harmless-base/test in GPT-2's tokens.
    "hh": Lengths(
        "HH", (4.381, 3.370, 3.561), (1.001, 0.874, 0.926),
        ((1.0, 0.234, 0.226), (0.234, 1.0, 0.300), (0.226, 0.300, 1.0)),
        (13, 3, 3), (1 << 20,) * 3, 512,
    ),
    # Assumed, not fitted: Reddit posts of at most 512 tokens, about 350 on average, and
    # summaries of about 35, the two of a pair alike in length.
    "tldr": Lengths(
        "TL;DR (assumed)", (5.85, 3.50, 3.50), (0.40, 0.35, 0.35),
        ((1.0, 0.2, 0.2), (0.2, 1.0, 0.4), (0.2, 0.4, 1.0)),
        (40, 8, 8), (512, 64, 64), 1024,
    ),
    # Assumed, not fitted: instructions of about 180 tokens on average with half below 100, and
    # answers of several models of about 350, the longest far above.
    "ultrafeedback": Lengths(
        "UltraFeedback (assumed)", (4.60, 5.60, 5.50), (1.10, 0.75, 0.85),
        ((1.0, 0.2, 0.2), (0.2, 1.0, 0.5), (0.2, 0.5, 1.0)),
        (8, 8, 8), (1 << 20,) * 3, 1024,
    ),
}  # fmt: skip


def draw_lengths(name: str, count: int, rng: Any) -> Any:
    """(count, 3) tokens of prompt, chosen and rejected."""
    import numpy as np

    known = KNOWN[name]
    normal = rng.multivariate_normal(np.zeros(3), np.array(known.correlation), count)
    drawn = np.exp(normal * known.log_sd + known.log_mean).round().astype(int)
    return np.clip(drawn, known.shortest, known.longest)
