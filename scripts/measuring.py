"""Measurements shared by the benchmark and the GPU checks: time, configurations, random data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import hydra
import numpy as np
import torch

from dpo_cli.config import RunConfig
from dpo_cli.config.paths import conf_dir
from dpo_cli.config.read import prepare
from dpo_cli.model.sampling.generate import Completion, SamplingOptions, sample
from dpo_cli.records import EncodedExample
from scripts.common import synchronize

NEVER = -1  # EOS id that no token has, so that all completions have maximum length
WHOLE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # no truncation
GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
Prompts = Sequence[np.ndarray]


def compose(words: Sequence[str]) -> RunConfig:
    """The configuration as the command line composes it."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return prepare(hydra.compose("config", overrides=list(words)), words)


def best_seconds(
    device: str, work: Callable[[], object], times: int = 10, groups: int = 5
) -> float:
    """Seconds per call, in the fastest of several groups of calls."""
    for _ in range(min(3, times)):
        work()
    values = []
    for _ in range(groups):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            work()
        synchronize(device)
        values.append((time.perf_counter() - start) / times)
    return min(values)


def random_ids(rng: np.random.Generator, vocab: int, length: int) -> np.ndarray:
    return rng.integers(1, vocab, length).astype(np.int32)


def random_examples(lengths: Sequence[tuple[int, int, int]], vocab: int) -> list[EncodedExample]:
    """Pairs with these numbers of (prompt, chosen, rejected) tokens."""
    rng = np.random.default_rng(0)
    drawn = [[random_ids(rng, vocab, n) for n in row] for row in lengths]
    return [EncodedExample(p, (c, r), i) for i, (p, c, r) in enumerate(drawn)]


def sampled(model: Any, prompts: Prompts, samples: int, new: int, **how: Any) -> list[Completion]:
    """`samples` completions of `new` tokens per prompt, sampled as in stage=sample."""
    options = SamplingOptions(completions=samples, max_new_tokens=new,
                              batch_size=samples * len(prompts), **how)  # fmt: skip
    values = [c for row in sample(model, prompts, options, NEVER, 0) for c in row]
    assert all(len(c.ids) == new for c in values)
    return values


def generated(model: Any, prompts: Prompts, samples: int, new: int, **how: Any) -> Any:
    """The same by transformers, with prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            max_new_tokens=new, pad_token_id=0, num_return_sequences=samples,
            **WHOLE | how, return_dict_in_generate=True,
        )  # fmt: skip
    assert out.sequences.shape == (samples * len(prompts), longest + new)
    return out


def greedy_sampled(model: Any, prompts: Prompts, new: int) -> list[float]:
    """Log-probability of each prompt's greedy continuation."""
    values = sampled(model, prompts, 1, new, temperature=0.0)
    return [float(completion.logprobs.sum()) for completion in values]


def greedy_generated(model: Any, prompts: Prompts, new: int, **how: Any) -> list[float]:
    """The same from transformers' logits."""
    out = generated(model, prompts, 1, new, output_logits=True, **how | GREEDY)
    steps = torch.stack(out.logits, 1).float().log_softmax(-1)  # (B, new, V)
    values: list[float] = steps.max(-1).values.sum(1).tolist()
    return values
