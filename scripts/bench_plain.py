"""The plain padded side of `bench.py --grow`: DPO as one would write it first.

Usage: `python bench_plain.py job.json result.json`

Chosen and rejected in one padded batch, the prompt in both, full logits, the model's own
forward; the reference is computed once beforehand, as on the other side.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_job import Job, Window, work
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedModel

BETA = 0.1


def measure(job: Job) -> dict[str, Any]:
    window = Window(job)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).to(job.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    rows = job.rows()
    batches = [rows[i : i + job.batch] for i in range(0, len(rows), job.batch)]
    with torch.no_grad():
        reference = [sequence_logprobs(model, batch, job) for batch in batches]
    model.train()
    for step in range(job.total_steps):
        policy = sequence_logprobs(model, batches[step], job)
        rho_chosen, rho_rejected = (policy - reference[step]).chunk(2)
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
    return window.result(reference_seconds=None)


def sequence_logprobs(model: PreTrainedModel, rows: list[dict[str, Any]], job: Job) -> Tensor:
    """(2E,) summed log-probabilities of the responses: all chosen, then all rejected."""
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
    ids, real, scored = (x.to(job.device) for x in (ids, real, scored))
    with autocast(job):
        logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1)
    tokens = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    return (tokens * scored[:, 1:]).sum(1)


def autocast(job: Job) -> AbstractContextManager[object]:
    return nullcontext() if job.precision == "fp32" else torch.autocast(job.device, torch.bfloat16)


if __name__ == "__main__":
    work(measure)
