"""One rung of `bench_ladder.py`: the same DPO steps with the techniques up to there.

Usage: `python bench_rung.py job.json result.json`; `settings.rung` is one of `RUNGS`.

Padded rungs have a loop of their own (`bench_plain.train`); the others are dpo-run itself
with what is not theirs yet taken out. Every rung imports the same modules, so what a
process takes before its model is the same for all.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import bench_ours
import bench_plain
import torch
from bench_job import Job, work
from bench_plain import Rows, Way, autocast, padded
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli import packing
from dpo_cli.logprobs import LossOf, sum_by_sequence
from dpo_cli.model import forward, fuse
from dpo_cli.packing import pack
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.stages import dpo
from dpo_cli.train import runtime

Result = dict[str, Any]


def scored_only(model: PreTrainedModel, rows: Rows, job: Job) -> Tensor:
    """As `bench_plain.sequence_logprobs`, the head at the responses' tokens alone."""
    ids, real, scored = padded(rows, job)
    targets = scored[:, 1:]
    with autocast(job):
        out = model.base_model(input_ids=ids, attention_mask=real.long(), use_cache=False)
        tokens = head_logprobs(model, out.last_hidden_state[:, :-1][targets], ids[:, 1:][targets])
    return sum_by_sequence(tokens, targets.nonzero()[:, 0], len(ids))


def head_logprobs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N, D) -> (N,) by the model's own output layer and autograd."""
    logits = model.get_output_embeddings()(hidden)
    return logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def plain_head() -> AbstractContextManager[Any]:
    """All scored tokens' logits at once, differentiated by autograd."""

    def loss_and_logprobs(
        model: PreTrainedModel, batch: Batch, loss_of: LossOf
    ) -> tuple[Tensor, Tensor]:
        logprobs = head_logprobs(model, forward.target_states(model, batch), batch.targets)
        return loss_of(logprobs, slice(0, len(batch.example_ids))), logprobs.detach()

    return mock.patch.object(dpo, "loss_and_logprobs", loss_and_logprobs)


@contextmanager
def prompt_for_each_response() -> Iterator[None]:
    """Every response behind a prompt of its own, in the same packed rows."""
    tokens = property(lambda e: sum(len(e.prompt_ids) + len(r) for r in e.response_ids))
    with (
        mock.patch.object(packing, "pack", pack_apart),
        mock.patch.object(EncodedExample, "packed_tokens", tokens),
    ):
        yield


def pack_apart(
    examples: Sequence[EncodedExample], example_ids: Sequence[int], keep_last: bool = False
) -> Batch:
    """A row of one-response examples, that says of itself what a row of `examples` would."""
    alone = [replace(e, response_ids=(ids,)) for e in examples for ids in e.response_ids]
    return replace(
        pack(alone, range(len(alone)), keep_last),
        example_ids=torch.tensor(list(example_ids)),
        branches=len(examples[0].response_ids),
        counts=tuple(sum(map(len, e.response_ids)) for e in examples),
    )


@contextmanager
def no_cpu_extras() -> Iterator[list[str]]:
    """`cpu_extras` do nothing, under every name by which a module of dpo-run calls them."""
    extras = cpu_extras()
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "dpo_cli"]
    places = [
        (module, name)
        for module in modules
        for name, value in vars(module).items()
        if any(value is extra for extra in extras)
    ]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, unchanged))
        yield [extra.__name__ for extra in extras]


def cpu_extras() -> list[Callable[..., Any]]:
    """What dpo-run does to compute the same thing faster on a CPU: the functions of
    `dpo_cli/model/fuse.py` that change a model, and malloc's settings."""
    return [*changes_of_a_model(fuse), runtime.keep_freed_memory]


def changes_of_a_model(module: ModuleType) -> list[Callable[..., Any]]:
    """The module's own public functions whose first parameter is `model`."""
    own = inspect.getmembers(module, inspect.isfunction)
    return [
        function
        for name, function in own
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and next(iter(inspect.signature(function).parameters), "") == "model"
    ]


def unchanged(*arguments: Any) -> Any:
    """What an extra is replaced by: returns the model that it is given."""
    return arguments[0] if arguments else None


def padded_loop(way: Way) -> Callable[[Job], Result]:
    return lambda job: bench_plain.train(job, way)


def dpo_run(*without: Callable[[], AbstractContextManager[Any]]) -> Callable[[Job], Result]:
    """dpo-run without its CPU extras, and with these taken out."""

    def measure(job: Job) -> Result:
        with ExitStack() as stack, no_cpu_extras() as switched_off:
            for leave_out in without:
                stack.enter_context(leave_out())
            return bench_ours.measure(job) | {"switched_off": switched_off}

    return measure


RUNGS: dict[str, Callable[[Job], Result]] = {
    "plain": padded_loop(Way(bench_plain.sequence_logprobs, live_reference=True)),
    "cached": padded_loop(Way(bench_plain.sequence_logprobs)),
    "scored": padded_loop(Way(scored_only)),
    "packed": dpo_run(plain_head, prompt_for_each_response),
    "shared": dpo_run(plain_head),
    "fused": dpo_run(),
    "extras": bench_ours.measure,
    "bf16": lambda job: bench_ours.measure(replace(job, precision="bf16")),
}


def measure(job: Job) -> Result:
    """The rung's result; its own settings do not reach dpo-run's command line."""
    return RUNGS[job.settings["rung"]](replace(job, settings={}))


if __name__ == "__main__":
    work(measure)
