"""A reward model: the backbone of a causal language model and a scalar head at the last token.

It is transformers' own sequence-classification model, so its folder loads anywhere. As in
transformers, the score is read at the rightmost token that is not padding: at a response's EOS,
unless EOS is also the padding token, as for GPT-2, which has no other special token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.pytorch_utils import Conv1D

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.logprobs import promote
from dpo_cli.model.adapters.active import REWARD_TASK, Adaptation, active_part
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.attention.probe import choose_attention, refuse_unavailable
from dpo_cli.model.forward import hidden_states
from dpo_cli.model.load import (
    adapt,
    count_trained,
    gpt2_config,
    hf_config,
    make_ready,
)
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.rope import cuts_of
from dpo_cli.model.source import origin_of
from dpo_cli.packing import pack
from dpo_cli.records import Batch, EncodedExample

HEAD = "score"  # its name in decoders; encoders' `classifier` reads the first token


def load_reward_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    key: str = "model.path",
    on: Placement | None = None,
    adaptation: Adaptation | None = None,
) -> PreTrainedModel:
    """Load a reward model, or a policy's weights with a new head.

    A new head is drawn with `seed` from N(0, 1/(d + 1)) (arXiv 2009.01325). Sets the padding token
    of the model's configuration and of `tokenizer`, by which the last token is found. Otherwise
    like `load_model`.
    """
    refuse_unavailable(config.attention, on)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.path is None and config.architecture is not None:
            shape = gpt2_config(config, tokenizer)
            shape.num_labels = 1
            model, new = AutoModelForSequenceClassification.from_config(shape), True
        else:
            check_kind(hf_config(config, tokenizer, key), config, key)
            if adaptation is not None:
                auto = AutoModelForSequenceClassification
                count_trained(config, tokenizer, adaptation.settings, auto, key)
            model, new = read_pretrained(
                AutoModelForSequenceClassification, config, key, f"{HEAD}.", adaptation, on,
                num_labels=1,
            )  # fmt: skip
        if new:
            head = score_head(model)
            weight = torch.empty(head.weight.shape)  # on the CPU: the same values on any device
            torch.nn.init.normal_(weight, std=(head.in_features + 1) ** -0.5)
            head.weight.data = weight.to(head.weight.device)
    set_padding(model, config, tokenizer, new, key)
    make_ready(model, config, tokenizer)
    choose_attention(model, config.attention, _plain_reward, _packed_rewards, on, key)
    if adaptation is not None:
        adapt(model, config, adaptation, seed, key, on, REWARD_TASK)
    return model


def check_kind(hf: PretrainedConfig, config: ModelConfig, key: str = "model.path") -> None:
    """ConfigError for a model that cannot become a reward model."""
    where = f"{key}={config.path or config.hub_id}"
    known = type(hf) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if not (known or config.trust_remote_code):
        raise ConfigError(
            f"{where}: transformers has no sequence-classification model for {hf.model_type}, "
            "which a reward model needs: use weights of another family"
        )
    classifier = any(n.endswith("ForSequenceClassification") for n in hf.architectures or ())
    if classifier and hf.num_labels != 1:
        raise ConfigError(
            f"{where}: is a classifier with {hf.num_labels} labels, but a reward model has one "
            "score: use a policy or a reward model"
        )


def score_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The layer that turns a hidden state into the reward."""
    head = active_part(getattr(model, HEAD, None))
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise ConfigError(
            f"stage=reward: {type(model).__name__} has no layer `{HEAD}` with one output, so it "
            "does not score its last token: use weights of another family"
        )
    return head


def set_padding(
    model: PreTrainedModel,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    new: bool = False,
    key: str = "model.path",
) -> None:
    """Set the same padding token in the model's configuration and the tokenizer.

    A reward model keeps the one it was trained with. An adapter's is read from its tokenizer, as
    the configuration is the base's.
    """
    config: Any = model.config.get_text_config()
    pad_id = None if new else config.pad_token_id
    if not new and origin_of(source, key).task == REWARD_TASK:
        pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= len(tokenizer):
        pad_id = padding_id(tokenizer)
    config.pad_token_id = pad_id
    tokenizer.pad_token = cast(str, tokenizer.convert_ids_to_tokens(pad_id))
    # Some families freeze the embedding of the configured padding token when they are built: a
    # resumed run would then train fewer weights than the run that set the token.
    cast(Any, model.get_input_embeddings()).padding_idx = None


def padding_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of a token that never ends a complete response, if the tokenizer has one; else EOS."""
    named = [
        number
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and "pad" in token.content.lower()
    ]
    others = (tokenizer.pad_token_id, *named, tokenizer.bos_token_id, tokenizer.unk_token_id)
    eos = cast(int, tokenizer.eos_token_id)
    return next((i for i in others if i is not None and i != eos), eos)


def without_padding(
    examples: Sequence[EncodedExample], model: PreTrainedModel
) -> list[EncodedExample]:
    """Strip padding tokens from the end of responses, as transformers scores the last token before
    them."""
    pad = model.config.get_text_config().pad_token_id
    return [
        replace(e, response_ids=tuple(_stripped(r, pad) for r in e.response_ids)) for e in examples
    ]


def _stripped(ids: np.ndarray, pad: int) -> np.ndarray:
    real = np.flatnonzero(ids != pad)
    return ids[: real[-1] + 1 if len(real) else 0]


def rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(S,) float32 reward of each branch of a row that was packed with `keep_last`, of examples
    from `without_padding`."""
    assert batch.last_index is not None, "pack(..., keep_last=True)"
    last = hidden_states(model, batch).index_select(0, batch.last_index)
    head = score_head(model)
    bias = None if head.bias is None else promote(head.bias)
    with torch.autocast(last.device.type, enabled=False):  # bf16 would round rewards to 3 digits
        return torch.nn.functional.linear(promote(last), promote(head.weight), bias).squeeze(1)


def round_products(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a frozen model's matrices to autocast's dtype once, instead of in every forward, with
    the same rewards. The head, which is read in float32, is unchanged."""
    head = score_head(model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head:
            for weight in (layer.weight, layer.bias):
                if weight is not None:
                    weight.data = weight.data.to(dtype)


def _plain_reward(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """(1,) reward of one sequence by the model's own forward, as a reference."""
    logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits
    return cast(Tensor, logits[0])


def _packed_rewards(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> Tensor:
    examples = without_padding(examples, model)
    row = pack(examples, range(len(examples)), keep_last=True, cuts=cuts_of(model.config))
    return rewards(model, row.to(model.device))
