"""Keys of the `reward_fn` and `judge` groups, one dataclass per option."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config.keys import LOCAL, above, at_least, key

SCALES = ("probability", "log_odds")


@dataclass
class RewardFnConfig:
    """Rates completions, one number each."""

    name: str = key("sentiment", "what scores a completion")


@dataclass
class SentimentRewardFn(RewardFnConfig):
    """The exact posterior of the generated reviews."""

    scale: str = key("probability", "probability (in [0, 1]) | log_odds", choices=SCALES)


@dataclass
class ClassifierRewardFn(RewardFnConfig):
    """A Hugging Face sequence classifier on prompt + completion."""

    name: str = key("classifier", "what scores a completion")
    path: str | None = key(None, "local folder; takes precedence over reward_fn.hub_id", path=LOCAL)
    hub_id: str | None = key("siebert/sentiment-roberta-large-english", "owner/name on the hub")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    label: str | int | None = key(
        None, "name or index of the class to reward; null: POSITIVE if there is one, else the last"
    )
    scale: str = key("probability", "probability (in [0, 1]) | log_odds", choices=SCALES)
    max_length: int = key(
        512, "tokens; a longer text is truncated at its start", bound=at_least(1, 2**20)
    )
    batch_size: int = key(64, "texts per forward", bound=at_least(1, 65_536))


@dataclass
class RewardModelFn(RewardFnConfig):
    """A reward model of stage=reward, or any sequence classifier with one output."""

    name: str = key("reward_model", "what scores a completion")
    path: str | None = key(None, "folder of the model, or of its run", path=LOCAL)
    normalized: bool = key(
        True, "normalize rewards to mean 0 and std 1 on the base model's samples, as its run "
        "measured them",
        old="normalised",
    )  # fmt: skip


@dataclass
class LexiconRewardFn(RewardFnConfig):
    """Mean valence of the words of a completion."""

    name: str = key("lexicon", "what scores a completion")
    path: str | None = key(
        None, "file of lines `word<TAB>valence` as in VADER; takes precedence over the lists",
        path=LOCAL,
    )  # fmt: skip
    positive: list[str] = key([], "words of valence 1")
    negative: list[str] = key([], "words of valence -1")


@dataclass
class PythonRewardFn(RewardFnConfig):
    """A user-defined function: `reward(prompts, completions)` returns one number each."""

    name: str = key("python", "what scores a completion")
    file: str | None = key(
        None, "Python file that defines it; runs with your permissions", path=LOCAL, code=True
    )


@dataclass
class LengthRewardFn(RewardFnConfig):
    """Number of words: a poor reward, to demonstrate length exploitation."""

    name: str = key("length", "what scores a completion")


@dataclass
class NoRewardFn(RewardFnConfig):
    """No reward."""

    name: str = key("none", "what scores a completion")


REWARD_FN_SCHEMAS: dict[str, type[RewardFnConfig]] = {
    "sentiment": SentimentRewardFn,
    "classifier": ClassifierRewardFn,
    "reward_model": RewardModelFn,
    "lexicon": LexiconRewardFn,
    "length": LengthRewardFn,
    "python": PythonRewardFn,
    "none": NoRewardFn,
}


@dataclass
class JudgeConfig:
    """Decides which of two completions wins."""

    name: str = key("reward_fn", "what compares two completions")


@dataclass
class HttpJudgeConfig(JudgeConfig):
    """A language model behind an OpenAI-compatible endpoint.

    Its base URL and key come from the environment: OPENAI_BASE_URL, OPENAI_API_KEY.
    """

    name: str = key("http", "what compares two completions")
    model: str = key("gpt-4", "model name at the endpoint of OPENAI_BASE_URL")
    task: str | None = key(
        None, "which of the paper's judge prompts to use; null: by the dataset",
        choices=("dialogue", "summary", "sentiment"),
    )  # fmt: skip
    both_orders: bool = key(True, "judge both orders (A/B, B/A); verdicts that disagree are a tie")
    max_tokens: int = key(256, "tokens per answer", bound=at_least(1, 10**6))
    timeout_seconds: float = key(60.0, "timeout of a request", bound=above(0, 86_400))
    retries: int = key(
        4, "per request, after a timeout, a rate limit or a server error", bound=at_least(0, 100)
    )
    max_calls: int = key(
        2000, "requests per run; further pairs are counted as not judged", bound=at_least(1)
    )
    parallel: int = key(4, "concurrent requests", bound=at_least(1, 256))


TASKS = {"tldr": "summary", "imdb": "sentiment", "sentiment": "sentiment"}  # data -> judge.task

JUDGE_SCHEMAS: dict[str, type[JudgeConfig]] = {"reward_fn": JudgeConfig, "http": HttpJudgeConfig}
