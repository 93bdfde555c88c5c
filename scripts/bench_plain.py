"""The plain padded side of `bench.py --grow`: DPO as one would write it first.

Usage: `python bench_plain.py job.json result.json`

Chosen and rejected in one padded batch, the prompt in both, full logits, the model's own
forward; the reference is computed once beforehand, as on the other side. `train` takes
other ways to compute the same, for `bench_ladder.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from bench_job import Job, Window, synchronise, work
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedModel

BETA = 0.1
Rows = list[dict[str, list[int]]]  # pairs as token ids: prompt, chosen, rejected


@dataclass(frozen=True)
class Way:
    """How pairs become log-probabilities.

    logprobs(model, rows, job): (2E,) summed over each response, all chosen, then all
    rejected. live_reference: computed anew in every step, by a copy of the model.
    """

    logprobs: Callable[[PreTrainedModel, Rows, Job], Tensor]
    live_reference: bool = False


def measure(job: Job) -> dict[str, Any]:
    return train(job, Way(sequence_logprobs))


def train(job: Job, way: Way) -> dict[str, Any]:
    """The steps of `job`, written out; the same optimiser as on the other side."""
    window = Window(job)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).to(job.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    rows = job.rows()[: job.total_steps * job.batch]
    batches = [rows[i : i + job.batch] for i in range(0, len(rows), job.batch)]
    started = time.perf_counter()
    reference = references(model, batches, way, job)
    synchronise(job.device)
    seconds = None if way.live_reference else time.perf_counter() - started
    model.train()
    for step, (batch, of_reference) in enumerate(zip(batches, reference, strict=True)):
        policy = way.logprobs(model, batch, job)
        rho_chosen, rho_rejected = (policy - of_reference).chunk(2)
        loss = -logsigmoid(BETA * (rho_chosen - rho_rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = job.lr * (1.0 - step / job.total_steps)
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = policy.detach().chunk(2)
        window.end_of_step(step + 1, {
            "loss": loss.item(), "logps/chosen": chosen.mean().item(),
            "logps/rejected": rejected.mean().item(),
        })  # fmt: skip
    return window.result(reference_seconds=seconds)


def references(model: PreTrainedModel, batches: list[Rows], way: Way, job: Job) -> Iterable[Tensor]:
    """The reference's log-probabilities of batch after batch: all at once, or when asked."""
    if way.live_reference:
        frozen = copy.deepcopy(model).requires_grad_(False)
        return (way.logprobs(frozen, batch, job) for batch in batches)
    with torch.no_grad():
        return [way.logprobs(model, batch, job) for batch in batches]


def sequence_logprobs(model: PreTrainedModel, rows: Rows, job: Job) -> Tensor:
    """(2E,) summed log-probabilities of the responses: all chosen, then all rejected."""
    ids, real, scored = padded(rows, job)
    with autocast(job):
        logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1)
    tokens = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    return (tokens * scored[:, 1:]).sum(1)


def padded(rows: Rows, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """(2E, L) token ids, which of them are real, and which belong to a response."""
    pairs = [(row["prompt"], row[name]) for name in ("chosen", "rejected") for row in rows]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    real = torch.zeros(len(pairs), length, dtype=torch.bool)
    scored = torch.zeros(len(pairs), length, dtype=torch.bool)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        real[i, :end] = True
        scored[i, len(prompt) : end] = True
    return ids.to(job.device), real.to(job.device), scored.to(job.device)


def autocast(job: Job) -> AbstractContextManager[object]:
    return nullcontext() if job.precision == "fp32" else torch.autocast(job.device, torch.bfloat16)


if __name__ == "__main__":
    work(measure)
