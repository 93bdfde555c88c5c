"""A dry run's counterpart of the session: configuration, tokenizer and rows, without weights; and
the lines of the plan shared by several stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_cli.config import ModelConfig, RunConfig, spec_of
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.attention.probe import refuse_unavailable
from dpo_cli.model.load import (
    configured_context,
    count_parameters,
    count_trained,
    hf_config,
    load_tokenizer,
)
from dpo_cli.model.reward import check_kind
from dpo_cli.model.routers import loss_function
from dpo_cli.records import EncodedExample
from dpo_cli.session.rows import steps_of, trained_line
from dpo_cli.session.trained import held_out_line
from dpo_cli.train.runtime import Runtime

Row = tuple[str, object]  # name and value of a line of the plan; no name: continues the last line


@dataclass
class Preview:
    """A run without its weights. runtime: the device and precision it will use."""

    config: RunConfig
    runtime: Runtime

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.config.model)

    @cached_property
    def splits(self) -> EncodedSplits:
        config, context = self.config, configured_context(self.config.model, self.tokenizer)
        cache = Path(config.cache_dir)
        return load_encoded(config.data, self.tokenizer, context, config.seed, cache)

    @cached_property
    def weights(self) -> int:
        return count_parameters(self.config.model, self.tokenizer, self.auto)

    @property
    def auto(self) -> Any:
        """transformers' class of the stage's model."""
        head = spec_of(self.config.stage).reward_head
        return AutoModelForSequenceClassification if head else AutoModelForCausalLM

    def use(self, model: ModelConfig) -> None:
        """Plan for another model than the configuration's."""
        self.config = replace(self.config, model=model)


def model_rows(preview: Preview) -> Iterator[Row]:
    """Source and size of the model. ConfigError for one that cannot run here."""
    config, runtime = preview.config, preview.runtime
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    refuse_unavailable(config.model.attention, Placement(runtime.device, dtype))
    name = "reward model" if spec_of(config.stage).reward_head else "policy"
    yield name, f"{source_of(config.model)}, {preview.weights / 1e6:,.1f}M weights"


def source_of(model: ModelConfig) -> str:
    if model.path:
        return model.path
    if model.architecture is not None:
        return f"{model.name} (random weights)"
    return f"{model.hub_id} (from the hub)"


def trained_model_rows(preview: Preview) -> Iterator[Row]:
    """`model_rows`, and the number of weights that an adapter trains. ConfigError for a model that
    the stage cannot train."""
    config = preview.config
    refuse_family(preview)
    yield from model_rows(preview)
    if config.lora.name != "none":
        trained = count_trained(config.model, preview.tokenizer, config.lora, preview.auto)
        yield "trained", trained_line(config, trained, preview.weights)


def refuse_family(preview: Preview) -> None:
    """ConfigError for a model family that the stage cannot train, by its class."""
    config, auto = preview.config, preview.auto
    hf = hf_config(config.model, preview.tokenizer)
    scratch = config.model.path is None and config.model.architecture is not None
    if spec_of(config.stage).reward_head and not scratch:
        check_kind(hf, config.model)
    coefficient = config.train.router_aux_loss_coef
    if coefficient and type(hf) in auto._model_mapping:
        loss_function(auto._model_mapping[type(hf)], coefficient)


def reference_row(path: str | None) -> Row:
    """The line of a stage that trains against a reference."""
    return "reference", path or "the policy as loaded"


def data_rows(preview: Preview) -> Iterator[Row]:
    """Where the rows come from, how many there are, and what was dropped."""
    config, splits = preview.config, preview.splits
    held_out = held_out_line(config, splits) if spec_of(config.stage).trains else None
    yield "data", splits.origin
    yield "rows", f"{len(splits.train):,} to train on, {len(splits.eval):,} held out"
    for line in (*splits.drops.reading, *splits.drops.summary_lines()):
        yield "", line
    if held_out is not None:
        yield "", held_out


def step_rows(config: RunConfig, examples: Sequence[EncodedExample]) -> Iterator[Row]:
    """Lines of a stage whose steps use the rows as examples."""
    plan, optim = steps_of(config, len(examples)), config.optim
    per_step = sum(e.packed_tokens for e in examples) / len(examples) * plan.batch_size
    count = f"{plan.batch_size} examples{plan.left_out(config.train.epochs)}"
    yield "steps", f"{plan.steps:,} of {count}"
    yield "tokens", f"{per_step:,.0f} per step, {per_step * plan.steps:,.0f} in total (packed)"
    yield "optimizer", f"{optim.name}, lr {optim.lr:g}, {optim.schedule} after warm-up"


def device_row(preview: Preview) -> Row:
    return "device", device_line(preview.config, preview.runtime)


def device_line(config: RunConfig, runtime: Runtime) -> str:
    """`16 devices on 2 nodes, sharded; cuda, bf16`."""
    hardware, where = config.hardware, f"{runtime.device}, {runtime.precision}"
    count = hardware.devices * hardware.nodes
    if count == 1 or not spec_of(config.stage).parallel:
        return where
    nodes = f" on {hardware.nodes} nodes" * (hardware.nodes > 1)
    replicated = " within a node, replicated across nodes" * (hardware.sharding == "hybrid")
    return f"{count} devices{nodes}, sharded{replicated}; {where}"
