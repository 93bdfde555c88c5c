"""The scorer that the `reward_fn` group configures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import (
    ClassifierRewardFn,
    LexiconRewardFn,
    ModelConfig,
    PythonRewardFn,
    RewardFnConfig,
    RewardModelFn,
    RunConfig,
    SentimentRewardFn,
)
from dpo_cli.config.unread import unread, value_at
from dpo_cli.data.template import use_template_file
from dpo_cli.durable.provenance import load_provenance
from dpo_cli.errors import DataError
from dpo_cli.model.attention.interface import kernel_of, use_kernel
from dpo_cli.model.classifier import (
    Classifier,
    classifier_config,
    label_index,
    label_names,
    load_classifier,
)
from dpo_cli.model.digest import loaded_digest
from dpo_cli.model.load import load_tokenizer
from dpo_cli.model.reward import load_reward_model, rewards, round_products, without_padding
from dpo_cli.model.source import model_folder
from dpo_cli.records import Batch
from dpo_cli.rewards.completions import Encoding, values_of
from dpo_cli.rewards.lexicon import from_lists, lexicon, read_lexicon
from dpo_cli.rewards.scorers import SCORERS, Completed, Scorer, finite, sentiment_log_odds
from dpo_cli.session.session import Session
from dpo_cli.train.runtime import Runtime
from dpo_cli.user_code import UserFunction, user_function

KEY = "reward_fn.path"
NORMALIZATION = "normalisation"  # the entry of a reward model's dpo_run.json


def load_scorer(session: Session, config: RewardFnConfig | None = None) -> Scorer:
    """The scorer that `config` (default: the run's reward_fn) names; its model stays loaded.

    A completion's score does not depend on the others of a call, up to rounding (in
    `scoring_dtype`); equal completions of a call get equal scores. Ground truths and classifiers
    always score in float32. Raises ConfigError or DataError.
    """
    config = config or session.config.reward_fn
    if isinstance(config, SentimentRewardFn) and config.scale == "log_odds":
        return sentiment_log_odds
    if isinstance(config, LexiconRewardFn):
        if config.path is not None:
            return lexicon(read_lexicon(Path(config.path)))
        return lexicon(from_lists(config.positive, config.negative))
    if isinstance(config, ClassifierRewardFn):
        return _classifier(session, config)
    if isinstance(config, RewardModelFn):
        return _reward_model(session, config)
    if isinstance(config, PythonRewardFn):
        assert config.file is not None  # checked with the configuration
        return OwnScorer(user_function("reward_fn.file", config.file, "reward"))
    return SCORERS[config.name]


@dataclass(frozen=True)
class OwnScorer:
    """`reward(prompts, completions)` of the user's file; prompts as their source has them."""

    function: UserFunction

    def __call__(self, rows: Sequence[Completed]) -> list[float]:
        result = self.function([row.prompt for row in rows], [row.completion for row in rows])
        try:
            values = [float(value) for value in result]
        except (TypeError, ValueError, OverflowError) as error:
            raise self.function.wrong(f"reward() returned no list of numbers: {error}") from error
        if len(values) != len(rows):
            raise self.function.wrong(
                f"reward() returned {len(values)} numbers for {len(rows)} completions"
            )
        return finite(values)


def scoring_rows(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The plan's line on the reward, if the run uses one. ConfigError for a local model that cannot
    score."""
    reward = config.reward_fn
    if unread(config, "reward_fn"):
        return
    if not isinstance(reward, (RewardModelFn, ClassifierRewardFn)):
        yield "reward", reward.name
        return
    if reward.path is not None:
        source = ModelConfig(path=reward.path)
        classifier_config(source, load_tokenizer(source, KEY), KEY)
    yield "reward", f"{reward.name}, {reward.path or value_at(config, 'reward_fn.hub_id')}"


@dataclass(frozen=True)
class ClassifierScorer:
    """Probability or log-odds of one class for prompt and completion as one text."""

    classifier: Classifier
    label: int
    scale: str

    def __call__(self, rows: Sequence[Completed]) -> list[float]:
        if not rows:
            return []
        odds = self.classifier.log_odds([row.text for row in rows], self.label)
        return finite((odds if self.scale == "log_odds" else odds.sigmoid()).tolist())


def _classifier(session: Session, config: ClassifierRewardFn) -> Scorer:
    source = ModelConfig(
        path=config.path, hub_id=config.hub_id, revision=config.revision,
        other_base=session.config.model.other_base,
    )  # fmt: skip
    classifier = load_classifier(
        source, config.max_length, config.batch_size, session.runtime.device, KEY
    )
    label = label_index(classifier.model.config, config.label)
    name = label_names(classifier.model.config)[label]
    session.note(f"reward_fn=classifier: {config.scale} of class {name!r}")
    return ClassifierScorer(classifier, label, config.scale)


@dataclass(frozen=True)
class Normalization:
    """Scales rewards to mean 0 and std 1 on reference samples; the default is the identity."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, values: Sequence[float]) -> list[float]:
        return [(value - self.mean) / self.std for value in values]


@dataclass
class RewardModelScorer:
    """The score at the last token of prompt and completion.

    dtype: of matrix products, under autocast as in training; the head and the score are in float32.
    """

    session: Session
    model: PreTrainedModel
    encoding: Encoding
    normalize: Normalization
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: Sequence[Completed]) -> list[float]:
        examples = without_padding(self.encoding(rows), self.model)
        values = self.session.within_memory(
            lambda: values_of(self.session, self.model, examples, self._rewards, keep_last=True)
        )
        return finite(self.normalize(values))

    def _rewards(self, batch: Batch) -> torch.Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(batch.input_ids.device.type, self.dtype if half else None, half):
            return rewards(self.model, batch)


def scoring_dtype(runtime: Runtime) -> torch.dtype:
    """bf16 for a run that computes in it on CUDA, as in the reward model's training: float32 would
    take as long as sampling. Otherwise float32."""
    half = runtime.device.type == "cuda" and runtime.precision == "bf16"
    return torch.bfloat16 if half else torch.float32


def reward_model_scorer(
    session: Session,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    normalize: Normalization | None = None,
) -> RewardModelScorer:
    """A scorer of a loaded reward model, which is moved to the session's device."""
    model.to(session.runtime.device).eval()  # type: ignore[arg-type]
    dtype = scoring_dtype(session.runtime)
    if dtype == torch.float32 and kernel_of(model) == "varlen":  # which does not support float32
        use_kernel(model, "sdpa")
    encoding = Encoding(session, model, tokenizer)
    return RewardModelScorer(session, model, encoding, normalize or Normalization(), dtype)


def _reward_model(session: Session, config: RewardModelFn) -> Scorer:
    source = ModelConfig(path=config.path, other_base=session.config.model.other_base)
    tokenizer = load_tokenizer(source, KEY)
    if tokenizer.chat_template is None:  # otherwise it has the one of its training
        use_template_file(tokenizer, session.config.data)
    classifier_config(source, tokenizer, KEY)
    on = replace(session.placement, dtype=scoring_dtype(session.runtime))
    model = load_reward_model(source, tokenizer, session.config.seed, KEY, on)
    model.requires_grad_(False)
    if on.dtype != torch.float32:
        round_products(model, on.dtype)
    normalize = _normalization(session, config) if config.normalized else None
    return reward_model_scorer(session, model, tokenizer, normalize)


def _normalization(session: Session, config: RewardModelFn) -> Normalization | None:
    assert config.path is not None  # checked with the configuration
    facts = load_provenance(model_folder(config.path, KEY)).get(NORMALIZATION)
    if facts is None:
        session.note(
            f"reward_fn.normalized=true: {config.path} has no mean and std "
            "(stage.normalize_prompts of stage=reward), so its rewards are not scaled"
        )
        return None
    try:
        normalization = Normalization(float(facts["mean"]), float(facts["std"]))
    except (KeyError, TypeError, ValueError):
        normalization = Normalization(math.nan, math.nan)
    if not (math.isfinite(normalization.mean) and 0.0 < normalization.std < math.inf):
        raise DataError(
            f"{config.path}: its dpo_run.json has no finite mean and std of rewards ({facts}); set "
            "reward_fn.normalized=false"
        )
    return normalization


def scorer_digest(scorer: Scorer) -> str | None:
    """sha256 of a scorer's model or file, which identifies it even if that is overwritten."""
    if isinstance(scorer, OwnScorer):
        return scorer.function.digest
    if isinstance(scorer, ClassifierScorer):
        return loaded_digest(scorer.classifier.model)
    return loaded_digest(scorer.model) if isinstance(scorer, RewardModelScorer) else None
