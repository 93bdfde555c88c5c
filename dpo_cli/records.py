"""The data structures of a run.

    raw row -> PreferenceExample -> EncodedExample -> Batch -> LossOutput

Shape letters used throughout:
    T  tokens of a packed row          N  scored (target) tokens of a packed row
    S  sequences (branches) in a row   E  examples in a row
    V  vocabulary                      D  hidden width
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # keeps torch and numpy off the path of `dpo-run --help`
    import numpy as np
    from torch import Tensor

# {"role": "user" | "assistant" | ..., "content": text, ...}, and other keys that templates read,
# such as tool_calls or reasoning_content; a conversation's tools are a key of its first message.
Message = dict[str, Any]
Prompt = str | list[Message]
Response = str | Message  # a message if it has more than a text


def response_text(response: Response) -> str:
    """The text of a response."""
    return response if isinstance(response, str) else str(response["content"])


def most_characters(tokens: int) -> int:
    """Characters of a text of which at most so many tokens are kept: what is beyond them is cut
    before it is tokenized, which takes a hundred times the memory of the text."""
    return max(64 * tokens, 2**17)


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One prompt and its responses, best first.

    One response: a demonstration (SFT). Two: chosen and rejected. More: a ranked list.
    row: 0-based row of the source file, for messages. finished: per response, False if it ended by
    length and so gets no EOS; None: all are finished. terms: the row's numbers for its loss,
    those that `config.datasets.row_terms` names.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    row: int
    scores: tuple[float, ...] | None = None
    finished: tuple[bool, ...] | None = None
    terms: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of a prompt (with BOS if the model has one) and of each response.

    A response ends with EOS unless it was truncated or unfinished. All arrays are int32 and 1-D.
    key: of the prompt's content, see data/trained.py; 0: unknown. prompt_json: the source's prompt
    as UTF-8 JSON, which takes less memory than messages. terms: as in PreferenceExample.
    """

    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    row: int
    scores: tuple[float, ...] | None = None
    key: int = 0
    prompt_json: bytes = b'""'
    terms: tuple[float, ...] | None = None

    @property
    def prompt(self) -> Prompt:
        """As the source has it: text, or the messages of a chat."""
        prompt: Prompt = json.loads(self.prompt_json)
        return prompt

    @property
    def packed_tokens(self) -> int:
        """Tokens of this example in a packed row (prompt once)."""
        return len(self.prompt_ids) + sum(len(r) for r in self.response_ids)


@dataclass(frozen=True, slots=True)
class Segment:
    """The position of one example in a packed row: a prompt, then its branches.

    start: offset of the prompt; prompt: its length; branches: length of each branch.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]


@dataclass(slots=True)
class Batch:
    """One packed row `[p|c|r][p|c|r]...`: a micro-batch.

    input_ids, position_ids: (T,). A branch's positions continue its prompt's.
    source_index: (N,) row of the hidden state that predicts each target.
    targets: (N,) token ids; sequence_index: (N,) in [0, S): the branch of each target.
    sequence_lengths: (S,) number of targets of each branch. Branches of an example are adjacent.
    example_ids: (E,) indices of the examples in their dataset; places: the same on the host, to be
    read without a device synchronization.
    branches: K, the same for every example of the row. counts: number of targets per example.
    last_index: (S,) row of each branch's last token (its prompt's if the branch is empty);
    None if last tokens are left out.
    filler: a row with weight 0, computed to stay in step with other ranks.
    cuts: sequences on different sides of these lengths do not share a segment (`packing.pack`).
    layouts: kernel -> its attention layout of this row, built when first needed.
    """

    input_ids: Tensor
    position_ids: Tensor
    source_index: Tensor
    targets: Tensor
    sequence_index: Tensor
    sequence_lengths: Tensor
    example_ids: Tensor
    layout: tuple[Segment, ...]
    branches: int
    counts: tuple[int, ...]
    last_index: Tensor | None = None
    filler: bool = False
    places: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    layouts: dict[str, Any] = field(default_factory=dict)

    def to(self, device: Any) -> Batch:
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, for asynchronous copies to CUDA."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, move: Callable[[Any], Any]) -> Batch:
        moved = {
            name: move(getattr(self, name))
            for name in (
                "input_ids", "position_ids", "source_index", "targets",
                "sequence_index", "sequence_lengths", "example_ids",
            )
        }  # fmt: skip
        last = None if self.last_index is None else move(self.last_index)
        layouts = {kernel: move(layout) for kernel, layout in self.layouts.items()}
        return replace(self, **moved, last_index=last, layouts=layouts)


@dataclass(slots=True)
class LossOutput:
    """A micro-batch's contribution to the step's loss.

    loss_sum: scalar with gradient; weight: number of examples or target tokens; the step divides
    the total sum once by the total weight. metrics: name -> (sum on the device, weight).
    """

    loss_sum: Tensor
    weight: float
    metrics: dict[str, tuple[Tensor, float]]

    def on_cpu(self) -> LossOutput:
        """A detached copy on the CPU, to be sent to another process."""
        metrics = {name: (value.cpu(), weight) for name, (value, weight) in self.metrics.items()}
        return LossOutput(self.loss_sum.detach().cpu(), self.weight, metrics)
