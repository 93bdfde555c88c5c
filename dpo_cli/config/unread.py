"""Keys that a run does not read: those of the command line are refused, as whoever wrote them
expects an effect. Those of YAML files may be there for another stage or other weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dpo_cli.config import (
    HardwareConfig,
    LoraConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    spec_of,
)
from dpo_cli.config.keys import facts
from dpo_cli.config.stages.base import no_effect

CHOSEN_BY_STAGE = ("reward_fn", "judge")  # groups that only some stages read
SETTINGS = {"optim": OptimConfig(), "train": TrainConfig()}  # of training
PACKING = "train.micro_batch_tokens"  # read by stages that score rows without training, too
HARDWARE = HardwareConfig()
OF_TRAINING = {  # keys of the hardware that stages without training do not read
    f"hardware.{name}": getattr(HARDWARE, name)
    for name in ("compile", "kernels", "residual", "weights", "activation_checkpointing")
}
SHARING = ("hardware.devices", "hardware.nodes", "hardware.sharding")


def value_at(config: RunConfig, key: str) -> Any:
    """The value at a dotted key; None where the chosen options have no such key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name, None)
    return node


def unread(config: RunConfig, group: str) -> str | None:
    """Why the run does not read a group of CHOSEN_BY_STAGE, as key=value; None where it does."""
    stage = config.stage
    if group not in spec_of(stage).reads:
        return f"stage={stage.name}"
    by = getattr(stage, "by", "reward_fn")
    return f"stage.by={by}" if group == "reward_fn" and by != "reward_fn" else None


def unread_problems(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """keys: what the user typed, sorted."""
    for part in (_without_effect, _unadapted, _alone, _trust):
        yield from part(config, keys)


def _without_effect(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """Keys that neither the stage nor the weights read."""
    stage, path = config.stage.name, config.model.path
    spec = spec_of(config.stage)
    trains = spec.trains
    for key in keys:
        group, _, name = key.partition(".")
        value = value_at(config, key)
        if group in CHOSEN_BY_STAGE and not name and (why := unread(config, group)):
            yield no_effect(group, value.name, why)
        if value is None or not name:  # not a key's word but an option's, such as optim=adamw
            continue
        untrained = group in SETTINGS and not trains and not (spec.reads and key == PACKING)
        if untrained and value != getattr(SETTINGS[group], name):
            yield no_effect(key, value, f"stage={stage}, which trains nothing")
        elif spec.reward_head and key.startswith("train.sample_") and value:
            yield no_effect(key, value, f"stage={stage}, which generates nothing")
        elif group in CHOSEN_BY_STAGE and (why := unread(config, group)):
            yield no_effect(key, value, why)
        elif key in OF_TRAINING and value != OF_TRAINING[key] and not trains:
            yield no_effect(key, value, f"stage={stage}, which trains nothing")
        elif key.startswith(("model.revision", "model.architecture.")) and path:
            yield no_effect(key, value, f"model.path={path}")
        elif key == "model.lr_scale" and (path or not config.model.architecture):
            yield no_effect(key, value, "weights that are not random")


def _unadapted(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """The lora group and its keys, where nothing is adapted."""
    chosen, stage = config.lora.name, config.stage.name
    trains = spec_of(config.stage).trains
    for key in (key for key in keys if key.partition(".")[0] == "lora" and key != "lora.name"):
        name = key.partition(".")[2]
        value = getattr(config.lora, name or "name")
        if chosen != "none" and not trains:
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
    for key in keys if not spec_of(config.stage).parallel else ():
        value = value_at(config, key)
        if key in SHARING and value != getattr(HARDWARE, key.partition(".")[2]):
            yield no_effect(key, value, f"{stage}, which runs in one process")
        elif key == "hardware.precision" and hasattr(config.stage, "dtype") and value != "auto":
            yield no_effect(key, value, f"{stage}, whose dtype is stage.dtype")


def _trust(config: RunConfig, keys: Sequence[str]) -> list[str]:
    """Foreign code runs only if the user typed so, not because a YAML file says it."""
    return [
        f"{key}={'true' if value is True else value}: runs foreign code, so write it on the "
        "command line"
        for key, value, fact in facts(config)
        if fact.code and value and key not in keys
    ]
