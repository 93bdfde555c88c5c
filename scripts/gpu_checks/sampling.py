"""Step 12: milliseconds per token in decoding, compared with transformers' generate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dpo_cli.model.attention.interface import use_kernel
from dpo_cli.model.fuse import fuse_gelu
from scripts.gpu_checks.exactness import LARGE, SMALL, random_gpt2
from scripts.gpu_checks.facts import Fact, Setup
from scripts.measuring import (
    Prompts,
    best_seconds,
    generated,
    greedy_generated,
    greedy_sampled,
    random_ids,
    sampled,
)

PROMPT = 96  # tokens; half to all of them
NEW_TOKENS = 64
# rows, prompts, and whether `generate` is measured as well
ROWS = ((128, 128, True), (128, 8, False), (512, 512, True))
FEW_ROWS = ((4, 4, True), (4, 2, False))
GREEDY = 8  # prompts and tokens


def check(setup: Setup) -> Iterator[Fact]:
    model = random_gpt2(SMALL if setup.small else LARGE, torch.device(setup.device))
    fuse_gelu(model)
    kernel = "grouped" if setup.small else "varlen"
    longest, new = (8, 4) if setup.small else (PROMPT, NEW_TOKENS)
    with torch.autocast(setup.device, torch.bfloat16):
        yield from agreement(model, kernel, prompts_of(model, GREEDY, longest), min(new, GREEDY))
        for rows, count, compare in FEW_ROWS if setup.small else ROWS:
            prompts, what = prompts_of(model, count, longest), f"{rows} rows of {count} prompts"
            use_kernel(model, kernel)
            ours = seconds(setup, lambda: sampled(model, prompts, rows // count, new))  # noqa: B023
            yield f"ours, {what}, ms per token", ours / new * 1e3
            yield f"ours, {what}, tokens/s", rows * new / ours
            if compare:
                model.set_attn_implementation("sdpa")
                theirs = seconds(setup, lambda: generated(model, prompts, rows // count, new))  # noqa: B023
                yield f"generate, {what}, ms per token", theirs / new * 1e3
    if not setup.small:
        yield "peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30


def prompts_of(model: Any, count: int, longest: int) -> Prompts:
    rng = np.random.default_rng(1)
    lengths = rng.integers(longest // 2, longest + 1, count)
    return [random_ids(rng, model.config.vocab_size, n) for n in lengths]


def seconds(setup: Setup, work: Callable[[], object]) -> float:
    """Time of the second of two calls."""
    taken = best_seconds(setup.device, work, times=1, groups=1)
    gc.collect()
    if not setup.small:
        torch.cuda.empty_cache()
    return taken


def agreement(model: Any, kernel: str, prompts: Prompts, new: int) -> Iterator[Fact]:
    """Log-probabilities of greedy continuations, by dpo-run and by transformers."""
    use_kernel(model, kernel)
    ours = greedy_sampled(model, prompts, new)
    model.set_attn_implementation("sdpa")
    theirs = greedy_generated(model, prompts, new)
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    yield "greedy log-probabilities, relative difference", difference
