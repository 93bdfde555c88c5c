"""Rendering of a tokenizer's chat template, with a fixed date and configured variables."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo_cli.config import DataConfig
from dpo_cli.config.datasets import CHAT_TEMPLATES
from dpo_cli.errors import ConfigError
from dpo_cli.records import Message

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
TOOLS = "tools"  # the key of a conversation's first message that holds the tools it may call


@dataclass(frozen=True)
class Renderer:
    """Renders conversations. variables: `data.chat_template_kwargs`; date: what the template takes
    for today, so that a run resumed on another day has the same rows."""

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = field(default_factory=datetime.date.today)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Renderer:
        given = config.date
        today = datetime.date.today() if given is None else datetime.date.fromisoformat(given)
        return cls(tokenizer, dict(config.chat_template_kwargs), today)

    def __call__(self, messages: Sequence[Message], opened: bool = False) -> str:
        """The conversation as text; opened: with the generation prompt. Raises TemplateError for
        anything the template cannot render."""
        tools = messages[0].get(TOOLS) if messages else None
        clean = [{k: v for k, v in message.items() if k != TOOLS} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                clean, tools=tools, tokenize=False, add_generation_prompt=opened,
                chat_template=self._dated(self.tokenizer.get_chat_template(tools=tools)),
                **self.variables,
            )  # fmt: skip
        except (TypeError, ValueError) as error:  # also for several templates without a default
            raise TemplateError(str(error)) from error
        assert isinstance(text, str)
        return text

    def _dated(self, template: str) -> str:
        """The template with its calls of strftime_now replaced by the date, as
        apply_chat_template takes no such function."""
        noon = datetime.datetime.combine(self.date, datetime.time(12))
        return NOW.sub(lambda call: repr(noon.strftime(call[2])), template)


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template may contain today's date."""
    return "strftime_now" in str(tokenizer.chat_template)


def use_template_file(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
    """Set the tokenizer's template if `data.chat_template` is a file. Raises ConfigError."""
    if config.chat_template in CHAT_TEMPLATES:
        return
    path = Path(config.chat_template)
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template={path}: {getattr(error, 'strerror', None) or error}: must be one "
            f"of {', '.join(CHAT_TEMPLATES)}, or a Jinja file"
        ) from error
