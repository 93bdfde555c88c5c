"""A Hugging Face sequence classifier of texts: the log-odds of one of its classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.load import context_length, hf_config, refuse_odd
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.rope import split_at_cuts
from dpo_cli.model.source import loading, tokenizer_source
from dpo_cli.records import most_characters

CLASSIFIER = "ForSequenceClassification"  # how transformers ends the names of their classes


@dataclass(frozen=True)
class Classifier:
    """pad: id of the padding token; None: no padding, one text per forward. max_tokens: the start
    of longer texts is truncated."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad: int | None
    max_tokens: int
    batch_size: int

    def log_odds(self, texts: Sequence[str], label: int) -> Tensor:
        """(len(texts),) float64 log p/(1 - p) of a class; p is a softmax over the classes, or a
        sigmoid if the model is configured for multi-label classification."""
        logits = self.logits(texts)
        if self.model.config.problem_type == "multi_label_classification":
            return logits[:, label]
        others = [i for i in range(logits.shape[1]) if i != label]
        return logits[:, label] - logits[:, others].logsumexp(1)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), classes) in float64, computed in float32; duplicate texts only once."""
        ids = [tuple(row) for row in self._encode(texts)]
        distinct = sorted(set(ids), key=len, reverse=True)
        size = 1 if self.pad is None else self.batch_size
        batches = [distinct[i : i + size] for i in range(0, len(distinct), size)]
        rows = [
            self._forward(part)
            for batch in batches
            for part in split_at_cuts(batch, self.model.config)
        ]
        index_of = {row: i for i, row in enumerate(distinct)}
        return torch.cat(rows).cpu().double()[[index_of[row] for row in ids]]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        most = most_characters(self.max_tokens)
        token_ids = self.tokenizer(
            [text[-most:] for text in texts],
            truncation=True,
            max_length=self.max_tokens,
            split_special_tokens=True,  # a policy must not end the text by writing `</s>`
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
        return [ids or [self._empty_text_token()] for ids in token_ids]

    def _empty_text_token(self) -> int:
        """A token for an empty text: a row of padding alone would attend to nothing."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.pad, 0)
        return next(i for i in known if i is not None)

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """(len(rows), classes) of rows padded on the right; the first is the longest."""
        ids = torch.full((len(rows), len(rows[0])), self.pad or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            logits = self.model(
                input_ids=ids.to(device, non_blocking=True),
                attention_mask=mask.to(device, non_blocking=True),
            ).logits
        return cast(Tensor, logits)


def load_classifier(
    source: ModelConfig, max_tokens: int, batch_size: int, device: torch.device, key: str
) -> Classifier:
    """Weights of a folder or hub id on a device, in float32. Raises ConfigError."""
    where, options = tokenizer_source(source, key)
    with loading(where, key, options):
        tokenizer = AutoTokenizer.from_pretrained(
            where, trust_remote_code=source.trust_remote_code, **options
        )
        refuse_odd(tokenizer)
    shape = classifier_config(source, tokenizer, key)
    if len(label_names(shape)) < 2:
        raise ConfigError(
            f"{key}={where}: has a single score instead of classes: use reward_fn=reward_model"
        )
    on = Placement(device)
    model, _ = read_pretrained(AutoModelForSequenceClassification, source, key, on=on)
    if len(tokenizer) > _vocabulary(model):
        raise ConfigError(
            f"{key}={where}: its tokenizer has {len(tokenizer)} tokens, but its embedding only "
            f"{_vocabulary(model)}: the tokenizer belongs to another model"
        )
    tokenizer.truncation_side = "left"
    model.config.use_cache = False  # decoders would keep every key and value
    limit = min(max_tokens, readable_tokens(model, tokenizer))
    if limit <= tokenizer.num_special_tokens_to_add():
        raise ConfigError(
            f"reward_fn.max_length={max_tokens}: is too short for the tokenizer's special tokens "
            "and a text; increase it"
        )
    # Always in float32: policies are measured by these scores.
    model.to(device, torch.float32).eval().requires_grad_(False)  # type: ignore[arg-type]
    return Classifier(model, tokenizer, _padding(model, tokenizer), limit, batch_size)


def classifier_config(source: ModelConfig, tokenizer: Any, key: str) -> PretrainedConfig:
    """A sequence classifier's configuration. ConfigError for other models, which would get a
    randomly initialized head."""
    hf = hf_config(source, tokenizer, key)
    if not any(name.endswith(CLASSIFIER) for name in hf.architectures or ()):
        kind = ", ".join(hf.architectures or ()) or f"{hf.model_type} without a model class"
        raise ConfigError(
            f"{key}={source.path or source.hub_id}: is a {kind}, which cannot score texts: use a "
            f"model whose config.json names a ...{CLASSIFIER}, such as stage=reward trains"
        )
    return hf


def readable_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Maximum number of tokens per text, including special ones."""
    limit = min(context_length(model), tokenizer.model_max_length)
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding):
            # RoBERTa's positions start after the padding's index.
            reserved = 0 if part.padding_idx is None else part.padding_idx + 1
            limit = min(limit, part.num_embeddings - reserved)
    return limit


def label_names(config: PretrainedConfig) -> list[str]:
    """Names of the classes, by index."""
    named: dict[Any, str] = dict(config.id2label or {})
    return [str(named.get(i, i)) for i in range(cast(int, config.num_labels))]


def label_index(config: PretrainedConfig, label: str | int | None) -> int:
    """Index of a class given by name or index; null: the one named positive, else the last."""
    names = label_names(config)
    if label is None:
        patterns = (
            re.compile("positive", re.IGNORECASE).fullmatch,
            re.compile("(?i)positive").search,
        )
        return next(
            (i for matches in patterns for i, n in enumerate(names) if matches(n)), len(names) - 1
        )
    label = str(label)  # a class may be named 2
    for match in (str, str.casefold):
        if match(label) in (folded := [match(name) for name in names]):
            return folded.index(match(label))
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    raise ConfigError(
        f"reward_fn.label={label}: no such class: use one of {', '.join(names)}, or its index"
    )


def _vocabulary(model: PreTrainedModel) -> int:
    return int(cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0])


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The configuration's padding id, by which decoders find a text's last token; if it has none,
    that of a special token that no text ends with."""
    config: Any = model.config.get_text_config()
    if config.pad_token_id is None or not 0 <= config.pad_token_id < _vocabulary(model):
        ends = {*tokenizer("a").input_ids, tokenizer.unk_token_id}
        known = [i for i in (tokenizer.pad_token_id, *tokenizer.all_special_ids) if i is not None]
        config.pad_token_id = next((i for i in known if i not in ends), None)
    return cast(int | None, config.pad_token_id)
