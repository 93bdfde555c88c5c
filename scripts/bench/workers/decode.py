"""Both sides of `--task decode`: N samples per prompt, ours and transformers' generate.

A step is one call for `batch` prompts. EOS ends no sequence on either side, so every call yields
batch * samples * new_tokens tokens. `settings.side` is `ours` or `hf`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_cli.config import HardwareConfig, ModelConfig
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.train.runtime import start_runtime
from scripts.bench.job import Job, Window, work
from scripts.measuring import Prompts, generated, greedy_generated, greedy_sampled, sampled

GREEDY_TOKENS = 8
Sampler = Callable[[Prompts, int], object]  # prompts, seed; asserts how much it draws
Scorer = Callable[[Prompts], list[float]]  # log-probability of each prompt's greedy continuation


def measure(job: Job) -> dict[str, Any]:
    """Greedy continuations are not timed: they check that the log-probabilities agree."""
    settings = dict(job.settings)
    make = {"ours": ours, "hf": generate}[settings.pop("side")]
    window = Window(job)
    draw, greedy_logprobs = make(job, settings)
    prompts = [np.array(row["prompt"], np.int32) for row in job.rows()]
    window.figures["logps/greedy"] = greedy_logprobs(prompts[: job.batch])
    for step in range(job.total_steps):
        draw(prompts[step * job.batch : (step + 1) * job.batch], step)
        window.end_of_step(step + 1, {})
    return window.result(reference_seconds=None)


def ours(job: Job, settings: dict[str, Any]) -> tuple[Sampler, Scorer]:
    """Calls `sample()` as stage=sample does."""
    assert not settings, f"unused settings: {settings}"
    hardware = HardwareConfig(device=job.device, precision=job.precision, threads=job.threads)
    runtime = start_runtime(hardware, seed=0)
    source = ModelConfig(path=job.model)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    model = load_model(source, load_tokenizer(source), on=Placement(runtime.device, dtype))
    model.to(runtime.device)

    def draw(prompts: Prompts, seed: int) -> None:
        with runtime.autocast():
            sampled(model, prompts, job.samples, job.new_tokens, seed=seed)

    def score(prompts: Prompts) -> list[float]:
        with runtime.autocast():
            return greedy_sampled(model, prompts, GREEDY_TOKENS)

    return draw, score


def generate(job: Job, settings: dict[str, Any]) -> tuple[Sampler, Scorer]:
    """Calls `model.generate(num_return_sequences=N)`, sampling from the full distribution."""
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=dtype, attn_implementation=settings.pop("attn_implementation", None)
    )
    model.to(job.device).eval()
    low = job.precision == "bf16" and dtype != torch.bfloat16

    def draw(prompts: Prompts, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.autocast(job.device, torch.bfloat16, enabled=low):
            generated(model, prompts, job.samples, job.new_tokens, **settings)

    def score(prompts: Prompts) -> list[float]:
        with torch.autocast(job.device, torch.bfloat16, enabled=low):
            return greedy_generated(model, prompts, GREEDY_TOKENS, **settings)

    return draw, score


if __name__ == "__main__":
    work(measure)
