"""Keys of the `data` group, one dataclass an option."""

from __future__ import annotations

from dataclasses import dataclass


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
    eval_split: str | None = None
    eval_rows: int | None = None  # of the eval split; without one, held out from train
    max_rows: int | None = None  # a seeded sample of the rows of each split
    max_length: int | None = None  # tokens, prompt + response; null: min(512, model context)
    max_prompt_length: int | None = None  # tokens kept if over max_length; null: half of it
    keep_prompt: str = "end"  # which end of an over-long prompt survives: start | end
    chat_template: str = "auto"  # auto: for chat prompts | always | never


@dataclass
class SentimentDataConfig(DataConfig):
    """Generated film reviews with an exact ground-truth reward; needs no file."""

    name: str = "sentiment"
    rows: int = 4000
    eval_rows: int | None = 400
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
    prompt_field: str = "prompt"
    chosen_field: str = "chosen"
    rejected_field: str | None = "rejected"
    responses_field: str | None = None  # a ranked list, best first, instead of the pair
    scores_field: str | None = None
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
