"""How many tokens an example may have."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config import DataConfig
from dpo_cli.errors import ConfigError

DEFAULT_MAX_LENGTH = 512  # tokens, as in the DPO reference code


@dataclass(frozen=True)
class Limits:
    """In tokens. max_length: of prompt and response, with BOS and EOS. max_prompt_length: to which
    the prompt of an example longer than max_length is truncated."""

    max_length: int
    max_prompt_length: int


def resolve_limits(config: DataConfig, model_context: int) -> Limits:
    """The configured limits, or min(512, context) and half of it; ConfigError if impossible."""
    length = config.max_length
    if length is None:
        length = min(DEFAULT_MAX_LENGTH, model_context)
    if length > model_context:
        raise ConfigError(
            f"data.max_length={length} exceeds the model's context of {model_context} tokens: set "
            f"data.max_length={model_context} and data.max_prompt_length below it"
        )
    if length < 2:
        raise ConfigError(f"data.max_length={length}: must be at least 2, for prompt and response")
    prompt = config.max_prompt_length
    if prompt is None:
        prompt = length // 2
    if not 1 <= prompt < length:
        raise ConfigError(
            f"data.max_prompt_length={prompt}: must be 1 to {length - 1}, to leave room for a "
            f"response within data.max_length={length}"
        )
    return Limits(length, prompt)
