"""StageSpec: what configuration, plan and reports need to know of a stage; free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_cli.config.keys import LOCAL_OR_HUB, at_least, key

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass
class StageConfig:
    """Keys of every stage."""

    name: str = key("sft", "which stage")
    default_lr: float = key(
        0.0, "of full fine-tuning of pretrained weights; optim.lr takes precedence",
        bound=at_least(0, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class StageSpec:
    """One stage: its keys, what it reads and does, and its titles in reports.

    `dpo_cli/stages/<name>.py` holds its `run(session)` and its `plan(preview)`.
    """

    schema: type[StageConfig]
    title: str  # of the report page of such a run
    method: str = ""  # "The model is the result of ..." on a model card; "": the title
    trains: bool = False  # it has an optimizer, checkpoints and a model to save
    reward_head: bool = False  # its model has a score head instead of an output layer
    reference: Callable[[Any], bool] = lambda stage: False  # it holds a frozen reference
    reads_model: bool = True
    reads_rows: bool = True
    paired: bool = False  # it compares responses to one prompt
    takes_labels: bool = False  # it accepts rows with data.label_field, desirable or not
    reads: tuple[str, ...] = ()  # which of the groups reward_fn and judge
    reward_optional: bool = False  # reward_fn=none is the default on data without a ground truth
    parallel: bool = True  # it can run on several devices
    reported: bool = False  # a run writes report.html
    keeps_folder: bool = True  # a run writes results to its folder
    unit: str = "example"  # name of a training row
    best_metrics: Mapping[str, str] = field(default_factory=dict)  # name -> lowest | highest
    cpu_batch_size: int | None = None  # default sequences decoded together on a CPU
    problems: Callable[[RunConfig], Iterator[str]] = lambda config: iter(())  # of its keys


def new_tokens_key() -> Any:
    return key(
        None, "tokens per completion; null: the 95th percentile of the data's responses",
        bound=at_least(1, 2**20),
    )  # fmt: skip


def decoded_together_key(cpu: int) -> Any:
    """cpu: the stage's `cpu_batch_size`."""
    return key(
        None, f"sequences decoded together; null: {cpu} on a CPU, up to 512 on a GPU as memory "
        "allows",
        bound=at_least(1, 65_536),
    )  # fmt: skip


def frozen_reference_key() -> Any:
    return key(
        None, "folder or hub id of the frozen reference; null: the policy as loaded",
        path=LOCAL_OR_HUB,
    )  # fmt: skip


def no_effect(name: str, value: Any, chosen: str) -> str:
    return f"{name}={value}: has no effect with {chosen}; remove it"


def changed(stage: StageConfig, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of the keys whose values differ from the defaults."""
    defaults = type(stage)()
    for name in names:
        value = getattr(stage, name)
        if value != getattr(defaults, name):
            yield f"stage.{name}", value


def bad_temperatures(name: str, values: Sequence[float]) -> Iterator[str]:
    if not values:
        yield f"{name}=[]: must be one or more numbers of at least 0 (0 is greedy)"
