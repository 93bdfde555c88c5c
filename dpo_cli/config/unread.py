"""Keys that a run does not read are rejected on the command line, where the user expects an
effect. YAML files may set them for another stage or other weights.
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
from dpo_cli.config.datasets import row_terms
from dpo_cli.config.keys import facts
from dpo_cli.config.stages.base import no_effect

CHOSEN_BY_STAGE = ("reward_fn", "judge")  # groups that only some stages read
SETTINGS = {"optim": OptimConfig(), "train": TrainConfig()}  # of training
PACKING = "train.micro_batch_tokens"  # also read by stages that score rows without training
HARDWARE = HardwareConfig()
OF_TRAINING = {  # hardware keys that stages without training do not read
    f"hardware.{name}": getattr(HARDWARE, name)
    for name in ("compile", "kernels", "residual", "weights", "activation_checkpointing")
}
SHARING = ("hardware.devices", "hardware.nodes", "hardware.sharding")


def value_at(config: RunConfig, key: str) -> Any:
    """The value at a dotted key; None if the chosen options have no such key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name, None)
    return node


def unread(config: RunConfig, group: str) -> str | None:
    """The key=value because of which the run does not read a group of CHOSEN_BY_STAGE, or None."""
    stage = config.stage
    if group not in spec_of(stage).reads:
        return f"stage={stage.name}"
    by = getattr(stage, "by", group)
    return None if by == group else f"stage.by={by}"


def unread_problems(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """Problems of keys that the run does not read. keys: those of the command line, sorted."""
    for part in (_without_effect, _unadapted, _single_process, _row_terms, _trust):
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
        if value is None or not name:  # a choice of an option, such as optim=adamw
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
    """The lora group and its keys, in a run without an adapter."""
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


def _single_process(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """Hardware keys that a single-process stage, or one without a forward, does not read."""
    stage = f"stage={config.stage.name}"
    for key in keys if not spec_of(config.stage).parallel else ():
        value = value_at(config, key)
        if key in SHARING and value != getattr(HARDWARE, key.partition(".")[2]):
            yield no_effect(key, value, f"{stage}, which runs in one process")
        elif key == "hardware.precision" and hasattr(config.stage, "dtype") and value != "auto":
            yield no_effect(key, value, f"{stage}, whose dtype is stage.dtype")


def _row_terms(config: RunConfig, keys: Sequence[str]) -> Iterator[str]:
    """The rows' numbers for their loss, where another stage trains on them."""
    stage = config.stage.name
    for name, column in row_terms(config.data).items():
        if f"data.{name}_field" in keys and stage != "dpo" and spec_of(config.stage).trains:
            yield no_effect(f"data.{name}_field", column, f"stage={stage}")


def _trust(config: RunConfig, keys: Sequence[str]) -> list[str]:
    """Keys that run foreign code must be on the command line, not only in a YAML file."""
    return [
        f"{key}={'true' if value is True else value}: runs foreign code; set it on the command line"
        for key, value, fact in facts(config)
        if fact.code and value and key not in keys
    ]
