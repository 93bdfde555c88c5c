"""Step 12: milliseconds a token of decoding, beside transformers' generate."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dpo_cli.model.attention import use
from dpo_cli.model.fuse import fuse_gelu
from dpo_cli.model.generate import SamplingOptions, sample
from scripts.gpu_checks.exactness import LARGE, SMALL, random_gpt2
from scripts.gpu_checks.facts import Fact, Setup

PROMPT = 96  # tokens; half to all of them
NEW_TOKENS = 64
# rows, prompts, and whether `generate` is asked for them as well
ROWS = ((128, 128, True), (128, 8, False), (512, 512, True))
FEW_ROWS = ((4, 4, True), (4, 2, False))
GREEDY = 8  # prompts and tokens
NEVER = -1  # no token is EOS, so that every row is as long


def check(setup: Setup) -> Iterator[Fact]:
    device = torch.device(setup.device)
    model = random_gpt2(SMALL if setup.small else LARGE, device)
    fuse_gelu(model)
    use(model, "grouped" if setup.small else "varlen")
    longest, new = (8, 4) if setup.small else (PROMPT, NEW_TOKENS)
    with torch.autocast(setup.device, torch.bfloat16):
        yield from agreement(model, prompts_of(model, GREEDY, longest), new)
        for rows, count, beside in FEW_ROWS if setup.small else ROWS:
            prompts = prompts_of(model, count, longest)
            what = f"{rows} rows of {count} prompts"
            sampled = seconds(device, lambda: ours(model, prompts, rows, new))  # noqa: B023
            yield f"ours, {what}, ms a token", sampled / new * 1e3
            yield f"ours, {what}, tokens/s", rows * new / sampled
            if beside:
                generated = seconds(device, lambda: generate(model, prompts, rows, new))  # noqa: B023
                yield f"generate, {what}, ms a token", generated / new * 1e3
    if not setup.small:
        yield "peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30


def prompts_of(model: Any, count: int, longest: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(longest // 2, longest + 1, count)
    return [rng.integers(1, model.config.vocab_size, n).astype(np.int32) for n in lengths]


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Of the second of two calls."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    taken = time.perf_counter() - began
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return taken


def ours(model: Any, prompts: Sequence[np.ndarray], rows: int, new: int, **how: Any) -> Any:
    options = SamplingOptions(completions=rows // len(prompts), max_new_tokens=new,
                              batch_size=rows, **how)  # fmt: skip
    found = sample(model, prompts, options, NEVER, 0)
    assert all(len(c.ids) == new for completions in found for c in completions)
    return found


def generate(model: Any, prompts: Sequence[np.ndarray], rows: int, new: int, **how: Any) -> Any:
    """By transformers, prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    model.set_attn_implementation("sdpa")
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} | how
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        return model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            max_new_tokens=new, pad_token_id=0, num_return_sequences=rows // len(prompts),
            **options, return_dict_in_generate=True,
        )  # fmt: skip


def agreement(model: Any, prompts: Sequence[np.ndarray], new: int) -> Iterator[Fact]:
    """Greedy continuations: the log-probabilities that the two give them."""
    steps = min(new, GREEDY)
    found = [float(c[0].logprobs.sum())
             for c in ours(model, prompts, len(prompts), steps, temperature=0.0)]  # fmt: skip
    plain = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
    out = generate(model, prompts, len(prompts), steps, output_logits=True, **plain)
    best = torch.stack(out.logits, 1).float().log_softmax(-1).max(-1).values.sum(1).tolist()
    away = max(abs(a - b) / abs(b) for a, b in zip(found, best, strict=True))
    yield "greedy log-probabilities, relative difference", away
