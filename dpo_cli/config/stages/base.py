"""What a stage is, as far as configuration, plan and reports need to know; free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_cli.config.keys import LOCAL_OR_HUB, at_least, key

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig


@dataclass
class StageConfig:
    """Keys every stage has."""

    name: str = key("sft", "which stage")
    default_lr: float = key(
        0.0, "of full fine-tuning of pretrained weights; optim.lr takes precedence",
        bound=at_least(0, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class StageSpec:
    """One stage: its keys, what it reads and does, and what pages call it.

    `dpo_cli/stages/<name>.py` holds its `run(session)` and its `plan(preview)`.
    """

    schema: type[StageConfig]
    title: str  # of a page on such a run
    method: str = ""  # "The model is the result of ..." on a model card; "": the title
    trains: bool = False  # it has an optimizer, checkpoints and a model to save
    reward_head: bool = False  # its model ends in a score instead of an output layer
    reference: Callable[[Any], bool] = lambda stage: False  # it holds a frozen reference
    reads_model: bool = True
    reads_rows: bool = True
    paired: bool = False  # it compares responses to one prompt
    takes_labels: bool = False  # rows whose response may be undesirable do not mislead it
    reads: tuple[str, ...] = ()  # of the groups reward_fn and judge
    reward_optional: bool = False  # reward_fn=none is the default on data without a ground truth
    parallel: bool = True  # it can run on several devices
    reported: bool = False  # a run writes report.html
    keeps_folder: bool = True  # a run leaves something to look at later
    unit: str = "example"  # what a row is called where it trains
    best_metrics: Mapping[str, str] = field(default_factory=dict)  # name -> lowest | highest
    cpu_batch_size: int | None = None  # sequences decoded together on a CPU, where it is null
    problems: Callable[[RunConfig], Iterator[str]] = lambda config: iter(())  # of its own keys


def new_tokens_key() -> Any:
    return key(
        None, "tokens per completion; null: the 95th percentile of the data's responses",
        bound=at_least(1, 2**20),
    )  # fmt: skip


def decoded_together_key(cpu: int) -> Any:
    """cpu: the stage's `cpu_batch_size`."""
    return key(
        None, f"sequences decoded together; null: {cpu} on a CPU, on a GPU what fits, at most 512",
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
    """(key, value) of those keys that are not at their defaults."""
    defaults = type(stage)()
    for name in names:
        value = getattr(stage, name)
        if value != getattr(defaults, name):
            yield f"stage.{name}", value


def bad_temperatures(name: str, values: Sequence[float]) -> Iterator[str]:
    if not values:
        yield f"{name}=[]: must be numbers of at least 0 (0 is greedy), one or more"
