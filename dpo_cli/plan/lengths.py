"""What a dry run finds out for the memory plan: shape, lengths, where it would compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dpo_cli.config import (
    ClassifierRewardFn,
    DpoConfig,
    EvaluateConfig,
    HardwareConfig,
    ModelConfig,
    PpoConfig,
    RewardConfig,
    RewardModelFn,
    RunConfig,
    SampleConfig,
    SftConfig,
)
from dpo_cli.config.unread import unread
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.data.loader import StepPlan, plan_steps
from dpo_cli.model.load import (
    configured_context,
    count_parameters,
    hf_config,
    load_tokenizer,
)
from dpo_cli.model.source import source_of
from dpo_cli.model.stored import stored_dtype, weight_files
from dpo_cli.plan.memory.budget import Fitting, fitting, is_open
from dpo_cli.plan.memory.estimate import PROGRAM
from dpo_cli.plan.memory.facts import (
    Facts,
    Texts,
    lengths_of,
    room,
    sampled_lengths,
    texts_of,
)
from dpo_cli.plan.memory.shape import Shape, shape_of
from dpo_cli.records import EncodedExample
from dpo_cli.session.lengths import needed_tokens
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.train.runtime import Runtime, start_runtime

SCORER_KEY = "reward_fn.path"
LOOKED_AT = 200  # steps: the fullest of them stands for all


def plan_facts(config: RunConfig) -> Facts | None:
    """What `memory.estimate` needs of a run that trains, as a dry run finds it."""
    tokenizer = load_tokenizer(config.model)
    shape = planned_shape(config, tokenizer)
    context = configured_context(config.model, tokenizer)
    splits = load_encoded(config.data, tokenizer, context, config.seed, Path(config.cache_dir))
    return facts_of(config, planned_runtime(config.hardware, config.seed), shape, splits)


def tokens_chooser(
    config: RunConfig, runtime: Runtime
) -> Callable[[PreTrainedTokenizerFast, EncodedSplits], Fitting] | None:
    """How a run on CUDA finds its micro-batches, with its model loaded; None where it is told."""
    if not is_open(config, runtime.device.type):
        return None

    def choose(tokenizer: PreTrainedTokenizerFast, splits: EncodedSplits) -> Fitting:
        facts = facts_of(config, runtime, planned_shape(config, tokenizer), splits)
        assert facts is not None  # of a stage that trains
        return fitting(config, facts, room(config.hardware, runtime.device) + PROGRAM["cuda"])

    return choose


def planned_shape(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Shape:
    auto = AutoModelForSequenceClassification if config.stage.name == "reward" else None
    return shape_of(hf_config(config.model, tokenizer), auto or AutoModelForCausalLM)


def facts_of(
    config: RunConfig, runtime: Runtime, shape: Shape, splits: EncodedSplits
) -> Facts | None:
    """None for a stage that runs no model."""
    texts = planned_texts(config, splits)
    if texts is None:
        return None
    half = runtime.precision == "bf16"
    scorer, stored = scorer_parameters(config), stored_bytes(config.model)
    return Facts(shape, texts, runtime.device.type, half, scorer, stored)


def stored_bytes(model: ModelConfig) -> int:
    """Of a weight in a local folder's files; of the hub's, which are not fetched for a plan, and
    of a model from scratch, those of float32."""
    if model.path is None:
        return torch.float32.itemsize
    source, options = source_of(model)
    files = weight_files(source, options) if Path(source).is_dir() else []
    return stored_dtype(files).itemsize


def planned_texts(config: RunConfig, splits: EncodedSplits) -> Texts | None:
    """Lengths of what the stage trains on or samples; None where it runs no model."""
    stage = config.stage
    if isinstance(stage, (SftConfig, DpoConfig, RewardConfig)):
        lengths = lengths_of(targets(config, splits.train))
        plan = steps_of(config, len(lengths))
        return texts_of(lengths, map(plan.indices, range(min(plan.steps, LOOKED_AT))))
    if not isinstance(stage, (PpoConfig, SampleConfig, EvaluateConfig)):
        return None
    prompts = distinct_prompts(splits.train + splits.eval)
    most = stage.max_new_tokens or needed_tokens([*splits.train, *splits.eval])
    lengths = sampled_lengths(prompts, stage.completions, most)
    steps: list[list[int]] = []
    if isinstance(stage, PpoConfig):
        longest = sorted(range(len(lengths)), key=lambda i: lengths[i][0])
        steps = [longest[-(config.train.batch_size // stage.completions) :]]
    return replace(texts_of(lengths, steps), new=most)


def scorer_parameters(config: RunConfig) -> int:
    """Weights of a local reward model or classifier; one on the hub is not counted."""
    reward = config.reward_fn
    if unread(config, "reward_fn") or not isinstance(reward, (RewardModelFn, ClassifierRewardFn)):
        return 0
    if reward.path is None:
        return 0
    source = ModelConfig(path=reward.path)
    tokenizer = load_tokenizer(source, SCORER_KEY)
    return count_parameters(source, tokenizer, AutoModelForSequenceClassification)


def steps_of(config: RunConfig, rows: int) -> StepPlan:
    train = config.train
    return plan_steps(
        rows, train.batch_size, train.epochs, train.max_steps, train.shuffle, config.seed
    )


def targets(config: RunConfig, examples: list[EncodedExample]) -> list[EncodedExample]:
    """What the stage trains on: SFT takes the best response alone."""
    if config.stage.name != "sft":
        return examples
    return [replace(e, response_ids=e.response_ids[:1]) for e in examples]


def planned_runtime(hardware: HardwareConfig, seed: int) -> Runtime:
    """Where the run will compute: a GPU that is asked for need not be here to be planned for."""
    if hardware.device != "cuda" or torch.cuda.is_available():
        return start_runtime(hardware, seed)
    precision = "bf16" if hardware.precision == "auto" else hardware.precision
    return Runtime(torch.device("cuda"), precision)
