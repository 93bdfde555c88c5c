"""Cross-field checks: every problem of a configuration, told together.

A line is `key=value: what is wrong; the remedy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dpo_cli.bounds import BOUNDS
from dpo_cli.config import (
    BEST_METRICS,
    CHOICES,
    HardwareConfig,
    LoraConfig,
    OptimConfig,
    RunConfig,
    SentimentDataConfig,
    TrainConfig,
)
from dpo_cli.config.datasets import CHAT_TEMPLATES
from dpo_cli.errors import ConfigError
from dpo_cli.hints import did_you_mean
from dpo_cli.stage_checks import READERS, no_effect, stage_problems, unread, value_at

TRAINING = ("sft", "dpo", "reward", "ppo-baseline")
WITHOUT_DATA = ("label", "frontier")  # stages that read the files of others
ROWLESS = (*WITHOUT_DATA, "export")
ONE_PROCESS = ("inspect", "frontier", "export")  # stages that compute too little for several
ALL_LINEAR = "all-linear"
GENERATED_IGNORES = ("hub_id", "hub_config", "revision", "path", "eval_path", "eval_split")
SETTINGS = {"optim": OptimConfig(), "train": TrainConfig()}  # of training
READ_ANYWAY = {  # by stages that do not train
    (stage, "train.micro_batch_tokens") for stage in ("evaluate", "label")
}  # fmt: skip
HARDWARE = HardwareConfig()
OF_TRAINING = {  # keys of the hardware that stages without training do not read
    f"hardware.{name}": getattr(HARDWARE, name)
    for name in ("compile", "kernels", "residual", "weights", "activation_checkpointing")
}
SHARING = ("hardware.devices", "hardware.nodes", "hardware.sharding")
OPTIM_OPTIONS = {"adamw": {"betas"}, "rmsprop": {"alpha"}, "adamw8bit": {"betas"}}


FILES = (
    "model.path", "data.path", "data.eval_path", "stage.samples", "stage.pairs", "stage.optimum",
    "stage.policies", "stage.evaluations", "reward_fn.path",
)  # fmt: skip


def check(config: RunConfig, typed: Sequence[str] = (), coming: Sequence[Path] = ()) -> None:
    """Raise ConfigError with all problems, a line each.

    typed: the command line's words; coming: folders whose files need not be there yet.
    """
    parts = (_choices, _bounds, partial(_files, coming=coming), _model, _data)
    problems = [
        line
        for part in (*parts, stage_problems, _lora, _train, _optim, _hardware)
        for line in part(config)
    ]
    keys = sorted({word.lstrip("+").partition("=")[0] for word in typed})
    parts_of_keys = (_without_effect, _unadapted, _alone, _trust)
    problems += [line for part in parts_of_keys for line in part(config, keys)]
    if problems:
        raise ConfigError("\n".join(problems))


def _choices(config: RunConfig) -> Iterator[str]:
    for key, allowed in CHOICES.items():
        value = value_at(config, key)
        if value is None or value in allowed:
            continue
        if key == "hardware.precision" and value in ("fp16", "float16", "half"):
            yield f"{key}={value}: not offered, log-probs overflow in it; use bf16 or fp32"
        elif (key, value) == ("stage.loss", "dpo"):
            yield "stage.loss=dpo: DPO's own loss is called sigmoid; use stage.loss=sigmoid"
        else:
            hint = did_you_mean(value, allowed)
            yield f"{key}={value}: must be one of {', '.join(allowed)}{hint}"


def _bounds(config: RunConfig) -> Iterator[str]:
    for key, (rule, holds) in BOUNDS.items():
        value = value_at(config, key)
        if value is not None and not holds(value):
            yield f"{key}={value}: {rule}"


def _files(config: RunConfig, coming: Sequence[Path]) -> Iterator[str]:
    def absent(path: str) -> bool:
        return not Path(path).exists() and not any(map(Path(path).is_relative_to, coming))

    for key in FILES:
        value = value_at(config, key)
        paths = value if isinstance(value, list) else [value]
        for path in (path for path in paths if path is not None):
            if absent(path):
                yield f"{key}={path}: no such file or folder"
            elif key == "stage.evaluations" and absent(f"{path}/points.jsonl"):
                yield (
                    f"{key}={path}: has no points.jsonl; give folders of finished stage=evaluate "
                    "runs"
                )
    # a hub id looks like owner/name
    for key in ("stage.reference", "stage.opponent", "model.tokenizer"):
        value = value_at(config, key)
        local = value is not None and (value.startswith((".", "/")) or value.count("/") > 1)
        if local and absent(value):
            yield f"{key}={value}: no such folder"


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    named = model.path or model.hub_id or model.architecture or value_at(config, "stage.policies")
    if not named and config.stage.name not in WITHOUT_DATA:
        yield (
            f"model={model.name}: no weights; set model.path=<folder> or model.hub_id=<owner/name>"
        )
    shape = model.architecture
    if model.hub_id and shape and not model.path:
        yield (
            f"model.hub_id={model.hub_id}: has no effect with model={model.name}, whose weights "
            f"are random; use model=custom model.hub_id={model.hub_id}"
        )
    if shape and shape.heads >= 1 and shape.hidden % shape.heads:
        yield (
            f"model.architecture.heads={shape.heads}: must divide "
            f"model.architecture.hidden={shape.hidden}"
        )


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    local = isinstance(data, SentimentDataConfig) or config.stage.name in ROWLESS
    if not (local or data.path or data.hub_id):
        yield f"data={data.name}: no rows; set data.path=<file or folder>"
    for name in GENERATED_IGNORES if isinstance(data, SentimentDataConfig) else ():
        if getattr(data, name) is not None:
            yield no_effect(f"data.{name}", getattr(data, name), "data=sentiment")
    if not (data.chat_template in CHAT_TEMPLATES or Path(data.chat_template).is_file()):
        hint = did_you_mean(data.chat_template, CHAT_TEMPLATES)
        known = ", ".join(CHAT_TEMPLATES)
        yield f"data.chat_template={data.chat_template}: must be one of {known}, or a file{hint}"
    longest, prompt = data.max_length, data.max_prompt_length
    if longest is not None and prompt is not None and prompt >= longest:
        yield (
            f"data.max_prompt_length={prompt}: must be below data.max_length={longest}, "
            "the response needs room"
        )
    fewest, most = (
        value_at(config, "data.min_prompt_words"),
        value_at(config, "data.max_prompt_words"),
    )
    if fewest is not None and most < fewest:
        yield f"data.max_prompt_words={most}: must be at least data.min_prompt_words={fewest}"


def _lora(config: RunConfig) -> Iterator[str]:
    lora, model = config.lora, config.model
    if lora.name == "none" or config.stage.name not in TRAINING:
        return
    if model.path is None and model.architecture is not None:
        yield (
            f"lora={lora.name}: model={model.name} has random weights, which an adapter's folder "
            "would not hold; train them whole (lora=none), or set model.path=<folder>"
        )
    if not lora.target_modules or (ALL_LINEAR in lora.target_modules[1:]):
        yield (
            f"lora.target_modules={lora.target_modules}: must be [{ALL_LINEAR}] or names of "
            "layers, such as [q_proj, v_proj]"
        )
    if lora.use_dora and lora.quantization == "int8":
        yield (
            "lora.use_dora=true: PEFT's loses the scales of weights in 8 bits; use "
            "lora.quantization=nf4 or lora.use_dora=false"
        )


def _train(config: RunConfig) -> Iterator[str]:
    known, name = BEST_METRICS.get(config.stage.name, {}), config.train.best_metric
    if known and name not in known:
        hint = did_you_mean(name, known)
        yield f"train.best_metric={name}: must be one of {', '.join(known)}{hint}"
    steps, minutes = config.train.save_every_steps, config.train.save_every_minutes
    if steps is not None and minutes is not None:
        yield no_effect("train.save_every_minutes", minutes, f"train.save_every_steps={steps}")


def _optim(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if config.stage.name in TRAINING and optim.lr == 0:
        yield "optim.lr=0.0: nothing would be learnt; set it above 0"
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
    trains = config.stage.name in TRAINING
    if trains and hardware.weights == "bf16" and hardware.precision == "fp32":
        yield (
            "hardware.weights=bf16: needs hardware.precision=bf16; or use hardware.weights=fp32, "
            "which keeps small changes of the weights"
        )
    if trains and hardware.residual == "bf16" and hardware.precision == "fp32":
        yield "hardware.residual=bf16: needs hardware.precision=bf16; or use hardware.residual=fp32"
    if trains and hardware.kernels == "liger" and hardware.compile == "blocks":
        yield "hardware.kernels=liger: has no use with hardware.compile=blocks; leave it out"
    if hardware.sharding == "hybrid" and hardware.nodes == 1:
        yield (
            "hardware.sharding=hybrid: keeps a copy of the weights on each of several nodes, "
            "hardware.nodes is 1; use hardware.sharding=full"
        )
    if ranks == 1:
        return
    devices = f"hardware.devices={hardware.devices}"
    if config.optim.name == "adamw8bit" and trains:
        yield f"optim=adamw8bit: cannot be shared by {devices}; use optim=adamw or rmsprop"
    if config.model.attention == "plain":
        yield f"model.attention=plain: not offered with {devices}; use model.attention=auto"


def _without_effect(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """Keys of the command line that neither the stage nor the weights read.

    Those of YAML files may be there for another stage or other weights.
    """
    stage, path = config.stage.name, config.model.path
    for key in keys:
        group, _, name = key.partition(".")
        value = value_at(config, key)
        if group in READERS and not name and (why := unread(config, group)):
            yield no_effect(group, value.name, why)
        if value is None or not name:  # not a key's word but an option's, such as optim=adamw
            continue
        untrained = group in SETTINGS and stage not in TRAINING and (stage, key) not in READ_ANYWAY
        if untrained and value != getattr(SETTINGS[group], name):
            yield no_effect(key, value, f"stage={stage}, which trains nothing")
        elif stage == "reward" and key.startswith("train.sample_") and value:
            yield no_effect(key, value, "stage=reward, which generates nothing")
        elif group in READERS and (why := unread(config, group)):
            yield no_effect(key, value, why)
        elif key in OF_TRAINING and value != OF_TRAINING[key] and stage not in TRAINING:
            yield no_effect(key, value, f"stage={stage}, which trains nothing")
        elif key.startswith(("model.revision", "model.architecture.")) and path:
            yield no_effect(key, value, f"model.path={path}")
        elif key == "model.lr_scale" and (path or not config.model.architecture):
            yield no_effect(key, value, "weights that are not random")


def _unadapted(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """The lora group and its keys, where nothing is adapted."""
    chosen, stage = config.lora.name, config.stage.name
    for key in (key for key in keys if key.partition(".")[0] == "lora" and key != "lora.name"):
        name = key.partition(".")[2]
        value = getattr(config.lora, name or "name")
        if chosen != "none" and stage not in TRAINING:
            yield no_effect(key, value, f"stage={stage}, which trains nothing")
        elif chosen == "none" and name and value != getattr(LoraConfig(), name):
            option = {"quantization": "qlora", "use_dora": "dora"}.get(name, "lora")
            yield (
                f"{key}={value}: has no effect with lora=none, which trains all weights; add "
                f"lora={option}"
            )


def _alone(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """Keys of the hardware that a stage in one process, or without a forward, does not read."""
    stage = f"stage={config.stage.name}"
    for key in keys if config.stage.name in ONE_PROCESS else ():
        value = value_at(config, key)
        if key in SHARING and value != getattr(HARDWARE, key.partition(".")[2]):
            yield no_effect(key, value, f"{stage}, which runs in one process")
        elif key == "hardware.precision" and stage == "stage=export" and value != "auto":
            yield no_effect(key, value, f"{stage}, whose dtype is stage.dtype")


def _trust(config: RunConfig, keys: Sequence[str]) -> list[str]:
    """Code from the hub runs only if the user typed so, not because a YAML file says it."""
    if not config.model.trust_remote_code or "model.trust_remote_code" in keys:
        return []
    return ["model.trust_remote_code=true: runs foreign code, so write it on the command line"]
