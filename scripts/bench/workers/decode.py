"""Both sides of `--task decode`: N samples a prompt, ours and transformers' generate.

A step is one call for `batch` prompts. EOS ends nothing on either side, so every call
yields batch * samples * new_tokens tokens. `settings.side` is `ours` or `hf`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.config import HardwareConfig, ModelConfig
from dpo_cli.model.attention import Placement
from dpo_cli.model.generate import Completion, SamplingOptions, sample
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.train.runtime import start_runtime
from scripts.bench.job import Job, Window, work

GREEDY_TOKENS = 8
Prompts = Sequence[np.ndarray]
Sampler = Callable[[Prompts, int], list[int]]  # prompts, seed -> new tokens of each sample
Scorer = Callable[[Prompts], list[float]]  # log-probability of each prompt's greedy continuation


def measure(job: Job) -> dict[str, Any]:
    """The greedy continuations are untimed: their log-probabilities must agree."""
    settings = dict(job.settings)
    make = {"ours": ours, "hf": generate}[settings.pop("side")]
    window = Window(job)
    lengths_of_samples, greedy_logprobs = make(job, settings)
    prompts = [np.array(row["prompt"], np.int32) for row in job.rows()]
    window.figures["logps/greedy"] = greedy_logprobs(prompts[: job.batch])
    for step in range(job.total_steps):
        batch = prompts[step * job.batch : (step + 1) * job.batch]
        lengths = lengths_of_samples(batch, step)
        assert lengths == [job.new_tokens] * (len(batch) * job.samples)
        window.end_of_step(step + 1, {})
    return window.result(reference_seconds=None)


def ours(job: Job, settings: dict[str, Any]) -> tuple[Sampler, Scorer]:
    """`sample()` as stage=sample calls it; an EOS id of -1 is never drawn."""
    assert not settings, f"settings that nothing reads: {settings}"
    hardware = HardwareConfig(device=job.device, precision=job.precision, threads=job.threads)
    runtime = start_runtime(hardware, seed=0)
    source = ModelConfig(path=job.model)
    tokenizer = load_tokenizer(source)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    model = load_model(source, tokenizer, on=Placement(runtime.device, dtype))
    model.to(runtime.device)
    many = SamplingOptions(
        completions=job.samples, max_new_tokens=job.new_tokens,
        batch_size=job.batch * job.samples,
    )  # fmt: skip
    one = replace(many, completions=1, temperature=0.0, max_new_tokens=GREEDY_TOKENS)

    def decode(prompts: Prompts, options: SamplingOptions) -> list[Completion]:
        with runtime.autocast():
            rows = sample(model, prompts, options, -1, tokenizer.pad_token_id)
        return [completion for row in rows for completion in row]

    return (
        lambda prompts, seed: [len(c.ids) for c in decode(prompts, replace(many, seed=seed))],
        lambda prompts: [float(c.logprobs.sum()) for c in decode(prompts, one)],
    )


def generate(job: Job, settings: dict[str, Any]) -> tuple[Sampler, Scorer]:
    """`model.generate(num_return_sequences=N)`, drawing from the whole distribution."""
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    attention = settings.pop("attn_implementation", None)
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=dtype, attn_implementation=attention
    )
    model.to(job.device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    low = job.precision == "bf16" and dtype != torch.bfloat16

    def decode(prompts: Prompts, **how: Any) -> Any:
        padded = tokenizer.pad({"input_ids": [p.tolist() for p in prompts]}, return_tensors="pt")
        with torch.no_grad(), torch.autocast(job.device, torch.bfloat16, enabled=low):
            return model.generate(
                **padded.to(job.device), **how, **settings,
                return_dict_in_generate=True,
            )  # fmt: skip

    def lengths(prompts: Prompts, seed: int) -> list[int]:
        torch.manual_seed(seed)
        out = decode(
            prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=job.samples, max_new_tokens=job.new_tokens,
        )  # fmt: skip
        new_tokens = out.sequences.shape[1] - max(map(len, prompts))
        return [new_tokens] * len(out.sequences)

    def greedy(prompts: Prompts) -> list[float]:
        out = decode(prompts, do_sample=False, max_new_tokens=GREEDY_TOKENS, output_logits=True)
        steps = torch.stack(out.logits, 1).float().log_softmax(-1)  # (B, GREEDY_TOKENS, V)
        return steps.max(-1).values.sum(1).tolist()

    return lengths, greedy


if __name__ == "__main__":
    work(measure)
