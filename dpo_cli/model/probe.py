"""Which attention a loaded model can use for packed rows, found by trying it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cli.errors import ConfigError
from dpo_cli.model import attention, forward
from dpo_cli.packing import pack
from dpo_cli.records import Batch, EncodedExample

PROBE_TOLERANCE = 2e-3  # nats, on random tokens in float32


@torch.no_grad()
def choose_attention(model: PreTrainedModel, choice: str) -> None:
    """Packed attention if it reproduces the plain forward, else the dense mask, else refuse.

    Some families accept a registered attention and ignore it, so each is tried on the
    loaded weights. The choice is `model.config._attn_implementation`.
    """
    model.eval()
    model.set_attn_implementation("eager")
    plain = torch.cat(
        [forward.padded_token_logprobs(model, p, r) for p, r in _probe_sequences(model)]
    )
    names = {"packed": [attention.NAME], "dense": ["eager"]}
    reasons = []
    for name in names.get(choice, [attention.NAME, "eager"]):
        why = _probe(model, name, plain)
        if why is None:
            return
        reasons.append(f"{'dense' if name == 'eager' else 'packed'}: {why}")
    raise ConfigError(
        f"model.attention={choice}: {type(model).__name__} cannot be used ({'; '.join(reasons)})"
    )


def _probe(model: PreTrainedModel, name: str, plain: torch.Tensor) -> str | None:
    """Why an attention implementation cannot be used, or None."""
    if name == "eager" and getattr(model.config.get_text_config(), "sliding_window", None):
        return "its sliding-window attention needs the packed kernel"
    model.set_attn_implementation(name)
    try:
        packed = forward.token_logprobs(model, _probe_row(model))
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    error_nats = float((packed - plain).abs().max())
    if error_nats < PROBE_TOLERANCE:
        return None
    return f"log-probabilities are {error_nats:.2g} away from the plain forward's"


def _probe_examples(model: PreTrainedModel) -> list[EncodedExample]:
    vocab = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 16).astype(np.int32)
    return [
        EncodedExample(ids[:3], (ids[3:7], ids[7:9]), 0),
        EncodedExample(ids[9:10], (ids[10:11], ids[11:16]), 1),
    ]


def _probe_row(model: PreTrainedModel) -> Batch:
    return pack(_probe_examples(model), [0, 1]).to(model.device)


def _probe_sequences(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.tensor(e.prompt_ids, device=model.device).long(),
         torch.tensor(r, device=model.device).long())
        for e in _probe_examples(model)
        for r in e.response_ids
    ]  # fmt: skip
