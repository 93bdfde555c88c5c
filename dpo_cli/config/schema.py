"""The keys of the groups that every run has, and the run as a whole.

`read.py` turns the YAML of `conf/` and the command line into a `RunConfig`; nothing below `run.py`
sees a DictConfig. Names carry their unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.config.datasets import DataConfig
from dpo_cli.config.keys import (
    HUGE,
    LOCAL,
    LOCAL_OR_HUB,
    above,
    at_least,
    heat,
    key,
    within,
)
from dpo_cli.config.rewards import JudgeConfig, RewardFnConfig
from dpo_cli.config.stages.base import StageConfig


@dataclass
class ArchitectureConfig:
    """A GPT-2 shaped model initialized from scratch."""

    layers: int = key(4, "transformer blocks", bound=at_least(1, 1000))
    hidden: int = key(128, "hidden size", bound=at_least(1, 65_536))
    heads: int = key(4, "attention heads; must divide hidden", bound=at_least(1, 1024))
    context: int = key(256, "context length in tokens", bound=at_least(8, 2**20))
    vocab: int = key(1024, "vocabulary size", bound=at_least(1, 2**22))


@dataclass
class ModelConfig:
    """Which weights to train. `path` takes precedence over `hub_id`."""

    name: str = key("custom", "name of the model in runs and reports")
    path: str | None = key(
        None, "folder of local weights, or of a finished run; takes precedence over model.hub_id",
        path=LOCAL,
    )  # fmt: skip
    hub_id: str | None = key(None, "owner/name on the hub")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    tokenizer: str | None = key(
        None, "folder or hub id; null: that of the weights", path=LOCAL_OR_HUB
    )
    architecture: ArchitectureConfig | None = key(
        None, "if set: random weights of this shape (see model=tiny)"
    )
    trust_remote_code: bool = key(
        False, "run code that ships with the weights; on the command line only", code=True
    )
    other_base: bool = key(
        False, "allow an adapter or a resumed run on a base whose weights have changed, with a note"
    )
    attention: str = key(
        "auto", "attention kernel for packs; auto: the fastest that agrees with the model",
        choices=("auto", "grouped", "varlen", "flex", "sdpa", "dense", "plain"),
    )  # fmt: skip
    dropout: float = key(
        0.0, "above 0, policy and reference differ at step 0 already", bound=within("[0, 1)")
    )
    lr_scale: float = key(
        1.0, "factor on the stage's default learning rate, for random weights", bound=above(0, 1e6)
    )


@dataclass
class LoraConfig:
    """Adapters (PEFT) and the quantization of the weights under them."""

    name: str = key(
        "none", "none: full fine-tuning; the other keys have no effect",
        choices=("none", "lora", "dora", "qlora", "int8"),
    )  # fmt: skip
    r: int = key(16, "rank of the update", bound=at_least(1, 65_536))
    alpha: float = key(
        32.0, "the update is scaled by alpha / r, with use_rslora by alpha / sqrt(r)",
        bound=above(0, 1e6),
    )  # fmt: skip
    dropout: float = key(0.0, "of the adapter's input, in training", bound=within("[0, 1)"))
    target_modules: list[str] = key(
        ["all-linear"], "layers with an adapter: [all-linear] (except the output layer), or names "
        "such as [q_proj, v_proj]",
    )  # fmt: skip
    use_rslora: bool = key(False, "scale by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = key(False, "learn the weights' magnitudes as well (DoRA)")
    modules_to_save: list[str] = key(
        [], "layers trained in full and saved with the adapter; always a reward model's score head"
    )
    quantization: str | None = key(
        None, "of the frozen weights: null | nf4 | int8; needs bitsandbytes",
        choices=("nf4", "int8"), old="quantisation",
    )  # fmt: skip
    lr_scale: float = key(
        10.0, "factor on the stage's default learning rate, which is for full fine-tuning",
        bound=above(0, 1e6),
    )  # fmt: skip


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    name: str = key("adamw", "optimizer", choices=("adamw", "rmsprop", "adamw8bit"))
    lr: float | None = key(
        None, "peak learning rate; null: stage.default_lr, times model.lr_scale (random weights) "
        "or lora.lr_scale (adapters)", bound=at_least(0, HUGE),
    )  # fmt: skip
    weight_decay: float = key(
        0.0, "of matrices; none on biases and norm scales", bound=at_least(0, 1e6)
    )
    betas: list[float] = key([0.9, 0.999], "of adamw and adamw8bit")
    alpha: float = key(0.99, "smoothing constant of rmsprop", bound=within("[0, 1)"))
    eps: float = key(1e-8, "added to the denominator of an update", bound=above(0, 1))
    schedule: str = key(
        "constant", "learning rate after a linear warm-up",
        choices=("constant", "cosine", "linear"),
    )  # fmt: skip
    warmup_steps: int | None = key(
        None, "steps of warm-up; null: optim.warmup_ratio of the run", bound=at_least(0)
    )
    warmup_ratio: float = key(0.1, "warm-up as a fraction of all steps", bound=within("[0, 1]"))
    max_grad_norm: float = key(
        10.0, "gradients are clipped to this norm; 0: no clipping", bound=within("[0, inf]")
    )


@dataclass
class TrainConfig:
    """The training loop: length, batch sizes, evaluation and checkpoints."""

    epochs: float = key(1.0, "passes over the data; may be a fraction", bound=above(0, 1e6))
    max_steps: int | None = key(
        None, "optimizer steps; takes precedence over train.epochs", bound=at_least(1)
    )
    batch_size: int = key(
        32, "examples per optimizer step, over all devices", bound=at_least(1, 10**6)
    )
    micro_batch_tokens: int | None = key(
        None,
        "packed tokens per forward pass; null: 4096, on a GPU by its memory",
        bound=at_least(1, 2**24),
    )
    eval_every_steps: int | None = key(
        None, "null: ten times per run; 0: only at the end", bound=at_least(0)
    )
    save_every_steps: int | None = key(None, "null: by time; 0: only at the end", bound=at_least(0))
    save_every_minutes: float | None = key(
        None, "if train.save_every_steps is null; null: 5, or longer if saving takes more than 2% "
        "of the time", bound=above(0, 10**6),
    )  # fmt: skip
    keep_checkpoints: int = key(2, "newest checkpoints kept, plus the best", bound=at_least(1))
    log_every_steps: int = key(1, "steps between lines of metrics.jsonl", bound=at_least(1))
    shuffle: bool = key(True, "shuffle the data in each epoch")
    router_aux_loss_coef: float = key(
        0.0, "weight of transformers' load-balancing loss of a mixture of experts in the training "
        "loss (sft, dpo, online-dpo, reward); eval/loss does not include it",
        bound=at_least(0, 1e6),
    )  # fmt: skip
    best_metric: str = key(
        "loss", "held-out metric that selects the best checkpoint; sft: also perplexity, dpo and "
        "reward: also rewards/accuracies, reward: also ece, ppo-baseline, online-dpo: also score",
    )  # fmt: skip
    sample_prompts: int = key(
        4, "held-out prompts completed at every evaluation; 0: none (never in stage=reward)",
        bound=at_least(0, 10**6),
    )  # fmt: skip
    sample_max_new_tokens: int = key(
        48, "maximum tokens of these completions", bound=at_least(1, 2**20)
    )
    sample_temperature: float = key(
        0.7, "temperature of these completions", bound=heat(greedy=False)
    )


@dataclass
class HardwareConfig:
    """Devices, precision and kernels."""

    name: str = key("auto", "name of the hardware in the plan")
    device: str = key("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    precision: str = key(
        "auto", "of computation; bf16: autocast over float32 master weights; auto: bf16 on a GPU",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    weights: str = key(
        "fp32", "dtype of trained weights; bf16: half the memory, but most small updates are lost "
        "to rounding", choices=("fp32", "bf16"),
    )  # fmt: skip
    activation_checkpointing: int = key(
        0, "blocks recomputed in the backward pass; 0: none, 1: all, k: every k-th",
        bound=at_least(0, 10**6),
    )  # fmt: skip
    devices: int = key(1, "devices per node, one process each", bound=at_least(1, 1024))
    nodes: int = key(1, "nodes of the run", bound=at_least(1, 65_536))
    sharding: str = key(
        "full", "of the weights: full (over all devices) | hybrid (within a node, replicated "
        "across nodes)", choices=("full", "hybrid"),
    )  # fmt: skip
    timeout_seconds: int = key(600, "timeout of collectives", bound=at_least(1, 10**6))
    memory_gb: float | None = key(
        None, "memory of one device, for dry_run; null: detected", bound=above(0, 1e6)
    )
    threads: int | None = key(
        None, "CPU threads of a process; null: PyTorch's choice", bound=at_least(1, 1024)
    )
    residual: str = key(
        "fp32", "hidden states between blocks in bf16 runs; bf16: less memory traffic in compiled "
        "blocks, more rounding", choices=("fp32", "bf16"),
    )  # fmt: skip
    kernels: str = key(
        "none", "fused norms, gated activations and rotary embeddings: none (PyTorch's) | liger",
        choices=("none", "liger"),
    )  # fmt: skip
    compile: str | bool = key(
        "none", "torch.compile in training: none | blocks (each block) | auto (blocks on CUDA if "
        "the run has 100 steps or more)", choices=("auto", "none", "blocks"),
    )  # fmt: skip


@dataclass
class LoggerConfig:
    """Metric sinks besides metrics.jsonl, and what is plotted and written at the end."""

    name: str = key("default", "name of this choice of sinks")
    progress: str = key(
        "auto", 'progress display; "off" in quotes, as a bare off is false in YAML',
        choices=("auto", "rich", "plain", "off"),
    )  # fmt: skip
    tensorboard: bool = key(True, "write TensorBoard events")
    plots: bool = key(True, "plot PNG curves")
    report: bool = key(True, "write report.html: the run on one self-contained page")
    wandb: bool = key(False, "log to Weights & Biases; needs dpo-run[wandb] and WANDB_API_KEY")
    wandb_project: str | None = key(
        None, "Weights & Biases project; null: $WANDB_PROJECT, else dpo-run"
    )


@dataclass
class RunConfig:
    """One run, fully resolved."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    stage: StageConfig
    reward_fn: RewardFnConfig
    judge: JudgeConfig
    optim: OptimConfig
    train: TrainConfig
    hardware: HardwareConfig
    logger: LoggerConfig
    seed: int = key(0, "of weights, data order, sampling", bound=at_least(0, 2**63 - 1))
    run_dir: str = key("", "output folder; empty: runs/<stage>-<model>-<data>-<time>-<id>")
    cache_dir: str = key(
        "", "reference log-probs and encoded data; empty: $DPO_RUN_CACHE or ~/.cache/dpo-run"
    )
    resume: bool = key(
        False, "continue run_dir from its newest checkpoint; easier: dpo-run resume=<run folder>"
    )
    dry_run: bool = key(False, "print the plan and stop; writes nothing")
