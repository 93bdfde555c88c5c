"""Decoding in steps of static shape: all that changes from token to token is on the device.

So a step can be recorded in a CUDA graph, its draw among it, and launched as a whole; the host
looks every few tokens for rows that have ended.
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
from dpo_cli.logprobs import promoted
from dpo_cli.model.attention.registered import attention_as
from dpo_cli.model.sampling import prefix_cache
from dpo_cli.model.sampling.decoding import advance, prefill, refuse_non_finite
from dpo_cli.model.sampling.draw import draw
from dpo_cli.model.sampling.graphs import Graphs, refusing_to_wait
from dpo_cli.model.sampling.sampled import Completion, Ends, Sampled, SamplingOptions, ended_by
from dpo_cli.model.sampling.static_cache import Room, StaticCache
from dpo_cli.model.sampling.trial import Note, Trial, first_line, in_half, tried_once, why_not

STEPPING = "dpo_static_steps"  # the attribute of a model that says why it cannot, or None
FUSED = "dpo_decode_kernel"  # the same of the kernel
LOOK_EVERY = 8  # steps; a look for finished rows makes the host wait
WORTH_RECORDING = 2  # steps to come: recording one takes as long as running it unrecorded
WORTH_DROPPING = 32  # steps to come, of fewer rows, that make good for the recording of a step


class Stepper:
    """Decodes batches of prompts one after the other in the same buffers.

    record: with CUDA graphs. kernel: with the Triton kernel for attention. longest: the tokens of
    any prompt. keep_logits: `logits` holds the last step's, (R, V).
    Of row r: `token` its last one, `position` that one's, `alive` its place in the batch.
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
        self.room: Room | None = None  # of the buffers; None: there are none
        self.cache: StaticCache

    def decode(self, prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        """`steps` tokens at most of each row, prompt-major."""
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
                if step % LOOK_EVERY == 0 and not self.look(step, steps):
                    break
                self.step(step, steps)
        rows = len(prompts) * self.options.completions
        return self.sampled.completions(rows, steps, self.ends)

    def begin(self, prompts: Sequence[np.ndarray], steps: int) -> None:
        """Prefill, and draw the first tokens."""
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
        """Buffers for a batch, new ones only where the present ones are too small."""
        if self.room is not None and self.room.holds(room):
            return
        wanted = (self.room or room).grown(room, self.longest or room.columns)
        self._free()  # or there would be two
        self.room, rows, device = wanted, wanted.rows, self.model.device
        self.cache = StaticCache(like, wanted, self.kernel)
        dtype = promoted(self.model.dtype)
        self.sampled = Sampled(rows, self.room.tokens, dtype, device)
        self.token, self.position, self.alive = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3)
        )
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def _free(self) -> None:
        """Let go of the buffers and of what was recorded over them."""
        if self.graphs is not None:
            self.graphs.forget()
        self.room = self.logits = None
        vars(self).pop("cache", None)

    def step(self, number: int, steps: int) -> None:
        """The number-th token behind the first of each row."""
        self.cache.see(number)
        if self.graphs is None:
            self._step()
            return
        shape = self.cache.shape
        if shape not in self.graphs.recorded and steps - number < WORTH_RECORDING:
            self._step()
            return
        try:
            self.graphs.run(shape, self._step)
        except RuntimeError as error:
            if ran_out(error):
                raise
            self.graphs = None
            self.note(f"a sampling step cannot be recorded in a CUDA graph: {first_line(error)}")
            self._step()

    def _step(self) -> None:
        """Device work alone, on the same tensors each time."""
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

    def look(self, number: int, steps: int) -> bool:
        """Drop finished rows before the number-th step; returns whether any go on."""
        going = ~self.ended[: self.rows].cpu().numpy()
        if not going.any():
            return False
        rows = self.cache.room_for(going)
        if rows < self.rows and (steps - number >= WORTH_DROPPING or self._knows(rows)):
            index = torch.from_numpy(self.cache.keep(going, number)).to(self.model.device)
            for x in (self.token, self.position, self.alive, self.ended):
                x[:rows] = x[index]
            self.rows = rows
        return True

    def _knows(self, rows: int) -> bool:
        """Whether no new step would have to be recorded for so many rows."""
        return self.graphs is None or any(rows == known for _, known, _ in self.graphs.recorded)


def can_step(model: PreTrainedModel, note: Note) -> bool:
    """Whether recorded steps reproduce the model's own decoding, tried once per model."""
    why_not_steps = partial(_why_no_steps, kernel=False)
    return tried_once(model, STEPPING, why_not_steps, note, "no CUDA graphs are used")


def has_kernel(model: PreTrainedModel, note: Note) -> bool:
    """Whether the Triton kernel can be used in such steps, tried once per model. It is for half
    precision, in which the matrix units take a fraction of the time that reading keys does."""
    if model.device.type != "cuda" or find_spec("triton") is None or not in_half(model):
        return False
    why_no_kernel = partial(_why_no_steps, kernel=True)
    return tried_once(model, FUSED, why_no_kernel, note, "attention without a fused kernel")


def _why_no_steps(model: PreTrainedModel, kernel: bool) -> str | None:
    """Tried as it will be used: in the caller's precision, from the second step on recorded.

    The kernel reads prompts of one sample in another way than those of several.
    """
    whys = (why_not(model, partial(_trial, model, samples, kernel)) for samples in (2, 1))
    return next((why for why in whys if why is not None), None)


def _trial(
    model: PreTrainedModel, samples: int, kernel: bool, trial: Trial, plain: Tensor
) -> Tensor:
    """(len(tokens), R, V) logits of two samples a prompt, or of each prompt twice."""
    prompts, tokens = [p for p in trial[0] for _ in range(2 // samples)], trial[1]
    steps, reasons = len(tokens) + WORTH_RECORDING, []  # type: int, list[str]
    options, record = SamplingOptions(samples, max_new_tokens=steps), model.device.type == "cuda"
    stepper = Stepper(model, options, -1, 0, record, reasons.append, kernel, keep_logits=True)
    stepper.begin(prompts, steps)
    found = []
    with attention_as(model, prefix_cache.NAME):
        for number, token in enumerate(tokens, start=1):
            stepper.token.fill_(int(token))
            # The first is not recorded: a wait in a recording would break CUDA's state.
            with refusing_to_wait(model.device) if number == 1 else nullcontext():
                stepper.step(number, steps)
            assert stepper.logits is not None
            found.append(stepper.logits.clone())
    if reasons:
        raise RuntimeError(reasons[0])
    return torch.stack(found).double()
