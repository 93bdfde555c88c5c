"""Decoding in steps of static shape: everything that changes from token to token is on the device.

A step, including the random draw, can then be captured in a CUDA graph and replayed; the host
checks for finished rows every few tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dpo_cli.device_memory import ran_out
from dpo_cli.errors import first_line
from dpo_cli.logprobs import promoted
from dpo_cli.model.attention.interface import attention_as
from dpo_cli.model.sampling import prefix_cache
from dpo_cli.model.sampling.decoding import advance, prefill, refuse_non_finite
from dpo_cli.model.sampling.draw import draw
from dpo_cli.model.sampling.graphs import Graphs, refusing_to_wait
from dpo_cli.model.sampling.sampled import Completion, Ends, Sampled, SamplingOptions, ended_by
from dpo_cli.model.sampling.static_cache import Room, StaticCache
from dpo_cli.model.sampling.trial import Note, Trial, in_half_precision, mismatch, passes_once

STEPS_MISMATCH = "dpo_static_steps"  # attribute of a model: why static steps are wrong, or None
KERNEL_MISMATCH = "dpo_decode_kernel"  # the same for the Triton kernel
SYNC_EVERY = 8  # steps between checks for finished rows, which block the host
WORTH_CAPTURING = 2  # remaining steps: capturing takes as long as an eager step
WORTH_DROPPING = 32  # remaining steps whose savings pay for capturing a new shape


class Stepper:
    """Decodes batches of prompts one after the other in the same buffers.

    record: with CUDA graphs. kernel: with the Triton kernel for attention. longest: length of the
    longest prompt of any batch. keep_logits: `logits` holds the last step's (R, V).
    Per row: `token` is its last token, `position` that token's position, `alive` the row's index in
    the batch.
    """

    def __init__(
        self, model: PreTrainedModel, options: SamplingOptions, ends: Ends, pad_id: int,
        record: bool, note: Note = warnings.warn, kernel: bool = False,
        longest: int | None = None, keep_logits: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.options, self.ends, self.pad_id = model, options, ends, pad_id
        self.generator = torch.Generator(model.device)
        self.longest = longest
        self.graphs = Graphs(self.generator) if record else None
        self.note, self.kernel, self.keep_logits = note, kernel, keep_logits
        self.logits: Tensor | None = None
        self.room: Room | None = None  # size of the buffers; None: not allocated
        self.cache: StaticCache

    def decode(self, prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        """Completions of at most `steps` tokens, prompt-major."""
        try:
            return self._decode(prompts, steps, seed)
        except RuntimeError as error:
            if ran_out(error):
                self._free()
            raise

    def _decode(self, prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        self.generator.manual_seed(seed)
        self.begin(prompts, steps)
        with attention_as(self.model, prefix_cache.NAME):
            for step in range(1, steps):
                if step % SYNC_EVERY == 0 and not self.drop_finished(step, steps):
                    break
                self.step(step, steps)
        rows = len(prompts) * self.options.completions
        return self.sampled.completions(rows, steps, self.ends)

    def begin(self, prompts: Sequence[np.ndarray], steps: int) -> None:
        """Prefill, and draw each row's first token."""
        samples = self.options.completions
        room = Room(len(prompts), samples, max(len(p) for p in prompts), steps)
        parts = []
        for first, cache, _, part in prefill(self.model, prompts, self.pad_id):
            if first == 0:
                self._make_room(cache, room)
                self.cache.begin([len(p) for p in prompts])
            self.cache.fill_prompts(first, cache)
            parts.append(part)
        logits = torch.cat(parts).repeat_interleave(samples, 0)
        refuse_non_finite(logits)
        self.rows = len(prompts) * samples
        self.sampled.tokens.zero_()
        self.alive[: self.rows] = torch.arange(self.rows, device=self.model.device)
        self.ended.zero_()
        lengths = np.repeat([len(p) - 1 for p in prompts], samples)
        self.position[: self.rows] = torch.from_numpy(lengths).to(self.model.device)
        self._draw(logits, self.cache.column)

    def _make_room(self, like: DynamicCache, room: Room) -> None:
        """Allocate buffers for a batch, if the present ones are too small."""
        if self.room is not None and self.room.holds(room):
            return
        larger = (self.room or room).grown(room, self.longest or room.columns)
        self._free()  # before allocating: both would not fit
        self.room, rows, device = larger, larger.rows, self.model.device
        self.cache = StaticCache(like, larger, self.kernel)
        dtype = promoted(self.model.dtype)
        self.sampled = Sampled(rows, self.room.tokens, dtype, device)
        self.token, self.position, self.alive = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3)
        )
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def _free(self) -> None:
        """Free the buffers and the graphs captured over them."""
        if self.graphs is not None:
            self.graphs.forget()
        self.room = self.logits = None
        vars(self).pop("cache", None)

    def step(self, number: int, steps: int) -> None:
        """Draw the number-th token after each row's first."""
        self.cache.see(number)
        if self.graphs is None:
            self._step()
            return
        shape = self.cache.shape
        if shape not in self.graphs.recorded and steps - number < WORTH_CAPTURING:
            self._step()
            return
        try:
            self.graphs.run(shape, self._step)
        except RuntimeError as error:
            if ran_out(error):
                raise
            self.graphs = None
            self.note(f"a sampling step cannot be captured in a CUDA graph: {first_line(error)}")
            self._step()

    def _step(self) -> None:
        """Device work only, on the same tensors each time."""
        rows = self.rows
        self.cache.begin_step()
        position = self.position[:rows]
        position += 1
        logits = advance(self.model, self.cache, self.token[:rows], position)
        self.cache.column += 1
        self._draw(logits, self.cache.column)
        if self.keep_logits:
            self.logits = logits

    def _draw(self, logits: Tensor, step: Tensor) -> None:
        options, rows = self.options, len(logits)
        chosen, logp = draw(logits, options.temperature, options.top_p, self.generator)
        self.sampled.add(step, self.alive[:rows], chosen, logp)
        self.token[:rows] = chosen
        self.ended[:rows] |= ended_by(chosen, self.ends)

    def drop_finished(self, number: int, steps: int) -> bool:
        """Drop finished rows before the number-th step; returns whether unfinished ones remain."""
        unfinished = ~self.ended[: self.rows].cpu().numpy()
        if not unfinished.any():
            return False
        count = self.cache.rows_for(unfinished)
        if count < self.rows and (steps - number >= WORTH_DROPPING or self._is_recorded(count)):
            index = torch.from_numpy(self.cache.keep(unfinished, number)).to(self.model.device)
            for x in (self.token, self.position, self.alive, self.ended):
                x[:count] = x[index]
            self.rows = count
        return True

    def _is_recorded(self, count: int) -> bool:
        """Whether a step with this number of rows is captured already, or needs no capture."""
        return self.graphs is None or any(rows == count for _, rows, _ in self.graphs.recorded)


def can_step(model: PreTrainedModel, note: Note) -> bool:
    """Whether static steps reproduce the model's plain forward; tried once per model."""
    steps_mismatch = partial(_steps_mismatch, kernel=False)
    return passes_once(model, STEPS_MISMATCH, steps_mismatch, note, "no CUDA graphs are used")


def has_kernel(model: PreTrainedModel, note: Note) -> bool:
    """Whether static steps can use the Triton kernel; tried once per model. Only in half precision,
    where matrix products take a fraction of the time of reading the keys."""
    if model.device.type != "cuda" or find_spec("triton") is None or not in_half_precision(model):
        return False
    kernel_mismatch = partial(_steps_mismatch, kernel=True)
    return passes_once(model, KERNEL_MISMATCH, kernel_mismatch, note, "no fused attention kernel")


def _steps_mismatch(model: PreTrainedModel, kernel: bool) -> str | None:
    """Why static steps are wrong for a model, or None. Tried as they will be used: in the caller's
    precision, captured from the second step on; with two samples per prompt and with one, which the
    kernel reads differently."""
    reasons = (mismatch(model, partial(_trial, model, samples, kernel)) for samples in (2, 1))
    return next((reason for reason in reasons if reason is not None), None)


def _trial(
    model: PreTrainedModel, samples: int, kernel: bool, trial: Trial, plain: Tensor
) -> Tensor:
    """(len(tokens), R, V) logits of two samples per prompt, or of each prompt twice."""
    prompts, tokens = [p for p in trial[0] for _ in range(2 // samples)], trial[1]
    steps, reasons = len(tokens) + WORTH_CAPTURING, []  # type: int, list[str]
    options, record = SamplingOptions(samples, max_new_tokens=steps), model.device.type == "cuda"
    stepper = Stepper(model, options, -1, 0, record, reasons.append, kernel, keep_logits=True)
    stepper.begin(prompts, steps)
    logits = []
    with attention_as(model, prefix_cache.NAME):
        for number, token in enumerate(tokens, start=1):
            stepper.token.fill_(int(token))
            # The first step is not captured: a synchronization would invalidate the capture.
            with refusing_to_wait(model.device) if number == 1 else nullcontext():
                stepper.step(number, steps)
            assert stepper.logits is not None
            logits.append(stepper.logits.clone())
    if reasons:
        raise RuntimeError(reasons[0])
    return torch.stack(logits).double()
