"""Keys of the `data` group, one dataclass an option."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Ways of writing conversations; another value of data.chat_template is a Jinja file.
CHAT_TEMPLATES = ("auto", "always", "never", "human_assistant")


# Keys of how a row becomes tokens, whichever file it comes from.
WRITING = (
    "max_length", "max_prompt_length", "keep_prompt", "chat_template", "chat_template_kwargs",
    "date", "special_tokens",
)  # fmt: skip


@dataclass
class DataConfig:
    """Keys every dataset has. `path` (local file or folder) wins over `hub_id`."""

    name: str = "jsonl"
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    path: str | None = None
    eval_path: str | None = None
    train_split: str = "train"
    eval_split: str | None = "auto"  # auto: the usual one, where there is one; null: none
    eval_rows: int | float | None = None  # of the eval split, else held out of train; < 1: a share
    max_rows: int | None = None  # a seeded sample of the rows of each split
    max_length: int | None = None  # tokens, prompt + response; null: min(512, model context)
    max_prompt_length: int | None = None  # tokens kept if over max_length; null: half of it
    keep_prompt: str = "end"  # which end of an over-long prompt survives: start | end
    chat_template: str = "auto"  # auto | always | never | human_assistant | a Jinja file
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template
    date: str | None = None  # what a template is told of today; null: the day the run began
    special_tokens: str = "text"  # how special tokens in texts are read: text | parse


@dataclass
class SentimentDataConfig(DataConfig):
    """Generated film reviews with an exact ground-truth reward; needs no file."""

    name: str = "sentiment"
    rows: int = 4000
    eval_split: str | None = None
    eval_rows: int | float | None = 400
    min_prompt_words: int = 2
    max_prompt_words: int = 8
    responses: int | None = None  # a prompt; null: 2 for stage=dpo and reward, else 1


@dataclass
class HhDataConfig(DataConfig):
    """Anthropic HH: `chosen` and `rejected` are whole transcripts."""

    name: str = "hh"


@dataclass
class ShpDataConfig(DataConfig):
    """Stanford Human Preferences: Reddit answers with vote counts."""

    name: str = "shp"
    min_score_ratio: float = 2.0


@dataclass
class SeDataConfig(DataConfig):
    """Stack Exchange: all pairs of a question's answers by score, HTML stripped."""

    name: str = "se"
    max_pairs_per_prompt: int | None = None


@dataclass
class TldrDataConfig(DataConfig):
    """Reddit TL;DR comparisons."""

    name: str = "tldr"


@dataclass
class ImdbDataConfig(DataConfig):
    """Film reviews: the prompt is a prefix of a review, the response the rest."""

    name: str = "imdb"
    min_prompt_words: int = 2
    max_prompt_words: int = 8
    text_field: str = "text"


@dataclass
class UltrafeedbackDataConfig(DataConfig):
    """Chat pairs with scores."""

    name: str = "ultrafeedback"


@dataclass
class JsonlDataConfig(DataConfig):
    """Your own rows: text or chat prompts with chosen and rejected responses."""

    name: str = "jsonl"
    prompt_field: str | None = "prompt"
    chosen_field: str = "chosen"
    rejected_field: str | None = "rejected"
    responses_field: str | None = None  # a ranked list, best first, instead of the pair
    scores_field: str | None = None
    tools_field: str | None = "tools"  # functions that a conversation may call; may be missing
    finished_field: str | None = None  # one bool a response; false: it was cut, it gets no EOS


DATA_SCHEMAS: dict[str, type[DataConfig]] = {
    "sentiment": SentimentDataConfig,
    "hh": HhDataConfig,
    "shp": ShpDataConfig,
    "se": SeDataConfig,
    "tldr": TldrDataConfig,
    "imdb": ImdbDataConfig,
    "ultrafeedback": UltrafeedbackDataConfig,
    "jsonl": JsonlDataConfig,
}
