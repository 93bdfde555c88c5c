"""Sampling from the run's models: completions as token ids and as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import SamplingConfig, spec_of
from dpo_cli.data.chat import turn_end
from dpo_cli.distributed.fsdp import unsharded
from dpo_cli.model.sampling.generate import Completion, SamplingOptions, sample
from dpo_cli.report.files import append_samples
from dpo_cli.session.models import Loaded
from dpo_cli.session.session import Session


def sample_writer(session: Session, loaded: Loaded) -> Callable[[int], None]:
    """on_eval: completions of the same held-out prompts, appended to samples.jsonl."""
    train, tokenizer = session.config.train, loaded.tokenizer
    pool = loaded.splits.eval or loaded.splits.train
    prompts = [e.prompt_ids for e in pool[: train.sample_prompts]]
    options = SamplingOptions(
        temperature=train.sample_temperature,
        max_new_tokens=train.sample_max_new_tokens,
        seed=session.config.seed,
    )

    def write(step: int) -> None:
        if not prompts:
            return
        rows = complete(session, loaded.model, tokenizer, prompts, options)
        append_samples(session.run_dir, step, [r[0] for r in rows])

    return write


def decoded_together(session: Session, stage: SamplingConfig) -> int | None:
    """Number of sequences decoded together; None: as many as fit on the GPU."""
    if stage.batch_size is None and session.runtime.device.type == "cpu":
        return spec_of(stage).cpu_batch_size
    return stage.batch_size


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every token that ends a completion: EOS of the tokenizer and of the model's configurations,
    and the chat template's end-of-turn token."""
    candidates = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        candidates += ids if isinstance(ids, list | tuple) else [ids]
    if tokenizer.chat_template is not None:
        candidates.append(turn_end(tokenizer))
    return tuple(dict.fromkeys(int(i) for i in candidates if i is not None))


def draw_samples(
    session: Session,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    tick: Callable[[int], None] = lambda prompts: None,
) -> list[list[Completion]]:
    """`options.completions` samples of each prompt, computed in the run's precision."""
    ends, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id
    assert pad is not None
    ranks = session.ranks
    with session.runtime.autocast(), unsharded(model):
        samples = sample(
            model, prompts, options, ends, pad, tick, (ranks.rank, ranks.size), session.note,
            session.decoding,
        )  # fmt: skip
    if ranks.size == 1:
        return samples
    shares = ranks.gather(samples)
    return [next((row for row in rows if row), []) for rows in zip(*shares, strict=True)]


def complete(
    session: Session,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    tick: Callable[[int], None] = lambda prompts: None,
) -> list[list[dict[str, Any]]]:
    """Samples as rows {prompt, completion, finished, tokens}, one list per prompt."""
    samples = draw_samples(session, model, tokenizer, prompts, options, tick)
    return [
        [
            {
                "prompt": text_of(tokenizer, prompt),
                "completion": completion_text(tokenizer, c.ids),
                "finished": c.finished,
                "tokens": len(c.ids),
            }
            for c in row
        ]
        for prompt, row in zip(prompts, samples, strict=True)
    ]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    """Token ids as text, without special tokens."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def completion_text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    """Sampled ids as the text that continues a prompt, without special tokens.

    Decoded after an anchor, as sentencepiece strips the space at the start of a text.
    """
    anchor, before = _anchor(tokenizer)
    text = text_of(tokenizer, np.concatenate([anchor, ids]))
    return text[len(before) :] if text.startswith(before) else text_of(tokenizer, ids)


@lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, str]:
    """Ids of a short text, and the text they decode to."""
    ids = np.array(tokenizer("a", add_special_tokens=False).input_ids, np.int32)
    return ids, text_of(tokenizer, ids)
