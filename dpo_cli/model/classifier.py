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
from dpo_cli.model.attention.registered import Placement
from dpo_cli.model.load import context_length, hf_config, refuse_odd
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.rope import apart
from dpo_cli.model.source import loading, tokenizer_source

CLASSIFIER = "ForSequenceClassification"  # how transformers ends the names of their classes


@dataclass(frozen=True)
class Classifier:
    """pad: id for padding, None where rows go one at a time. max_tokens: of a longer text the
    end is read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad: int | None
    max_tokens: int
    batch_size: int

    def log_odds(self, texts: Sequence[str], label: int) -> Tensor:
        """(len(texts),) float64 log p/(1 - p) of a class; p is a softmax over the classes, or a
        sigmoid where the model says that several may be true at once."""
        logits = self.logits(texts)
        if self.model.config.problem_type == "multi_label_classification":
            return logits[:, label]
        others = [i for i in range(logits.shape[1]) if i != label]
        return logits[:, label] - logits[:, others].logsumexp(1)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), classes) in float64, computed in float32, equal texts once."""
        ids = [tuple(row) for row in self._encode(texts)]
        distinct = sorted(set(ids), key=len, reverse=True)
        size = 1 if self.pad is None else self.batch_size
        together = [distinct[i : i + size] for i in range(0, len(distinct), size)]
        rows = [self._forward(part) for some in together for part in apart(some, self.model.config)]
        place = {row: i for i, row in enumerate(distinct)}
        return torch.cat(rows).cpu().double()[[place[row] for row in ids]]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            split_special_tokens=True,  # a policy must not close the text by writing `</s>`
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
        return [ids or [self._of_nothing()] for ids in found]

    def _of_nothing(self) -> int:
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
        raise ConfigError(f"{key}={where}: has one score, no classes: use reward_fn=reward_model")
    on = Placement(device)
    model, _ = read_pretrained(AutoModelForSequenceClassification, source, key, on=on)
    if len(tokenizer) > _vocabulary(model):
        raise ConfigError(
            f"{key}={where}: its tokenizer has {len(tokenizer)} tokens, its embedding "
            f"{_vocabulary(model)}: the tokenizer is of another model"
        )
    tokenizer.truncation_side = "left"
    model.config.use_cache = False  # decoders would keep every key and value
    limit = min(max_tokens, readable_tokens(model, tokenizer))
    if limit <= tokenizer.num_special_tokens_to_add():
        raise ConfigError(f"reward_fn.max_length={max_tokens}: leaves no room for a text")
    # Float32 whatever the weights are stored in: it is the truth that policies are measured by.
    model.to(device, torch.float32).eval().requires_grad_(False)  # type: ignore[arg-type]
    return Classifier(model, tokenizer, _padding(model, tokenizer), limit, batch_size)


def classifier_config(source: ModelConfig, tokenizer: Any, key: str) -> PretrainedConfig:
    """Of a sequence classifier; ConfigError for other models, which would get a random head."""
    found = hf_config(source, tokenizer, key)
    if not any(name.endswith(CLASSIFIER) for name in found.architectures or ()):
        is_a = ", ".join(found.architectures or ()) or f"{found.model_type} of no known kind"
        raise ConfigError(
            f"{key}={source.path or source.hub_id}: is a {is_a}, which scores no text: give a "
            f"model whose config.json says ...{CLASSIFIER}, such as stage=reward makes"
        )
    return found


def readable_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens a text may have, special ones included."""
    most = min(context_length(model), tokenizer.model_max_length)
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding):
            # RoBERTa counts positions from the one after its padding's
            taken = 0 if part.padding_idx is None else part.padding_idx + 1
            most = min(most, part.num_embeddings - taken)
    return most


def label_names(config: PretrainedConfig) -> list[str]:
    """Of the classes, by index."""
    named: dict[Any, str] = dict(config.id2label or {})
    return [str(named.get(i, i)) for i in range(cast(int, config.num_labels))]


def label_index(config: PretrainedConfig, wanted: str | int | None) -> int:
    """A class by name or index; null: the one called positive, else the last."""
    names = label_names(config)
    if wanted is None:
        ways = (re.compile("positive", re.IGNORECASE).fullmatch, re.compile("(?i)positive").search)
        return next((i for way in ways for i, n in enumerate(names) if way(n)), len(names) - 1)
    wanted = str(wanted)  # a class may be called 2
    for match in (str, str.casefold):
        if match(wanted) in (found := [match(name) for name in names]):
            return found.index(match(wanted))
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise ConfigError(
        f"reward_fn.label={wanted}: no such class; it has {', '.join(names)}: give one or its index"
    )


def _vocabulary(model: PreTrainedModel) -> int:
    return int(cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0])


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The configuration's, by which decoders find a text's last token; where it has none, a
    special token that no text ends with, since such an end would be taken for padding."""
    config: Any = model.config.get_text_config()
    if config.pad_token_id is None or not 0 <= config.pad_token_id < _vocabulary(model):
        ends = {*tokenizer("a").input_ids, tokenizer.unk_token_id}
        known = [i for i in (tokenizer.pad_token_id, *tokenizer.all_special_ids) if i is not None]
        config.pad_token_id = next((i for i in known if i not in ends), None)
    return cast(int | None, config.pad_token_id)
