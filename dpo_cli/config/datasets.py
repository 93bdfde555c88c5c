"""Keys of the `data` group, one dataclass per option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_cli.config.keys import LOCAL, above, at_least, day, key, within

# How conversations are rendered; any other value of data.chat_template is a Jinja file.
CHAT_TEMPLATES = ("auto", "always", "never", "human_assistant")


# Keys of how rows are tokenized, independent of the file they come from.
WRITING = (
    "max_length", "max_prompt_length", "keep_prompt", "chat_template", "chat_template_kwargs",
    "date", "special_tokens",
)  # fmt: skip


@dataclass
class DataConfig:
    """Keys of every dataset. `path` (local file or folder) takes precedence over `hub_id`."""

    name: str = key("jsonl", "which adapter reads the rows")
    hub_id: str | None = key(None, "dataset on the hub, owner/name")
    hub_config: str | None = key(None, "configuration of the hub dataset, if it has several")
    revision: str | None = key(None, "branch, tag or commit on the hub; the commit is recorded")
    path: str | None = key(
        None,
        "local file (.jsonl, .ndjson, .jsonl.gz, .jsonl.zst, .json, .parquet, .arrow, .csv, .tsv), "
        "pattern of files (data/*.jsonl) or folder; takes precedence over data.hub_id",
        path=LOCAL,
    )
    eval_path: str | None = key(None, "file or folder of held-out rows", path=LOCAL)
    train_split: str = key("train", "split to train on")
    eval_split: str | None = key(
        "auto",
        "held-out split; auto: test, validation or similar, if there is one; null: hold out "
        "data.eval_rows of the training split",
    )
    eval_rows: int | float | None = key(
        None, "held-out rows: a count, or a fraction below 1; null: the whole eval split, if any",
        bound=at_least(0),
    )  # fmt: skip
    max_rows: int | None = key(
        None, "seeded sample of this many rows of each split; null: all", bound=at_least(1)
    )
    max_row_mb: float = key(
        64.0, "maximum MB of a row, a line or a cell; larger ones are errors", bound=above(0, 2047)
    )
    max_file_mb: float | None = key(
        None, "maximum MB of a file, uncompressed; null: 8192, for a .gz at most 64, or 100 times "
        "its size", bound=above(0, 10**7),
    )  # fmt: skip
    max_length: int | None = key(
        None, "tokens of prompt and response; null: the model's context, at most 512",
        bound=at_least(2, 2**24),
    )  # fmt: skip
    max_prompt_length: int | None = key(
        None, "prompts of examples longer than data.max_length are truncated to this many tokens; "
        "null: half of it", bound=at_least(1, 2**24),
    )  # fmt: skip
    keep_prompt: str = key(
        "end", "which end of a truncated prompt is kept", choices=("start", "end")
    )
    chat_template: str = key(
        "auto",
        "when to apply the model's chat template: auto (to messages) | always | never | "
        "human_assistant (Human:/Assistant: instead) | a Jinja file",
    )
    chat_template_kwargs: dict[str, Any] = key(
        {}, "variables of the chat template, such as {enable_thinking: false}"
    )
    date: str | None = key(
        None, "today's date in the chat template; null: the day the run started", bound=day()
    )
    special_tokens: str = key(
        "text", "special tokens written in texts: text (as characters) | parse (as tokens)",
        choices=("text", "parse"),
    )  # fmt: skip


@dataclass
class SentimentDataConfig(DataConfig):
    """Generated film reviews with an exact ground-truth reward; needs no file."""

    name: str = key("sentiment", "which adapter reads the rows")
    rows: int = key(4000, "reviews to generate for training", bound=at_least(1, 10**6))
    eval_split: str | None = key(None, "no effect: the reviews are generated")
    eval_rows: int | float | None = key(
        400, "reviews to generate for evaluation; below 1: as a fraction of data.rows",
        bound=at_least(0, 10**6),
    )  # fmt: skip
    min_prompt_words: int = key(2, "words of the shortest prompt", bound=at_least(1, 1000))
    max_prompt_words: int = key(8, "words of the longest prompt", bound=at_least(1, 1000))
    responses: int | None = key(
        None, "responses per prompt; null: 2 if the stage compares them, else 1",
        bound=at_least(1, 1000),
    )  # fmt: skip


@dataclass
class HhDataConfig(DataConfig):
    """Anthropic HH: `chosen` and `rejected` are whole transcripts."""

    name: str = key("hh", "which adapter reads the rows")


@dataclass
class ShpDataConfig(DataConfig):
    """Stanford Human Preferences: Reddit answers with vote counts."""

    name: str = key("shp", "which adapter reads the rows")
    min_score_ratio: float = key(
        2.0, "drop pairs whose scores differ by a smaller factor", bound=at_least(1, 1e6)
    )


@dataclass
class SeDataConfig(DataConfig):
    """Stack Exchange: all pairs of a question's answers by score, HTML stripped."""

    name: str = key("se", "which adapter reads the rows")
    max_pairs_per_prompt: int | None = key(None, "pairs per question; null: all", bound=at_least(1))


@dataclass
class TldrDataConfig(DataConfig):
    """Reddit TL;DR comparisons."""

    name: str = key("tldr", "which adapter reads the rows")


@dataclass
class ImdbDataConfig(DataConfig):
    """Film reviews: the prompt is a prefix of a review, the response the rest."""

    name: str = key("imdb", "which adapter reads the rows")
    min_prompt_words: int = key(
        2, "words of the shortest prompt; a hash of the review chooses the length",
        bound=at_least(1, 10**6),
    )  # fmt: skip
    max_prompt_words: int = key(8, "words of the longest prompt", bound=at_least(1, 10**6))
    text_field: str = key("text", "field of the review")


@dataclass
class UltrafeedbackDataConfig(DataConfig):
    """Chat pairs with scores."""

    name: str = key("ultrafeedback", "which adapter reads the rows")


# Formats of data=jsonl: how each is read. Which columns have it: data/adapters/formats.py.
FORMATS = {
    "pairs": "prompt, chosen and rejected",
    "implicit": "chosen and rejected texts that begin with the same prompt",
    "sharegpt": "turns from human and gpt; the last one, or chosen and rejected, is the answer",
    "swift": "messages, of which the last is chosen, and rejected_response",
    "axolotl": "messages as the prompt, chosen and rejected messages",
    "nemo": "context, and completions by rank",
    "alpaca": "instruction and input as the prompt, output or chosen and rejected",
    "ultrafeedback": "completions ordered by score",
    "nectar": "answers ordered by rank",
    "helpsteer": "two responses, ordered by the strength of preference",
    "ranked": "prompt and responses, best first or by scores",
    "kto": "prompt, completion and label",
    "completion": "prompt and one response",
    "messages": "conversations, of which the last message answers",
    "text": "texts without a prompt",
    "prompts": "prompts without responses",
}


def described(name: str) -> str:
    """A format by its name, with what it means."""
    return f"{name} ({FORMATS[name]})"


# Keys that name columns: with any of them set, the format is not looked for.
COLUMN_KEYS = (
    "prompt_field", "chosen_field", "rejected_field", "responses_field", "scores_field",
    "label_field", "finished_field",
)  # fmt: skip


ROW_TERMS = {  # numbers of a row for its loss; `data.<name>_field` names the column
    "weight": at_least(0, 10**6),
    "margin": at_least(-(10**6), 10**6),
    "smoothing": within("[0, 0.5)"),
}


@dataclass
class JsonlDataConfig(DataConfig):
    """Your own rows: text or chat prompts with chosen and rejected responses."""

    name: str = key("jsonl", "which adapter reads the rows")
    format: str = key(
        "auto", "how rows are read; auto: by their columns | columns: those that data.*_field name",
        choices=("auto", "columns", *FORMATS),
    )  # fmt: skip
    turns: str = key(
        "last", "answers of a conversation that are trained on: last | all (each is an example, "
        "whose prompt is the turns before it)", choices=("last", "all"),
    )  # fmt: skip
    prompt_field: str | None = key(
        "prompt", "field of the prompt; null: the messages before the response"
    )
    chosen_field: str = key("chosen", "field of the preferred response")
    rejected_field: str | None = key(
        "rejected", "field of the other response; null: one response per row, for SFT"
    )
    responses_field: str | None = key(
        None, "field of a ranked list of responses, best first, instead of the pair"
    )
    scores_field: str | None = key(
        None, "field of one score per response; a ranked list is ordered by them"
    )
    label_field: str | None = key(
        None,
        "for stage=kto: field with the label of the row's only response (chosen_field), true or 1 "
        "if desirable, else false or 0",
    )
    weight_field: str | None = key(
        None, "field of a factor on the row's loss, at least 0: for stage=dpo"
    )
    margin_field: str | None = key(
        None, "field of a margin that beta h must exceed, for losses of beta h: for stage=dpo"
    )
    smoothing_field: str | None = key(
        None, "field of the row's own stage.label_smoothing: for stage=dpo"
    )
    system_field: str | None = key(
        "system", "field of a system message before the prompt; may be absent; null: not read"
    )
    tools_field: str | None = key(
        "tools", "field of the functions a conversation may call, a list or JSON; may be absent"
    )
    finished_field: str | None = key(
        None, "field of one bool per response; false: it was truncated and gets no EOS"
    )


@dataclass
class MixDataConfig(DataConfig):
    """Several datasets, each with its share."""

    name: str = key("mix", "which adapter reads the rows")
    sources: dict[str, Any] = key(
        {}, "name: {path: ..., data: jsonl, share: 1.0, and other keys of that dataset}; share: of "
        "its training rows: 0.5 half of them, 2 each twice",
    )  # fmt: skip


def column_problems(data: DataConfig) -> Iterator[str]:
    """Column keys that a chosen format does not read."""
    if not isinstance(data, JsonlDataConfig) or data.format in ("auto", "columns"):
        return
    for name in COLUMN_KEYS:
        value = getattr(data, name)
        if value != getattr(JsonlDataConfig(), name):
            yield f"data.{name}={value}: has no effect with data.format={data.format}; remove it"


def row_terms(config: DataConfig) -> dict[str, str]:
    """Name -> column of the numbers that the rows have for their loss."""
    columns = {name: getattr(config, f"{name}_field", None) for name in ROW_TERMS}
    return {name: column for name, column in columns.items() if column is not None}


DATA_SCHEMAS: dict[str, type[DataConfig]] = {
    "sentiment": SentimentDataConfig,
    "hh": HhDataConfig,
    "shp": ShpDataConfig,
    "se": SeDataConfig,
    "tldr": TldrDataConfig,
    "imdb": ImdbDataConfig,
    "ultrafeedback": UltrafeedbackDataConfig,
    "jsonl": JsonlDataConfig,
    "mix": MixDataConfig,
}
