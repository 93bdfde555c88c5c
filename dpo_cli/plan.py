"""dry_run=true: what a run would do, from tokenizer, rows and model shape; no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_cli.checks import TRAINING, WITHOUT_DATA
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
)
from dpo_cli.config.endpoint import endpoint_from_environment
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.data.loader import plan_steps
from dpo_cli.logprobs import BLOCK_BYTES, CHUNK_BYTES
from dpo_cli.model.attention import Placement
from dpo_cli.model.classifier import classifier_config
from dpo_cli.model.load import (
    configured_context,
    count_parameters,
    count_trained,
    hf_config,
    load_tokenizer,
)
from dpo_cli.model.probe import refuse_unavailable
from dpo_cli.model.reward import check_kind
from dpo_cli.model.source import origin_of
from dpo_cli.records import EncodedExample
from dpo_cli.report.console import summary_table
from dpo_cli.stage_checks import unread, value_at
from dpo_cli.stages.policies import find_policies
from dpo_cli.stages.ppo_baseline import plan_rollouts, steps_of_rollout
from dpo_cli.stages.sample import distinct_prompts
from dpo_cli.train.runtime import MICRO_BATCH_TOKENS, Runtime, start_runtime

SCORER_KEY = "reward_fn.path"
OPTIMIZER_BYTES = {"adamw": 8, "rmsprop": 4, "adamw8bit": 2}  # of state, a weight
ACTIVATIONS_A_LAYER = 18  # hidden-width values kept for the backward, a token and layer


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of a training step. Attention scores are not counted."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def line(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(self).items())
        return f"about {self.total / 2**30:.2f} GiB: {parts}"


def print_plan(config: RunConfig) -> None:
    """Print the plan of a run. Reads the tokenizer and the rows, writes nothing but a cache."""
    console = Console()
    console.print(summary_table("plan", plan_rows(config)))


def plan_rows(config: RunConfig) -> list[tuple[str, object]]:
    """(name, value) lines of the plan."""
    runtime = start_runtime(config.hardware, config.seed)
    rows: list[tuple[str, object]] = [("stage", stage_line(config))]
    rows += scoring_rows(config)
    if isinstance(config.stage, FrontierConfig):
        rows += frontier_rows(config.stage)
    if config.stage.name in WITHOUT_DATA:
        return [*rows, ("writes", config.run_dir)]
    if isinstance(config.stage, EvaluateConfig) and config.stage.policies:
        points = find_policies(config, lambda line: rows.append(("", line)))
        rows.append(("policies", f"{len(points):,}, the first of them:"))
        config = replace(config, model=points[0].source)
    tokenizer = load_tokenizer(config.model)
    stage = config.stage
    reward = isinstance(stage, RewardConfig)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    half = runtime.precision == "bf16"
    on = Placement(runtime.device, torch.bfloat16 if half else torch.float32)
    refuse_unavailable(config.model.attention, on)
    if reward and (config.model.path or config.model.architecture is None):
        check_kind(hf_config(config.model, tokenizer), config.model)
    parameters = count_parameters(config.model, tokenizer, auto)
    made_of = f"{source_of(config)}, {parameters / 1e6:,.1f}M weights"
    rows.append(("reward model" if reward else "policy", made_of))
    if isinstance(stage, ExportConfig):
        rows.append(("export", f"{stage.dtype}, {stage.push_to_hub or 'not on the hub'}"))
        return [*rows, ("writes", config.run_dir)]
    if config.lora.name != "none" and stage.name in TRAINING:
        trained = count_trained(config.model, tokenizer, config.lora, auto)
        rows.append(("trained", adapter_line(config, trained, parameters)))
    if isinstance(stage, (DpoConfig, PpoConfig, EvaluateConfig)):
        rows.append(("reference", stage.reference or "the policy as loaded"))
    context = configured_context(config.model, tokenizer)
    splits = load_encoded(config.data, tokenizer, context, config.seed, Path(config.cache_dir))
    rows += data_rows(config, splits)
    if isinstance(stage, (SftConfig, DpoConfig, RewardConfig)):
        rows += training_rows(config, targets(config, splits.train), runtime, parameters, tokenizer)
    if isinstance(stage, PpoConfig):
        rows += rollout_rows(config, len(distinct_prompts(splits.train)))
    return [*rows, ("device", f"{runtime.device}, {runtime.precision}"), ("writes", config.run_dir)]


def adapter_line(config: RunConfig, trained: int, parameters: int) -> str:
    """`1,179,648 weights (LoRA r 16), 124.4M frozen in nf4`."""
    lora = config.lora
    own = f"{'DoRA' if lora.use_dora else 'LoRA'} r {lora.r}"
    made = "of its adapter" if origin_of(config.model).adapter else f"({own})"
    stored = f" in {lora.quantization}" if lora.quantization else ""
    return f"{trained:,} weights {made}, {parameters / 1e6:,.1f}M frozen{stored}"


def rollout_rows(config: RunConfig, prompts: int) -> list[tuple[str, object]]:
    stage = cast(PpoConfig, config.stage)
    plan, steps = plan_rollouts(config, prompts), steps_of_rollout(config)
    samples = f"{plan.steps:,} of {stage.rollout_samples:,} completions"
    kl = f"towards {stage.target_kl:g} nats" if stage.kl_control == "adaptive" else "fixed"
    return [
        ("rollouts", f"{samples}, of {prompts:,} distinct prompts"),
        ("steps", f"{plan.steps * steps:,}, {steps} after each rollout"),
        ("KL weight", f"{stage.kl_coef:g}, {kl}"),
    ]


def frontier_rows(stage: FrontierConfig) -> list[tuple[str, object]]:
    """The evaluations and their points. ConfigError where they cannot be drawn together."""
    from dpo_cli.stages import frontier  # matplotlib is slow to import

    folders = frontier.distinct_folders(stage.evaluations)
    frontier.refuse_mixed(folders)
    found = {folder: len(frontier.read_points(folder)) for folder in folders}
    rows: list[tuple[str, object]] = [
        ("evaluations", f"{len(found):,}, {sum(found.values()):,} points")
    ]
    return rows + [("", f"{folder}: {points:,}") for folder, points in found.items()]


def scoring_rows(config: RunConfig) -> list[tuple[str, object]]:
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
    rows: list[tuple[str, object]] = [("reward", named)]
    return rows + (evaluation_rows(config, stage) if isinstance(stage, EvaluateConfig) else [])


def evaluation_rows(config: RunConfig, stage: EvaluateConfig) -> list[tuple[str, object]]:
    """What each policy writes, and what a judge is asked."""
    rows: list[tuple[str, object]] = [
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


def data_rows(config: RunConfig, splits: EncodedSplits) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("data", splits.origin),
        ("rows", f"{len(splits.train):,} to train on, {len(splits.eval):,} held out"),
    ]
    return rows + [("", line) for line in splits.drops.summary_lines()]


def targets(config: RunConfig, examples: list[EncodedExample]) -> list[EncodedExample]:
    """What the stage trains on: SFT takes the best response alone."""
    if config.stage.name != "sft":
        return examples
    return [replace(e, response_ids=e.response_ids[:1]) for e in examples]


def training_rows(
    config: RunConfig,
    examples: Sequence[EncodedExample],
    runtime: Runtime,
    parameters: int,
    tokenizer: object,
) -> list[tuple[str, object]]:
    train, optim = config.train, config.optim
    plan = plan_steps(
        len(examples), train.batch_size, train.epochs, train.max_steps, train.shuffle, config.seed
    )
    tokens = sum(e.packed_tokens for e in examples)
    per_step = tokens / len(examples) * plan.batch_size
    budget = train.micro_batch_tokens or MICRO_BATCH_TOKENS[runtime.device.type]
    memory = estimate(config, runtime, parameters, min(budget, int(per_step)), tokenizer)
    return [
        ("steps", f"{plan.steps:,} of {plan.batch_size} examples{plan.left_out(train.epochs)}"),
        ("tokens", f"{per_step:,.0f} a step, {per_step * plan.steps:,.0f} in all (packed)"),
        ("optimiser", f"{optim.name}, lr {optim.lr:g}, {optim.schedule} after warm-up"),
        ("memory", memory.line()),
    ]


def estimate(
    config: RunConfig, runtime: Runtime, parameters: int, tokens: int, tokenizer: object
) -> Memory:
    """Bytes of a step of float32 weights over a micro-batch of `tokens` packed tokens."""
    shape = hf_config(config.model, tokenizer).get_text_config()  # type: ignore[arg-type]
    width, layers = int(shape.hidden_size), int(shape.num_hidden_layers)
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=OPTIMIZER_BYTES[config.optim.name] * parameters,
        activations=4 * ACTIVATIONS_A_LAYER * width * layers * tokens,
        logits=0 if config.stage.name == "reward" else head_bytes(runtime.device.type),
    )


def head_bytes(device: str) -> int:
    """What `fused_loss` holds: a chunk's slopes, and a block's logits and their softmax while
    the next one's logits are made."""
    return CHUNK_BYTES[device] + 3 * BLOCK_BYTES[device]
