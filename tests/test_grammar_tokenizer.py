"""The embedded tokenizer: lossless, the same everywhere, about one token a word."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_cli.grammar import continue_review, sample_review
from dpo_cli.grammar.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(1024)


def reviews(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [sample_review(rng) for _ in range(count)]


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 1024
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(build_tokenizer(10)) == 258  # bytes and specials are always there
    assert len(build_tokenizer(50_000)) < 1500  # every word is one token


@settings(max_examples=200, deadline=None)
@given(text=st.text().filter(lambda t: "<|" not in t))
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_reviews_survive_and_no_special_token_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in reviews(1, 200):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_about_one_token_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    """Running words as they stand in a text: with their space, the first without."""
    words = [w for text in reviews(2, 1000) for w in re.findall(r" ?[\w-]+|'s|[.,!]", text)]
    lengths = [len(ids(tokenizer, word)) for word in words]
    assert sum(n == 1 for n in lengths) / len(lengths) > 0.97
    assert sum(lengths) / len(lengths) < 1.05


def test_prompt_and_response_tokenise_apart_as_together(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(3)
    for text in reviews(4, 200):
        prompt = " ".join(text.split()[: rng.randint(2, 8)])
        response = continue_review(prompt, rng)
        assert ids(tokenizer, prompt) + ids(tokenizer, response) == ids(
            tokenizer, prompt + response
        )


def test_same_in_another_process() -> None:
    program = (
        "import hashlib; from dpo_cli.grammar.tokenizer import build_tokenizer; "
        "text = build_tokenizer(1024).backend_tokenizer.to_str(); "
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    here = build_tokenizer(1024).backend_tokenizer.to_str()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_saved_and_loaded_it_is_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*reviews(5, 50), "Ünïcode  and\n\ttabs 🙂"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(ids(loaded, text)) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
