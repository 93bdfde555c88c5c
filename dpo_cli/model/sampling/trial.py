"""Which way of decoding is right for a model, found by trying it against the plain forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.device_memory import ran_out
from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.registered import (
    PACKED,
    attention_as,
    cached_attention,
    kernel_of,
    short_windows,
)
from dpo_cli.model.sampling.decoding import ONE_LENGTH, refuse_non_finite, start

Note = Callable[[str], None]
Trial = tuple[Sequence[np.ndarray], np.ndarray]  # prompts, and tokens behind each of them

WAY = "dpo_decoding"  # the attribute of a model that names its way
# Fastest first, and what the later ones cost.
WAYS = {
    "shared": "",
    "repeated": "the keys of a prompt are copied",
    "own": "prompts of one length at a time, ended samples decoded on",
    "whole": "prompts of one length at a time, each token by a forward of the whole text",
}
# Of what another prompt changes in the logits, by half precision: there a right cache is .03 to
# .06 away at 36 layers, a broken one .6 and more.
AGREEMENT = {False: 0.02, True: 0.25}
HALF = (torch.bfloat16, torch.float16)
REFUSED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
GOING = np.array([True, False, True, True, False, True])  # after half of the trial's tokens


def way_of(model: PreTrainedModel, note: Note) -> str:
    """The fastest way in which the model's decoding is that of its plain forward, tried once a
    model; what makes it a slow one is noted. ConfigError where even that forward fails."""
    if not hasattr(model, WAY):
        whys: dict[str, str] = {}
        with torch.autocast(model.device.type, enabled=False), short_windows(model):
            way = next(way for way in WAYS if not _refuted(model, way, whys))
        setattr(model, WAY, way)
        if whys:
            told = "; ".join(whys.values()) if len(whys) == 1 else "; ".join(
                f"{way}: {why}" for way, why in whys.items()
            )  # fmt: skip
            note(f"sampling from {type(model).__name__}: {WAYS[way]}, which is slower ({told})")
    return str(getattr(model, WAY))


def _refuted(model: PreTrainedModel, way: str, whys: dict[str, str]) -> bool:
    """Whether a way is wrong, or cannot be gone; then `whys` tells the reason."""
    why: str | None = None
    if way == "shared" and kernel_of(model) not in PACKED:
        why = f"its attention is {kernel_of(model)}"
    elif way != "whole":
        why = why_not(model, partial(_teacher_forced, model, way=way))
    if why is not None:
        whys[way] = why
    return why is not None


def tried_once(
    model: PreTrainedModel, name: str, why_not: Callable[[PreTrainedModel], str | None],
    note: Note, otherwise: str,
) -> bool:  # fmt: skip
    """Whether a way of decoding is right for a model: found once, and said if it is not."""
    if not hasattr(model, name):
        why = why_not(model)
        setattr(model, name, why)
        if why is not None:
            note(f"sampling from {type(model).__name__}: {otherwise}, which is slower ({why})")
    return getattr(model, name) is None


@torch.no_grad()
def why_not(model: PreTrainedModel, decode: Callable[[Trial, Tensor], Tensor]) -> str | None:
    """What sets a way of decoding apart from the model's plain forward, in the caller's precision.

    Two samples of three random prompts, one padded, decoded with the same tokens. Against the
    difference that another prompt makes: of untrained weights it is tiny.
    decode: (trial, plain logits) -> (len(tokens), R, V) logits; what is not decoded, as in plain.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 16)
    trial = (ids[:5], ids[5:10], ids[10:12]), ids[12:]
    plain = _plain(model, trial)
    try:
        found = decode(trial, plain)
    except REFUSED as error:
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        return first_line(error)
    effect = (plain[:, 0] - plain[:, 2]).norm()  # the first two prompts, of one length
    away = float((found - plain).norm() / effect)
    if away < AGREEMENT[in_half(model)]:
        return None
    return f"its logits would be off by {away:.2g} of what another prompt changes"


def in_half(model: PreTrainedModel) -> bool:
    """Whether its products are computed in half precision, as the caller has set it."""
    return model.dtype in HALF or torch.is_autocast_enabled(model.device.type)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(model: PreTrainedModel, trial: Trial) -> Tensor:
    """(len(tokens), R, V) logits behind each token by forwards of whole rows, without a cache."""
    prompts, tokens = trial
    found = []
    with attention_as(model, cached_attention(model)):
        for prompt in prompts:
            ids = torch.from_numpy(np.concatenate([prompt, tokens])).to(model.device)
            try:
                logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) :]
            except REFUSED as error:
                if isinstance(error, RuntimeError) and ran_out(error):
                    raise
                raise ConfigError(
                    f"{type(model).__name__} cannot be sampled: its own forward fails "
                    f"({first_line(error)}); train.sample_prompts=0 trains without samples"
                ) from error
            refuse_non_finite(logits)
            found += [logits, logits]
    return torch.stack(found, 1).double()


def _groups(prompts: Sequence[np.ndarray], way: str) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of prompts that are decoded together."""
    if way not in ONE_LENGTH:
        yield 0, len(prompts)
        return
    yield 0, 2
    yield 2, 3


def _teacher_forced(model: PreTrainedModel, trial: Trial, plain: Tensor, way: str) -> Tensor:
    """`plain` with what two samples a prompt give, some of which are dropped on the way."""
    prompts, tokens = trial
    found = plain.clone()
    for first, last in _groups(prompts, way):
        rows, position, _ = start(model, prompts[first:last], 2, 0, way)
        alive = np.arange(2 * first, 2 * last)
        with attention_as(model, rows.attention):
            for number, token in enumerate(tokens):
                if number == len(tokens) // 2:
                    order = rows.keep(GOING[alive])
                    alive, position = (
                        alive[order],
                        position[torch.from_numpy(order).to(position.device)],
                    )
                same = torch.full_like(position, int(token))
                position = position + 1
                logits = rows.advance(model, same, position)
                found[number, torch.from_numpy(alive).to(found.device)] = logits.double()
    return found
