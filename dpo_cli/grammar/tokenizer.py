"""A byte-level BPE tokenizer for models trained from scratch on the film reviews."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from dpo_cli.grammar import sample_review

if TYPE_CHECKING:  # transformers is slow to import and the grammar does not need it
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CORPUS_REVIEWS = 4000
CORPUS_SEED = 0


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """GPT-2 style tokenizer, the same on every call: BOS = EOS `<|endoftext|>`, PAD `<|pad|>`.

    Trained on a fixed sample of the grammar, over all 256 bytes, so that any text
    survives encoding and decoding. Has `vocab_size` entries, or fewer once every word is
    one token; never fewer than the 256 bytes and 2 special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(CORPUS_SEED)
    tokenizer.train_from_iterator((sample_review(rng) for _ in range(CORPUS_REVIEWS)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
