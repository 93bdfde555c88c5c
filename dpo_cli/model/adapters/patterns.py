"""Regular expressions of an adapter's configuration, tested on the model's layers before PEFT
matches them, as some do not terminate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import peft
from transformers import PreTrainedModel

from dpo_cli.bounded import OverLimit, bounded
from dpo_cli.errors import ConfigError

SECONDS = 2.0  # of the processor, for all layers together
FIELDS = re.compile(r"modules|pattern|parameters")
SPECIAL = re.compile(r"[*+?{}()\[\]|\\^$]")
# The patterns that PEFT builds from an expression or a name, in tuners_utils and utils.other.
FORMS = ("{}", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r"(.*\.)?({})$")


def refuse_unfit(config: peft.PeftConfig, model: PreTrainedModel, prefix: str) -> None:
    """ConfigError for expressions that take too long, and for tokens outside the model's
    vocabulary. prefix: of settings' names in messages."""
    names = [name for name, _ in model.named_modules()]
    try:
        with bounded(SECONDS):
            for field, text in _expressions(vars(config)):
                where = f"{prefix}{field}={text[:80]}"
                for form in FORMS:
                    expression = re.compile(form.replace("{}", text))
                    for name in names:
                        expression.match(name)
    except OverLimit as error:
        raise ConfigError(f"{where}: {error} to match: write a list of layers' names") from None
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: is no regular expression: {error}") from None
    _refuse_tokens(config, model, prefix)


def _expressions(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and text of everything that PEFT may use as a regular expression."""
    for field, value in fields.items():
        if FIELDS.search(field):
            several = isinstance(value, list | tuple | set | dict)
            texts = value if several else [value]
            yield from ((field, str(text)) for text in texts if SPECIAL.search(str(text)))


def _refuse_tokens(config: peft.PeftConfig, model: PreTrainedModel, prefix: str) -> None:
    rows = len(cast(Any, model.get_input_embeddings()).weight)
    for field in ("trainable_token_indices", "token_indices"):
        indices = getattr(config, field, None) or []
        lists = indices.values() if isinstance(indices, dict) else [indices]
        for index in (i for each in lists for i in (each if isinstance(each, list) else [each])):
            if not isinstance(index, int) or not 0 <= index < rows:
                raise ConfigError(
                    f"{prefix}{field}: {str(index)[:80]}: the model has tokens 0 to {rows - 1}"
                )
