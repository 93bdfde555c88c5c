"""Inputs of the memory plan other than the configuration: the model's shape, the stage's workload
and the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from dpo_cli.config import ClassifierRewardFn, HardwareConfig, ModelConfig, RewardModelFn, RunConfig
from dpo_cli.config.unread import unread
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.model.load import count_parameters, hf_config, load_tokenizer
from dpo_cli.model.source import loading, source_of
from dpo_cli.model.stored import stored_dtype, weight_files
from dpo_cli.plan.memory.budget import Fitting, fitting, is_open
from dpo_cli.plan.memory.estimate import PROGRAM
from dpo_cli.plan.memory.facts import Facts, room, texts_of
from dpo_cli.plan.memory.shape import shape_of
from dpo_cli.rewards.scoring import KEY
from dpo_cli.session.preview import Preview
from dpo_cli.stages import stage_module
from dpo_cli.train.runtime import Runtime, start_runtime


def plan_facts(config: RunConfig) -> Facts | None:
    """`facts_of` a run, as in its dry run."""
    return facts_of(Preview(config, planned_runtime(config.hardware, config.seed)))


def tokens_chooser(
    config: RunConfig, runtime: Runtime
) -> Callable[[PreTrainedTokenizerFast, EncodedSplits], Fitting] | None:
    """Chooses the tokens per micro-batch of a run on CUDA once its model is loaded; None if they
    are configured."""
    if not is_open(config, runtime.device.type):
        return None

    def choose(tokenizer: PreTrainedTokenizerFast, splits: EncodedSplits) -> Fitting:
        preview = Preview(config, runtime)
        preview.tokenizer, preview.splits = tokenizer, splits
        facts = facts_of(preview)
        assert facts is not None  # the stage trains
        return fitting(config, facts, room(config.hardware, runtime.device) + PROGRAM["cuda"])

    return choose


def facts_of(preview: Preview) -> Facts | None:
    """What `memory.estimate` needs; None for a stage that neither trains nor samples."""
    config, runtime = preview.config, preview.runtime
    workload_of = getattr(stage_module(config.stage.name), "workload", None)
    if workload_of is None:
        return None
    workload = workload_of(config, preview.splits)
    hf = hf_config(config.model, preview.tokenizer)
    with loading(config.model.path or config.model.name, "model.path"):
        shape = shape_of(hf, preview.auto)
    return Facts(
        shape,
        replace(texts_of(workload.lengths, workload.steps), new=workload.new_tokens),
        runtime.device.type,
        runtime.precision == "bf16",
        scorer_parameters(config),
        stored_bytes(config.model),
    )


def stored_bytes(model: ModelConfig) -> int:
    """Bytes per weight in a local folder's files; those of float32 for a model from scratch or from
    the hub, which a plan does not download."""
    if model.path is None:
        return torch.float32.itemsize
    source, options = source_of(model)
    with loading(source, "model.path"):
        files = weight_files(source, options) if Path(source).is_dir() else []
        return stored_dtype(files).itemsize


def scorer_parameters(config: RunConfig) -> int:
    """Weights of a local reward model or classifier; one on the hub is not counted."""
    reward = config.reward_fn
    if unread(config, "reward_fn") or not isinstance(reward, (RewardModelFn, ClassifierRewardFn)):
        return 0
    if reward.path is None:
        return 0
    source = ModelConfig(path=reward.path)
    return count_parameters(source, load_tokenizer(source, KEY), AutoModelForSequenceClassification)


def planned_runtime(hardware: HardwareConfig, seed: int) -> Runtime:
    """The run's device and precision; a configured GPU need not be present for a plan."""
    if hardware.device != "cuda" or torch.cuda.is_available():
        return start_runtime(hardware, seed)
    precision = "bf16" if hardware.precision == "auto" else hardware.precision
    return Runtime(torch.device("cuda"), precision)
