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
from transformers.utils import chat_template_utils

from dpo_cli.bounded import OverLimit, bounded
from dpo_cli.config import DataConfig
from dpo_cli.config.datasets import CHAT_TEMPLATES
from dpo_cli.data.sandbox import Sandbox
from dpo_cli.errors import ConfigError
from dpo_cli.records import Message

# transformers compiles templates in the class that it finds under this name.
chat_template_utils.ImmutableSandboxedEnvironment = Sandbox  # type: ignore[misc]

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
SECONDS = 2.0  # of the processor, for one conversation
LONGEST_TEMPLATE = 2**20  # characters
# Most characters of a rendering: so many, and so many for each character of the conversation.
WRITTEN, WRITTEN_PER_CHARACTER = 2**16, 16
REMEDY = "set data.chat_template=human_assistant, or to a template file"
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
        anything the template cannot render, and ConfigError for a template without end."""
        try:
            with bounded(SECONDS):
                text = self._rendered(messages, opened)
        except OverLimit as error:
            raise ConfigError(f"the chat template {error} for one conversation: {REMEDY}") from None
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: it raises anything
            raise TemplateError(" ".join(str(error).split()) or type(error).__name__) from error
        if len(text) > WRITTEN and len(text) > WRITTEN + WRITTEN_PER_CHARACTER * len(str(messages)):
            raise ConfigError(
                f"the chat template writes {len(text):,} characters for a conversation of "
                f"{len(str(messages)):,}: {REMEDY}"
            )
        return text

    def _rendered(self, messages: Sequence[Message], opened: bool) -> str:
        tools = messages[0].get(TOOLS) if messages else None
        clean = [{k: v for k, v in message.items() if k != TOOLS} for message in messages]
        template = self.tokenizer.get_chat_template(tools=tools)
        if len(template) > LONGEST_TEMPLATE:
            raise ValueError(f"it has {len(template):,} characters, at most {LONGEST_TEMPLATE:,}")
        text = self.tokenizer.apply_chat_template(
            clean, tools=tools, tokenize=False, add_generation_prompt=opened,
            chat_template=self._dated(template), **self.variables,
        )  # fmt: skip
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
