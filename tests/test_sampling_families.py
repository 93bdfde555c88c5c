"""Sampling of many families: a batch of ragged prompts against plain forwards of each row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.interface import attention_as
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.model.sampling.trial import decoding_mode
from families import FAMILIES, VOCABULARY, build, known_here

PROMPTS = [
    np.random.default_rng(5).integers(1, VOCABULARY, n).astype(np.int32) for n in (2, 9, 5, 9)
]
STEPS = 8  # beyond the windows and the chunks of 6

WITHOUT_CACHE = ("openai-gpt", "recurrent_gemma", "rwkv", "xlstm")  # or with one that is not right


def quiet(line):
    """A note that nobody reads."""


def draw(model, temperature, ends):
    options = SamplingOptions(2, temperature, max_new_tokens=STEPS, seed=3)
    return [c for row in sample(model, PROMPTS, options, ends, 0, note=quiet) for c in row]


def ids_of(completions):
    return [c.ids.tolist() for c in completions]


def until(end, ids):
    return ids[: ids.index(end) + 1] if end in ids else ids


def a_mixing_token(rows):
    """With it as their end, rows have the most different lengths."""
    return max(
        {t for ids in rows for t in ids}, key=lambda t: len({len(until(t, ids)) for ids in rows})
    )


@torch.no_grad()
def plain_logprobs(model, prompt, ids):
    """(len(ids), V) by one forward of one row, without a cache, a mask or positions."""
    row = torch.from_numpy(np.concatenate([prompt, ids])).long()[None]
    with attention_as(model, "eager"):
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_plain_forwards(family):
    if not known_here(family):
        pytest.skip("this transformers does not have the family")
    model = build(family)
    endless = ids_of(draw(model, 0.0, -1))
    end = a_mixing_token(endless)
    greedy = draw(model, 0.0, end)
    assert ids_of(greedy) == [until(end, ids) for ids in endless]
    drawn = draw(model, 1.0, end)
    assert len({len(c.ids) for c in greedy + drawn}) > 1
    assert ids_of(draw(model, 1.0, end)) == ids_of(drawn)
    for c, prompt in zip(greedy + drawn, 2 * [p for p in PROMPTS for _ in range(2)], strict=True):
        expected = plain_logprobs(model, prompt, c.ids)
        own = expected[range(len(c.ids)), c.ids]
        np.testing.assert_allclose(c.logprobs, own.numpy(), rtol=0, atol=2e-3)
        assert c.finished == (c.ids[-1] == end)
        assert c.finished or len(c.ids) == STEPS
    for ids, prompt in zip(endless[::2], PROMPTS, strict=True):
        assert ids == plain_logprobs(model, prompt, ids).argmax(-1).tolist()
    assert endless[::2] == endless[1::2]
    assert (decoding_mode(model, quiet) == "uncached") == (family in WITHOUT_CACHE)


def test_what_makes_a_decoding_mode_slower_is_told_once():
    model, told = build("mamba"), []
    for _ in range(2):
        sample(model, PROMPTS, SamplingOptions(max_new_tokens=2), 0, 0, note=told.append)
    (line,) = told
    assert line.startswith(
        "sampling from MambaForCausalLM is slower: only prompts of equal length are decoded "
        "together, and no row is dropped early (shared_prefix: its cache holds more than keys and "
        "values; repeated: its logits "
    )


def test_a_window_that_the_configuration_hides_is_found_out():
    """A cache that drops what attention of no window sees: too long a window for a trial."""
    model = build("llama")
    model.config.sliding_window = 40
    told = []
    prompts = [np.arange(1, 46, dtype=np.int32)]
    (row,) = sample(model, prompts, SamplingOptions(1, 0.0, max_new_tokens=6), -1, 0,
                    note=told.append)  # fmt: skip
    expected = plain_logprobs(model, prompts[0], row[0].ids)
    assert row[0].ids.tolist() == expected.argmax(-1).tolist()
    assert decoding_mode(model, quiet) == "uncached"
    assert len(told) == 1


def test_a_model_whose_own_forward_fails_is_refused_in_a_line():
    model = build("llama")

    def broken(*words, **more):
        raise RuntimeError("no kernel for this\nsecond line")

    model.model.forward = broken
    with pytest.raises(ConfigError, match=r"^cannot sample from LlamaForCausalLM: its own forward "
                       r"fails \(no kernel for this\); train.sample_prompts=0 .*$"):  # fmt: skip
        sample(model, PROMPTS, SamplingOptions(), 0, 0, note=quiet)
