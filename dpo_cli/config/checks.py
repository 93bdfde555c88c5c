"""Cross-field checks: every problem of a configuration, reported together.

A line is `key=value: what is wrong; the remedy`. The keys of a stage are checked in
`stages/<name>.py`.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dpo_cli.config import (
    REWARD_FN_SCHEMAS,
    ArchitectureConfig,
    LexiconRewardFn,
    NoRewardFn,
    PythonRewardFn,
    RunConfig,
    SentimentDataConfig,
    SentimentRewardFn,
    spec_of,
)
from dpo_cli.config.datasets import CHAT_TEMPLATES, column_problems
from dpo_cli.config.keys import LOCAL, facts
from dpo_cli.config.mix import mix_problems
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.config.stages.base import no_effect
from dpo_cli.config.unread import unread, unread_problems, value_at
from dpo_cli.durable.refusals import as_refusal
from dpo_cli.errors import ConfigError

ALL_LINEAR = "all-linear"
GENERATED_IGNORES = (
    "hub_id", "hub_config", "revision", "path", "eval_path", "train_split", "eval_split",
    "max_rows",
)  # fmt: skip
MOST_RANDOM = 10**10  # weights of a model from scratch
MOST_GENERATED = 10**7  # reviews
OPTIM_OPTIONS = {"adamw": {"betas"}, "rmsprop": {"alpha"}, "adamw8bit": {"betas"}}


def check(config: RunConfig, typed: Sequence[str] = (), coming: Sequence[Path] = ()) -> None:
    """Raise ConfigError with all problems, one per line.

    typed: the command line's overrides; coming: folders that earlier steps will write.
    """
    parts = (_choices, _bounds, partial(_files, coming=coming), _model, _data)
    rest = (_reward_fn, _lora, _train, _optim, _hardware)
    problems = [
        line for part in (*parts, spec_of(config.stage).problems, *rest) for line in part(config)
    ]
    keys = sorted({word.lstrip("+").partition("=")[0] for word in typed})
    problems += unread_problems(config, keys)
    if problems:
        raise ConfigError("\n".join(problems))


def _choices(config: RunConfig) -> Iterator[str]:
    for key, value, fact in facts(config):
        if value is None or not fact.choices or value in fact.choices:
            continue
        if key == "hardware.precision" and value in ("fp16", "float16", "half"):
            yield f"{key}={value}: not supported: log-probs overflow in it; use bf16 or fp32"
        elif (config.stage.name, key, value) == ("dpo", "stage.loss", "dpo"):
            yield "stage.loss=dpo: DPO's own loss is called sigmoid; use stage.loss=sigmoid"
        else:
            hint = did_you_mean(value, fact.choices)
            yield f"{key}={value}: must be one of {', '.join(fact.choices)}{hint}"


def _bounds(config: RunConfig) -> Iterator[str]:
    for key, value, fact in facts(config):
        for each in value if isinstance(value, list) else [value]:
            if each is not None and fact.bound and (problem := fact.bound.problem(each)):
                yield f"{key}={value}: {problem}"
                break


def _files(config: RunConfig, coming: Sequence[Path]) -> Iterator[str]:
    for key, value, fact in facts(config):
        for path in value if isinstance(value, list) else [value]:
            # YAML rejects it as well, so the run's config.yaml could not be read again.
            if isinstance(path, str) and any("\ud800" <= letter <= "\udfff" for letter in path):
                yield f"{key}: is not valid UTF-8; rename the file or folder, or use another text"
            if path is None or fact.path is None:
                continue
            # a hub id looks like owner/name
            local = fact.path == LOCAL or path.startswith((".", "/")) or path.count("/") > 1
            if any(map(Path(path).is_relative_to, coming)):
                continue
            pattern = key.startswith("data.") and glob.has_magic(path) and glob.glob(path)
            refused = _refused(path) if local and not pattern else None
            if isinstance(refused, (FileNotFoundError, NotADirectoryError)):
                or_file = " file or" if fact.path == LOCAL else ""
                yield f"{key}={path}: no such{or_file} folder"
            elif refused is not None:
                yield f"{key}={as_refusal(refused, Path(path))}"
            elif key == "stage.evaluations" and _refused(f"{path}/points.jsonl"):
                yield (
                    f"{key}={path}: has no points.jsonl; give folders of finished stage=evaluate "
                    "runs"
                )


def _refused(path: str) -> OSError | None:
    """The error for a path that is not an accessible file or folder, else None."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return FileNotFoundError(errno.ENOENT, "a device or a pipe, whose reading may never end")


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    source = model.path or model.hub_id or model.architecture or value_at(config, "stage.policies")
    if not source and spec_of(config.stage).reads_model:
        yield (
            f"model={model.name}: no weights; set model.path=<folder> or model.hub_id=<owner/name>"
        )
    shape = model.architecture
    if model.hub_id and shape and not model.path:
        yield (
            f"model.hub_id={model.hub_id}: has no effect with model={model.name}, whose weights "
            f"are random; use model=custom model.hub_id={model.hub_id}"
        )
    if shape and _weights(shape) > MOST_RANDOM:
        yield (
            f"model.architecture: more than {MOST_RANDOM:,} random weights; use fewer layers, a "
            "smaller hidden or a smaller vocab"
        )
    if shape and shape.heads >= 1 and shape.hidden % shape.heads:
        yield (
            f"model.architecture.heads={shape.heads}: must divide "
            f"model.architecture.hidden={shape.hidden}"
        )


def _weights(shape: ArchitectureConfig) -> int:
    """Parameters of a GPT-2 of this shape: 12 hidden^2 per block, and the embeddings."""
    return shape.hidden * (12 * shape.layers * shape.hidden + shape.vocab + shape.context)


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    generated = data.rows * (data.responses or 1) if isinstance(data, SentimentDataConfig) else 0
    if generated > MOST_GENERATED:
        yield (
            f"data.rows={value_at(config, 'data.rows')}: with data.responses="
            f"{value_at(config, 'data.responses')} more than {MOST_GENERATED:,} reviews"
        )
    local = data.name in ("sentiment", "mix") or not spec_of(config.stage).reads_rows
    if not (local or data.path or data.hub_id):
        yield f"data={data.name}: no rows; set data.path=<file or folder>"
    for name in GENERATED_IGNORES if isinstance(data, SentimentDataConfig) else ():
        if getattr(data, name) != getattr(SentimentDataConfig(), name):
            yield no_effect(f"data.{name}", getattr(data, name), "data=sentiment")
    if not (data.chat_template in CHAT_TEMPLATES or os.path.isfile(data.chat_template)):
        hint = did_you_mean(data.chat_template, CHAT_TEMPLATES)
        known = ", ".join(CHAT_TEMPLATES)
        yield f"data.chat_template={data.chat_template}: must be one of {known}, or a file{hint}"
    yield from (*column_problems(data), *mix_problems(data))
    spec, label = spec_of(config.stage), getattr(data, "label_field", None)
    if label and spec.trains and not spec.takes_labels:
        yield (
            f"data.label_field={label}: stage={config.stage.name} would train on undesirable "
            "responses as well; use stage=kto"
        )
    longest, prompt = data.max_length, data.max_prompt_length
    if longest is not None and prompt is not None and prompt >= longest:
        yield (
            f"data.max_prompt_length={prompt}: must be below data.max_length={longest}, "
            "which includes the response"
        )
    minimum, maximum = (
        value_at(config, "data.min_prompt_words"),
        value_at(config, "data.max_prompt_words"),
    )
    if minimum is not None and maximum < minimum:
        yield f"data.max_prompt_words={maximum}: must be at least data.min_prompt_words={minimum}"


def _reward_fn(config: RunConfig) -> Iterator[str]:
    """Problems of the reward, if the stage uses it."""
    chosen, stage = config.reward_fn, config.stage
    if unread(config, "reward_fn"):
        return
    others = [name for name in REWARD_FN_SCHEMAS if name not in (chosen.name, "none")]
    if isinstance(chosen, NoRewardFn) and not spec_of(stage).reward_optional:
        yield (
            f"reward_fn=none: stage={stage.name} needs a reward; choose one of {', '.join(others)}"
        )
    generated = isinstance(config.data, SentimentDataConfig) or not spec_of(stage).reads_rows
    if isinstance(chosen, SentimentRewardFn) and not generated:
        yield (
            "reward_fn=sentiment: rates the reviews of data=sentiment, not "
            f"data={config.data.name}; use another: {', '.join(others)}"
        )
    if isinstance(chosen, LexiconRewardFn) and not (
        chosen.path or chosen.positive or chosen.negative
    ):
        yield (
            "reward_fn=lexicon: has no words; set reward_fn.path=<file of word<TAB>valence>, or "
            "reward_fn.positive=[good,...] reward_fn.negative=[bad,...]"
        )
    if isinstance(chosen, PythonRewardFn) and not chosen.file:
        yield "reward_fn=python needs reward_fn.file=<file with reward(prompts, completions)>"
    if chosen.name in ("classifier", "reward_model"):
        path, hub_id = value_at(config, "reward_fn.path"), value_at(config, "reward_fn.hub_id")
        if not (path or hub_id):
            yield f"reward_fn={chosen.name}: needs a model; set reward_fn.path=<folder>"


def _lora(config: RunConfig) -> Iterator[str]:
    lora, model = config.lora, config.model
    if lora.name == "none" or not spec_of(config.stage).trains:
        return
    if model.path is None and model.architecture is not None:
        yield (
            f"lora={lora.name}: model={model.name} has random weights, which an adapter checkpoint "
            "does not contain; use full fine-tuning (lora=none), or set model.path=<folder>"
        )
    if not lora.target_modules or (ALL_LINEAR in lora.target_modules[1:]):
        yield (
            f"lora.target_modules={lora.target_modules}: must be [{ALL_LINEAR}] or names of "
            "layers, such as [q_proj, v_proj]"
        )
    if lora.use_dora and lora.quantization == "int8":
        yield (
            "lora.use_dora=true: PEFT's DoRA ignores the scales of int8 weights; use "
            "lora.quantization=nf4 or lora.use_dora=false"
        )


def _train(config: RunConfig) -> Iterator[str]:
    known, name = spec_of(config.stage).best_metrics, config.train.best_metric
    if known and name not in known:
        hint = did_you_mean(name, known)
        yield f"train.best_metric={name}: must be one of {', '.join(known)}{hint}"
    coefficient = config.train.router_aux_loss_coef
    if coefficient and config.hardware.compile == "blocks":
        yield (
            f"train.router_aux_loss_coef={coefficient}: router logits cannot be captured in "
            "compiled blocks; use hardware.compile=none"
        )
    steps, minutes = config.train.save_every_steps, config.train.save_every_minutes
    if steps is not None and minutes is not None:
        yield no_effect("train.save_every_minutes", minutes, f"train.save_every_steps={steps}")


def _optim(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if spec_of(config.stage).trains and optim.lr == 0:
        yield "optim.lr=0.0: nothing would be trained; set it above 0"
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas={optim.betas}: must be two numbers in [0, 1)"
    defaults = type(optim)()
    ignored = set().union(*OPTIM_OPTIONS.values()) - OPTIM_OPTIONS.get(optim.name, set())
    for name in sorted(ignored) if optim.name in OPTIM_OPTIONS else ():
        if getattr(optim, name) != getattr(defaults, name):
            yield no_effect(f"optim.{name}", getattr(optim, name), f"optim={optim.name}")
    if optim.warmup_steps is not None and optim.warmup_ratio != defaults.warmup_ratio:
        steps = f"optim.warmup_steps={optim.warmup_steps}"
        yield no_effect("optim.warmup_ratio", optim.warmup_ratio, steps)


def _hardware(config: RunConfig) -> Iterator[str]:
    hardware = config.hardware
    ranks = hardware.devices * hardware.nodes
    trains = spec_of(config.stage).trains
    if trains and hardware.weights == "bf16" and hardware.precision == "fp32":
        yield (
            "hardware.weights=bf16: needs hardware.precision=bf16; or use hardware.weights=fp32, "
            "in which small updates are not lost to rounding"
        )
    if trains and hardware.residual == "bf16" and hardware.precision == "fp32":
        yield "hardware.residual=bf16: needs hardware.precision=bf16; or use hardware.residual=fp32"
    if trains and hardware.kernels == "liger" and hardware.compile == "blocks":
        yield no_effect("hardware.kernels", "liger", "hardware.compile=blocks")
    if hardware.sharding == "hybrid" and hardware.nodes == 1:
        yield (
            "hardware.sharding=hybrid: replicates the weights across nodes, and hardware.nodes "
            "is 1; use hardware.sharding=full"
        )
    if ranks == 1:
        return
    devices = f"hardware.devices={hardware.devices}"
    if config.optim.name == "adamw8bit" and trains:
        yield f"optim=adamw8bit: cannot be sharded ({devices}); use optim=adamw or rmsprop"
    if config.model.attention == "plain":
        yield f"model.attention=plain: not supported with {devices}; use model.attention=auto"
