"""Tokenizers built on the spot, one for each way of treating the edges of a text."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat and the dog ran to the cat in the sun, then it rained a lot."] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2 and 3 do it: BOS is written by the template, contents are trimmed, a space
# stands before the answer, a system message is refused.
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)


@cache
def words() -> PreTrainedTokenizerFast:
    """One token a word `w0` .. `w99`, ids as numbered: lengths can be counted by hand."""
    vocab = {f"w{i}": i for i in range(100)} | {"<eos>": 100, "<unk>": 101}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def words_with_bos() -> PreTrainedTokenizerFast:
    """The same with BOS 102 before every text."""
    backend = Tokenizer.from_str(words().backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    backend.post_processor = _bos_first("<bos>", 102)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")


def byte_level(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2 style: no BOS in front, `<|endoftext|>` is BOS and EOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend("<|endoftext|>"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    """Qwen style: a ChatML template, pad == eos == `<|im_end|>`, no BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend("<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def llama(chat_template: str | None = None, metaspace: bool = True) -> PreTrainedTokenizerFast:
    """Sentencepiece style: BOS in front, a dummy space before a text, bytes as a fallback.

    metaspace: the space comes from the pre-tokenizer (new files), else from a normalizer.
    """
    backend = Tokenizer(_byte_fallback_model())
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = _bos_first("<s>", 1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _bos_first(token: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


@cache
def _trained_byte_level(special: tuple[str, ...]) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def byte_level_backend(*special: str) -> Tokenizer:
    return Tokenizer.from_str(_trained_byte_level(special))


@cache
def _byte_fallback_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges learned on pieces with their `▁`; the bytes get tokens of their own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=model["vocab"].get)
    return {token: i for i, token in enumerate(tokens)}, [tuple(m) for m in model["merges"]]


def _byte_fallback_model() -> models.BPE:
    vocab, merges = _byte_fallback_parts()
    return models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
