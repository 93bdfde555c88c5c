"""dry_run=true: what a run would do, from tokenizer, rows and model shape; no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from dpo_cli.config import (
    ClassifierRewardFn,
    DpoConfig,
    EvaluateConfig,
    ExportConfig,
    FrontierConfig,
    HttpJudgeConfig,
    ModelConfig,
    PpoConfig,
    RewardConfig,
    RewardModelFn,
    RunConfig,
    SftConfig,
    spec_of,
)
from dpo_cli.config.endpoint import endpoint_from_environment
from dpo_cli.config.run_data import data_line
from dpo_cli.config.unread import unread, value_at
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.evaluation.policies import PolicyPoint, find_policies, reference_of
from dpo_cli.model.attention.probe import refuse_unavailable
from dpo_cli.model.attention.registered import Placement
from dpo_cli.model.classifier import classifier_config
from dpo_cli.model.load import (
    configured_context,
    count_trained,
    hf_config,
    load_tokenizer,
)
from dpo_cli.model.reward import check_kind
from dpo_cli.model.routers import loss_function
from dpo_cli.plan.lengths import SCORER_KEY, facts_of, planned_runtime, steps_of, targets
from dpo_cli.plan.memory.budget import fitting, is_open, with_tokens
from dpo_cli.plan.memory.facts import (
    Lengths,
    capacity,
    lengths_of,
)
from dpo_cli.plan.memory.shape import Shape, shape_of
from dpo_cli.plan.memory.table import Row, copy_rows, memory_rows
from dpo_cli.report.table import summary_table
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.rows import trained_line
from dpo_cli.session.trained import held_out_line
from dpo_cli.stages.ppo_baseline import plan_rollouts, steps_of_rollout
from dpo_cli.train.runtime import Runtime

NO_REFERENCE = "none: the KL is not measured (stage.reference)"


def print_plan(config: RunConfig) -> None:
    """Print the plan of a run. Reads the tokenizer and the rows, writes nothing but a cache."""
    console = Console()
    rows, memory = plan_tables(config)
    console.print(summary_table("plan", rows))
    if memory:
        console.print(summary_table("memory, estimated", memory))


def plan_rows(config: RunConfig) -> list[Row]:
    """(name, value) lines of the plan, without those on memory."""
    return plan_tables(config)[0]


def plan_tables(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """(name, value) lines of the plan, and those on memory."""
    runtime = planned_runtime(config.hardware, config.seed)
    rows: list[Row] = [("stage", stage_line(config))]
    rows += scoring_rows(config)
    if isinstance(config.stage, FrontierConfig):
        rows += frontier_rows(config.stage)
    if not spec_of(config.stage).reads_model:
        return [*rows, ("writes", config.run_dir)], []
    points, told = planned_policies(config)
    if points and value_at(config, "stage.policies"):
        config = replace(config, model=points[0].source)
    rows += told
    tokenizer = load_tokenizer(config.model)
    stage = config.stage
    reward = isinstance(stage, RewardConfig)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    half = runtime.precision == "bf16"
    on = Placement(runtime.device, torch.bfloat16 if half else torch.float32)
    refuse_unavailable(config.model.attention, on)
    found = hf_config(config.model, tokenizer)
    refuse_family(config, found, auto)
    shape = shape_of(found, auto)
    made_of = f"{source_of(config)}, {shape.parameters / 1e6:,.1f}M weights"
    rows.append(("reward model" if reward else "policy", made_of))
    if isinstance(stage, ExportConfig):
        return [*rows, export_row(stage), ("writes", config.run_dir)], []
    if config.lora.name != "none" and spec_of(stage).trains:
        trained = count_trained(config.model, tokenizer, config.lora, auto)
        rows.append(("trained", trained_line(config, trained, shape.parameters)))
    rows += reference_rows(config, points)
    context = configured_context(config.model, tokenizer)
    splits = load_encoded(config.data, tokenizer, context, config.seed, Path(config.cache_dir))
    line = held_out_line(config, splits) if spec_of(stage).trains else None
    rows += data_rows(config, splits)
    rows += [("", line)] if line else []
    if isinstance(stage, (SftConfig, DpoConfig, RewardConfig)):
        rows += training_rows(config, lengths_of(targets(config, splits.train)))
    if isinstance(stage, PpoConfig):
        rows += rollout_rows(config, len(distinct_prompts(splits.train)))
    memory = planned_memory(config, runtime, shape, splits)
    rows += [("device", device_line(config, runtime)), ("writes", config.run_dir)]
    return rows, memory


def refuse_family(config: RunConfig, found: PretrainedConfig, auto: Any) -> None:
    """ConfigError for one that the stage cannot train, where its class is known."""
    scratch = config.model.path is None and config.model.architecture is not None
    if isinstance(config.stage, RewardConfig) and not scratch:
        check_kind(found, config.model)
    coefficient = config.train.router_aux_loss_coef
    if coefficient and type(found) in auto._model_mapping:
        loss_function(auto._model_mapping[type(found)], coefficient)


def planned_policies(config: RunConfig) -> tuple[list[PolicyPoint], list[Row]]:
    """What an evaluation is of; nothing for other stages."""
    if not isinstance(config.stage, EvaluateConfig):
        return [], []
    rows: list[Row] = []
    points = find_policies(config, lambda line: rows.append(("", line)))
    if config.stage.policies:
        rows.append(("policies", f"{len(points):,}, the first of them:"))
    return points, rows


def reference_rows(config: RunConfig, points: Sequence[PolicyPoint]) -> list[Row]:
    """The reference that the run will use; of an evaluation, how its data is that of the policy."""
    stage = config.stage
    if isinstance(stage, EvaluateConfig):
        line = data_line(config)
        reference = reference_of(stage, points) or NO_REFERENCE
        return [("reference", reference), *([("", line)] if line else [])]
    if not isinstance(stage, (DpoConfig, PpoConfig)):
        return []
    return [("reference", stage.reference or "the policy as loaded")]


def device_line(config: RunConfig, runtime: Runtime) -> str:
    """`16 devices on 2 nodes, sharded; cuda, bf16`."""
    hardware, where = config.hardware, f"{runtime.device}, {runtime.precision}"
    count = hardware.devices * hardware.nodes
    if count == 1 or not spec_of(config.stage).parallel:
        return where
    nodes = f" on {hardware.nodes} nodes" * (hardware.nodes > 1)
    copies = " within a node, copied across nodes" * (hardware.sharding == "hybrid")
    return f"{count} devices{nodes}, sharded{copies}; {where}"


def planned_memory(
    config: RunConfig, runtime: Runtime, shape: Shape, splits: EncodedSplits
) -> list[Row]:
    facts = facts_of(config, runtime, shape, splits)
    if facts is None:
        return []
    there = capacity(config.hardware, facts.device)
    if there is None or not is_open(config, facts.device):
        return [*memory_rows(config, facts, there), *copy_rows(config, facts)]
    chosen = fitting(config, facts, there)
    rows = memory_rows(with_tokens(config, chosen.tokens), facts, there)
    return [("micro-batches", str(chosen)), *rows, *copy_rows(config, facts)]


def export_row(stage: ExportConfig) -> Row:
    dtype = "as the base is stored" if stage.dtype == "auto" else stage.dtype
    return "export", f"{dtype}, {stage.push_to_hub or 'not on the hub'}"


def rollout_rows(config: RunConfig, prompts: int) -> list[Row]:
    stage = cast(PpoConfig, config.stage)
    plan, steps = plan_rollouts(config, prompts), steps_of_rollout(config)
    samples = f"{plan.steps:,} of {stage.rollout_samples:,} completions"
    kl = f"towards {stage.target_kl:g} nats" if stage.kl_control == "adaptive" else "fixed"
    return [
        ("rollouts", f"{samples}, of {prompts:,} distinct prompts"),
        ("steps", f"{plan.steps * steps:,}, {steps} after each rollout"),
        ("KL weight", f"{stage.kl_coef:g}, {kl}"),
    ]


def frontier_rows(stage: FrontierConfig) -> list[Row]:
    """The evaluations and their points. ConfigError where they cannot be drawn together."""
    from dpo_cli.stages import frontier  # matplotlib is slow to import

    folders = frontier.distinct_folders(stage.evaluations)
    frontier.refuse_mixed(folders)
    found = {folder: len(frontier.read_points(folder)) for folder in folders}
    rows: list[Row] = [("evaluations", f"{len(found):,}, {sum(found.values()):,} points")]
    return rows + [("", f"{folder}: {points:,}") for folder, points in found.items()]


def scoring_rows(config: RunConfig) -> list[Row]:
    """What rates completions, and what compares them. ConfigError for a model that cannot."""
    stage, reward = config.stage, config.reward_fn
    if unread(config, "reward_fn"):
        return []
    named = reward.name
    if isinstance(reward, (RewardModelFn, ClassifierRewardFn)):
        named += f", {reward.path or value_at(config, 'reward_fn.hub_id')}"
        if reward.path is not None:
            source = ModelConfig(path=reward.path)
            classifier_config(source, load_tokenizer(source, SCORER_KEY), SCORER_KEY)
    rows: list[Row] = [("reward", named)]
    return rows + (evaluation_rows(config, stage) if isinstance(stage, EvaluateConfig) else [])


def evaluation_rows(config: RunConfig, stage: EvaluateConfig) -> list[Row]:
    """What each policy writes, and what a judge is asked."""
    rows: list[Row] = [
        ("samples", f"up to {stage.prompts:,} prompts x {stage.completions:,} of a policy")
    ]
    if stage.reference_samples:
        rows.append(("", f"{stage.reference_samples:,} a prompt of the reference"))
    if stage.opponent is None:
        return rows
    rows.append(("win rates", f"against {stage.opponent}, by judge={config.judge.name}"))
    if isinstance(config.judge, HttpJudgeConfig):
        asked = stage.prompts * len(stage.win_temperatures) * (1 + config.judge.both_orders)
        server = f"{config.judge.model} at {endpoint_from_environment().host}"
        most = f"at most {config.judge.max_calls:,} in all"
        rows.append(("", f"{server}: up to {asked:,} requests a policy, {most}"))
    return rows


def stage_line(config: RunConfig) -> str:
    stage = config.stage
    if isinstance(stage, DpoConfig):
        return f"dpo, loss {stage.loss}, beta {stage.beta:g}"
    return stage.name


def source_of(config: RunConfig) -> str:
    model = config.model
    if model.path:
        return model.path
    if model.architecture is not None:
        return f"{model.name} (random weights)"
    return f"{model.hub_id} (from the hub)"


def data_rows(config: RunConfig, splits: EncodedSplits) -> list[Row]:
    rows: list[Row] = [
        ("data", splits.origin),
        ("rows", f"{len(splits.train):,} to train on, {len(splits.eval):,} held out"),
    ]
    return rows + [("", line) for line in splits.drops.summary_lines()]


def training_rows(config: RunConfig, lengths: Sequence[Lengths]) -> list[Row]:
    plan, optim = steps_of(config, len(lengths)), config.optim
    tokens = sum(prompt + sum(responses) for prompt, responses in lengths)
    per_step = tokens / len(lengths) * plan.batch_size
    examples = f"{plan.batch_size} examples{plan.left_out(config.train.epochs)}"
    return [
        ("steps", f"{plan.steps:,} of {examples}"),
        ("tokens", f"{per_step:,.0f} a step, {per_step * plan.steps:,.0f} in all (packed)"),
        ("optimiser", f"{optim.name}, lr {optim.lr:g}, {optim.schedule} after warm-up"),
    ]
