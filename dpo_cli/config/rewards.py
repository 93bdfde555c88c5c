"""Keys of the `reward_fn` and `judge` groups, one dataclass an option."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RewardFnConfig:
    """What says how good a completion is, one number each."""

    name: str = "sentiment"


@dataclass
class SentimentRewardFn(RewardFnConfig):
    """The exact posterior of the generated reviews."""

    scale: str = "probability"  # probability | log_odds


@dataclass
class ClassifierRewardFn(RewardFnConfig):
    """A Hugging Face sequence classifier on prompt + completion."""

    name: str = "classifier"
    path: str | None = None  # wins over hub_id
    hub_id: str | None = "siebert/sentiment-roberta-large-english"
    revision: str | None = None
    label: str | int | None = None  # name or index of a class; null: POSITIVE, else the last
    scale: str = "probability"  # probability | log_odds
    max_length: int = 512  # tokens; the end of a longer text is kept
    batch_size: int = 64


@dataclass
class RewardModelFn(RewardFnConfig):
    """A reward model that stage=reward trained, or any with one score."""

    name: str = "reward_model"
    path: str | None = None  # folder or run
    normalised: bool = True  # mean 0, std 1 on the reference samples its run measured


@dataclass
class LexiconRewardFn(RewardFnConfig):
    """Mean valence of the words of a completion."""

    name: str = "lexicon"
    path: str | None = None  # lines `word<TAB>valence`, as VADER's file; wins over the lists
    positive: list[str] = field(default_factory=list)  # valence 1
    negative: list[str] = field(default_factory=list)  # valence -1


@dataclass
class LengthRewardFn(RewardFnConfig):
    """Number of words: a reward nobody wants, to see length exploitation."""

    name: str = "length"


@dataclass
class NoRewardFn(RewardFnConfig):
    """Nothing rates completions."""

    name: str = "none"


REWARD_FN_SCHEMAS: dict[str, type[RewardFnConfig]] = {
    "sentiment": SentimentRewardFn,
    "classifier": ClassifierRewardFn,
    "reward_model": RewardModelFn,
    "lexicon": LexiconRewardFn,
    "length": LengthRewardFn,
    "none": NoRewardFn,
}


@dataclass
class JudgeConfig:
    """What decides which of two completions wins."""

    name: str = "reward_fn"


@dataclass
class HttpJudgeConfig(JudgeConfig):
    """A language model behind an OpenAI-compatible endpoint.

    Its base URL and key come from the environment: OPENAI_BASE_URL, OPENAI_API_KEY.
    """

    name: str = "http"
    model: str = "gpt-4"
    task: str | None = None  # dialogue | summary | sentiment: what is asked; null: by the data
    both_orders: bool = True  # A/B and B/A; they must agree, else it is a tie
    max_tokens: int = 256
    timeout_seconds: float = 60.0
    retries: int = 4  # a request, after a time-out, a rate limit or a server's error
    max_calls: int = 2000  # a run; what is left unasked is counted as unasked
    parallel: int = 4  # requests at once


TASKS = {"tldr": "summary", "imdb": "sentiment", "sentiment": "sentiment"}  # data -> judge.task

JUDGE_SCHEMAS: dict[str, type[JudgeConfig]] = {"reward_fn": JudgeConfig, "http": HttpJudgeConfig}
