"""The decoding mode of a model: the fastest one that reproduces its plain forward in a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.device_memory import ran_out
from dpo_cli.errors import ConfigError, first_line
from dpo_cli.model.attention.interface import (
    PACKED,
    attention_as,
    cached_attention,
    kernel_of,
    short_windows,
)
from dpo_cli.model.sampling.decoding import SAME_LENGTH_MODES, refuse_non_finite, start
from dpo_cli.model.skeleton import PROBE_ERRORS

Note = Callable[[str], None]
Trial = tuple[Sequence[np.ndarray], np.ndarray]  # prompts, and tokens that follow each of them

DECODING_MODE = "dpo_decoding"  # attribute of a model: its decoding mode
# Fastest first, with the cost of the later ones.
DECODING_MODES = {
    "shared_prefix": "",
    "repeated": "prompt keys and values are copied per sample",
    "same_length": "only prompts of equal length are decoded together, and no row is dropped early",
    "uncached": "only prompts of equal length are decoded together, with a full forward per token",
}
# Maximum difference, in units of the effect of another prompt; by half precision, where a correct
# cache differs by .03 to .06 at 36 layers and a broken one by .6 or more.
TOLERANCE = {False: 0.02, True: 0.25}
HALF = (torch.bfloat16, torch.float16)
UNFINISHED = np.array([True, False, True, True, False, True])  # after half of the trial's tokens


def decoding_mode(model: PreTrainedModel, note: Note) -> str:
    """The fastest mode whose logits are those of the model's plain forward, tried once per model.

    note: receives the reasons against faster modes. ConfigError if the plain forward fails.
    """
    if not hasattr(model, DECODING_MODE):
        reasons: dict[str, str] = {}
        with torch.autocast(model.device.type, enabled=False), short_windows(model):
            for mode in DECODING_MODES:
                reason = _rejection(model, mode)
                if reason is None:
                    break
                reasons[mode] = reason
        setattr(model, DECODING_MODE, mode)
        if reasons:
            details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            _note_slower(model, DECODING_MODES[mode], details, note)
    return str(getattr(model, DECODING_MODE))


def _note_slower(model: PreTrainedModel, cost: str, reason: str, note: Note) -> None:
    note(f"sampling from {type(model).__name__} is slower: {cost} ({reason})")


def _rejection(model: PreTrainedModel, mode: str) -> str | None:
    """Why a decoding mode cannot be used, or None."""
    if mode == "uncached":
        return None
    if mode == "shared_prefix" and kernel_of(model) not in PACKED:
        return f"its attention is {kernel_of(model)}"
    return mismatch(model, partial(_teacher_forced, model, mode=mode))


def passes_once(
    model: PreTrainedModel, name: str, mismatch: Callable[[PreTrainedModel], str | None],
    note: Note, cost: str,
) -> bool:  # fmt: skip
    """Whether `mismatch` finds none, computed once per model; else a note says what it costs.

    name: attribute of the model for the result.
    """
    if not hasattr(model, name):
        reason = mismatch(model)
        setattr(model, name, reason)
        if reason is not None:
            _note_slower(model, cost, reason, note)
    return getattr(model, name) is None


@torch.no_grad()
def mismatch(model: PreTrainedModel, decode: Callable[[Trial, Tensor], Tensor]) -> str | None:
    """How a decoding mode's logits differ from the model's plain forward, or None.

    Decodes two samples of three random prompts, one of them padded, with the same tokens, in the
    caller's precision. The difference is relative to the effect of another prompt, which is tiny
    for untrained weights.
    decode: (trial, plain logits) -> (len(tokens), R, V) logits; plain ones where rows were dropped.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 16)
    trial = (ids[:5], ids[5:10], ids[10:12]), ids[12:]
    plain = _plain(model, trial)
    try:
        logits = decode(trial, plain)
    except PROBE_ERRORS as error:
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        return first_line(error)
    effect = (plain[:, 0] - plain[:, 2]).norm()  # of the first two prompts, which are equally long
    difference = float((logits - plain).norm() / effect)
    if difference < TOLERANCE[in_half_precision(model)]:
        return None
    return f"its logits would differ by {difference:.2g} of the effect of another prompt"


def in_half_precision(model: PreTrainedModel) -> bool:
    """Whether matrix products are in half precision, by the weights or the caller's autocast."""
    return model.dtype in HALF or torch.is_autocast_enabled(model.device.type)


def _plain(model: PreTrainedModel, trial: Trial) -> Tensor:
    """(len(tokens), R, V) logits after each token, by forwards without a cache."""
    prompts, tokens = trial
    columns = []
    with attention_as(model, cached_attention(model)):
        for prompt in prompts:
            ids = torch.from_numpy(np.concatenate([prompt, tokens])).to(model.device)
            try:
                logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) :]
            except PROBE_ERRORS as error:
                if isinstance(error, RuntimeError) and ran_out(error):
                    raise
                raise ConfigError(
                    f"cannot sample from {type(model).__name__}: its own forward fails "
                    f"({first_line(error)}); train.sample_prompts=0 trains without samples"
                ) from error
            refuse_non_finite(logits)
            columns += [logits, logits]
    return torch.stack(columns, 1).double()


def _groups(prompts: Sequence[np.ndarray], mode: str) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of prompts that a mode can decode together."""
    if mode not in SAME_LENGTH_MODES:
        yield 0, len(prompts)
        return
    yield 0, 2
    yield 2, 3


def _teacher_forced(model: PreTrainedModel, trial: Trial, plain: Tensor, mode: str) -> Tensor:
    """`plain`, overwritten with the logits of two samples per prompt, some of which are dropped
    halfway."""
    prompts, tokens = trial
    decoded = plain.clone()
    for first, last in _groups(prompts, mode):
        rows, position, _ = start(model, prompts[first:last], 2, 0, mode)
        alive = np.arange(2 * first, 2 * last)
        with attention_as(model, rows.attention):
            for number, token in enumerate(tokens):
                if number == len(tokens) // 2:
                    order = rows.keep(UNFINISHED[alive])
                    alive, position = (
                        alive[order],
                        position[torch.from_numpy(order).to(position.device)],
                    )
                column = torch.full_like(position, int(token))
                position = position + 1
                logits = rows.advance(model, column, position)
                decoded[number, torch.from_numpy(alive).to(decoded.device)] = logits.double()
    return decoded
