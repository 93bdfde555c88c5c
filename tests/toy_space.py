"""Models whose every completion can be written down: five words, EOS, three new tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = "abcde"
EOS = 5
NEW_TOKENS = 3
VALENCE = {"a": 1.0, "b": -1.0}


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(WORDS)} | {"<eos>": EOS, "<unk>": 6}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )


def model(seed: int, perturbed: float = 0.0) -> Any:
    """A random GPT-2 that heeds what it reads; `perturbed`: noise on its weights, their scale 1."""
    config = GPT2Config(
        vocab_size=7, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=EOS,
        eos_token_id=EOS, pad_token_id=EOS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    built = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim > 1:
                p.mul_(8.0)
        torch.manual_seed(seed + 1000)
        for p in built.parameters():
            p.add_(perturbed * torch.randn_like(p))
    return built.eval()


def save(folder: Path, built: Any, **provenance: Any) -> Path:
    built.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if provenance:
        (folder / "dpo_run.json").write_text(json.dumps(provenance))
    return folder


@dataclass(frozen=True)
class Space:
    """Every completion of one prompt. logp, rewards: (Y,)."""

    completions: list[tuple[int, ...]]
    logp: np.ndarray
    rewards: np.ndarray

    @property
    def p(self) -> np.ndarray:
        return np.exp(self.logp)


@torch.no_grad()
def enumerate_space(
    built: Any, prompt: Sequence[int], reward: Callable[[Sequence[int]], float], vocab: int = 7
) -> Space:
    """The tree of next tokens, a level at a time: EOS or the last level ends a completion."""
    prefixes: list[tuple[int, ...]] = [()]
    logp = np.zeros(1)
    done: dict[tuple[int, ...], float] = {}
    for level in range(NEW_TOKENS):
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        following = built(input_ids=ids).logits[:, -1].double().log_softmax(-1).numpy()
        longer = {
            (*prefix, token): logp[i] + following[i, token]
            for i, prefix in enumerate(prefixes)
            for token in range(vocab)
        }
        ended = {c: v for c, v in longer.items() if c[-1] == EOS or level + 1 == NEW_TOKENS}
        done |= ended
        prefixes = [c for c in longer if c not in ended]
        logp = np.array([longer[c] for c in prefixes])
    rewards = np.array([reward(c) for c in done])
    return Space(list(done), np.array(list(done.values())), rewards)


def mean_valence(ids: Sequence[int]) -> float:
    """As reward_fn=lexicon has it: the words' mean, 0 for none; special tokens are no text."""
    words = [WORDS[i] for i in ids if i < len(WORDS)]
    return sum(VALENCE.get(word, 0.0) for word in words) / len(words) if words else 0.0


def best_of_probabilities(p: np.ndarray, r: np.ndarray, n: int) -> np.ndarray:
    """(Y,) of best-of-n, ties broken at random: P(max <= r)^n - P(max < r)^n by level."""
    q = np.zeros_like(p)
    for level in np.unique(r):
        here = r == level
        below, up_to = p[r < level].sum(), p[r <= level].sum()
        q[here] = p[here] / p[here].sum() * (up_to**n - below**n)
    return q
