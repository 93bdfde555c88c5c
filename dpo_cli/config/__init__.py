"""The schema: every key a user can set, its type, default and meaning.

`compose.py` turns the YAML of `conf/` and the command line into a `RunConfig`;
nothing below `run.py` sees a DictConfig. Names carry their unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dpo_cli.config.datasets import (
    DATA_SCHEMAS,
    DataConfig,
    HhDataConfig,
    ImdbDataConfig,
    JsonlDataConfig,
    SeDataConfig,
    SentimentDataConfig,
    ShpDataConfig,
    TldrDataConfig,
    UltrafeedbackDataConfig,
)
from dpo_cli.config.rewards import (
    JUDGE_SCHEMAS,
    REWARD_FN_SCHEMAS,
    ClassifierRewardFn,
    HttpJudgeConfig,
    JudgeConfig,
    LengthRewardFn,
    LexiconRewardFn,
    NoRewardFn,
    RewardFnConfig,
    RewardModelFn,
    SentimentRewardFn,
)
from dpo_cli.config.stages import (
    CPU_BATCH_SIZE,
    LOSS_OPTIONS,
    STAGE_SCHEMAS,
    DpoConfig,
    EvaluateConfig,
    ExportConfig,
    FrontierConfig,
    InspectConfig,
    LabelConfig,
    PpoConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
    StageConfig,
)

__all__ = [
    "BEST_METRICS",
    "CHOICES",
    "CPU_BATCH_SIZE",
    "DATA_SCHEMAS",
    "JUDGE_SCHEMAS",
    "LOSS_OPTIONS",
    "REWARD_FN_SCHEMAS",
    "STAGE_SCHEMAS",
    "ArchitectureConfig",
    "ClassifierRewardFn",
    "DataConfig",
    "DpoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FrontierConfig",
    "HardwareConfig",
    "HhDataConfig",
    "HttpJudgeConfig",
    "ImdbDataConfig",
    "InspectConfig",
    "JsonlDataConfig",
    "JudgeConfig",
    "LabelConfig",
    "LengthRewardFn",
    "LexiconRewardFn",
    "LoggerConfig",
    "LoraConfig",
    "ModelConfig",
    "NoRewardFn",
    "OptimConfig",
    "PpoConfig",
    "RewardConfig",
    "RewardFnConfig",
    "RewardModelFn",
    "RunConfig",
    "SampleConfig",
    "SeDataConfig",
    "SentimentDataConfig",
    "SentimentRewardFn",
    "SftConfig",
    "ShpDataConfig",
    "StageConfig",
    "TldrDataConfig",
    "TrainConfig",
    "UltrafeedbackDataConfig",
]


@dataclass
class ArchitectureConfig:
    """A GPT-2 shaped model initialised from scratch."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    context: int = 256
    vocab: int = 1024


@dataclass
class ModelConfig:
    """Which weights to train. `path` (a local folder or a run folder) wins over `hub_id`."""

    name: str = "custom"
    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    tokenizer: str | None = None  # local folder or hub id; default: beside the weights
    architecture: ArchitectureConfig | None = None  # set: random weights of this shape
    trust_remote_code: bool = False
    attention: str = "auto"  # auto | a kernel of model/layouts.LAYOUTS
    dropout: float = 0.0
    lr_scale: float = 1.0  # times the stage's default learning rate, for weights from scratch


@dataclass
class LoraConfig:
    """Adapters (PEFT) and the quantisation of the weights under them."""

    name: str = "none"  # none: every weight is trained, whatever the keys below say
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    quantization: str | None = None  # nf4 | int8
    lr_scale: float = 10.0  # times the stage's default learning rate, which is for all weights


@dataclass
class OptimConfig:
    """Optimiser and schedule."""

    name: str = "adamw"  # adamw | rmsprop | adamw8bit
    lr: float | None = None  # null: stage.default_lr, times model.lr_scale or lora.lr_scale
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    alpha: float = 0.99  # rmsprop smoothing
    eps: float = 1e-8
    schedule: str = "constant"  # constant | cosine | linear, after a linear warm-up
    warmup_steps: int | None = None  # null: warmup_ratio of the run
    warmup_ratio: float = 0.1
    max_grad_norm: float = 10.0


@dataclass
class TrainConfig:
    """The loop: how long, how large, how often."""

    epochs: float = 1.0
    max_steps: int | None = None  # wins over epochs
    batch_size: int = 32  # examples an optimiser step, over all devices
    micro_batch_tokens: int | None = None  # packed tokens a forward; null: by memory
    eval_every_steps: int | None = None  # null: ten times a run; 0: only at the end
    save_every_steps: int | None = None  # null: by time; 0: only at the end
    save_every_minutes: float | None = None  # null: 5, or what keeps saves to 2% of the time
    keep_checkpoints: int = 2
    log_every_steps: int = 1
    shuffle: bool = True
    best_metric: str = "loss"  # of the held-out rows, see BEST_METRICS
    sample_prompts: int = 4
    sample_max_new_tokens: int = 48
    sample_temperature: float = 0.7


@dataclass
class HardwareConfig:
    """Where it runs."""

    name: str = "auto"
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | fp32 | bf16 (autocast over fp32 master weights)
    weights: str = "fp32"  # of trained weights: fp32 | bf16
    activation_checkpointing: int = 0  # 0: none, 1: every block, k: every k-th
    devices: int = 1  # of a node
    nodes: int = 1
    sharding: str = "full"  # over all devices | hybrid: within a node, copies across nodes
    timeout_seconds: int = 600  # of ranks that wait for each other
    memory_gb: float | None = None  # of one device, for the plan; null: as found
    threads: int | None = None
    residual: str = "fp32"  # fp32 | bf16: hidden states between blocks, where precision is bf16
    kernels: str = "none"  # none | liger: Triton kernels of norms, gated activations, rotary
    compile: str | bool = "none"  # auto | none | blocks: torch.compile of each block, for CUDA


@dataclass
class LoggerConfig:
    """Metric sinks beside metrics.jsonl, and what is drawn and written at the end."""

    name: str = "default"
    progress: str = "auto"  # auto | rich | plain | off
    tensorboard: bool = True
    plots: bool = True
    report: bool = True
    wandb: bool = False
    wandb_project: str = "dpo-run"


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
    seed: int = 0
    run_dir: str = ""
    cache_dir: str = ""
    resume: bool = False
    dry_run: bool = False


BEST_METRICS = {  # stage -> what train.best_metric may be, and which value of it is best
    "sft": {"loss": "lowest", "perplexity": "lowest", "nll_per_token": "lowest"},
    "dpo": {"loss": "lowest", "rewards/accuracies": "highest", "rewards/margins": "highest"},
    "reward": {"loss": "lowest", "rewards/accuracies": "highest", "ece": "lowest"},
    "ppo-baseline": {"loss": "lowest", "score": "highest"},
}

CHOICES: dict[str, tuple[str, ...]] = {  # key -> the values it may have
    "model.attention": ("auto", "grouped", "varlen", "flex", "sdpa", "dense", "plain"),
    "data.keep_prompt": ("start", "end"),
    "data.special_tokens": ("text", "parse"),
    "lora.name": ("none", "lora", "dora", "qlora", "int8"),
    "lora.quantization": ("nf4", "int8"),
    "stage.reduction": ("mean", "sum"),
    "stage.loss": tuple(LOSS_OPTIONS),
    "stage.reference_logprobs": ("cached", "live"),
    "stage.split": ("train", "eval"),
    "stage.dtype": ("auto", "bf16", "fp32"),
    "stage.labels": ("deterministic", "bradley_terry"),
    "stage.by": ("reward_fn", "implicit"),
    "stage.kl_control": ("adaptive", "fixed"),
    "reward_fn.scale": ("probability", "log_odds"),
    "judge.task": ("dialogue", "summary", "sentiment"),
    "optim.name": ("adamw", "rmsprop", "adamw8bit"),
    "optim.schedule": ("constant", "cosine", "linear"),
    "hardware.device": ("auto", "cpu", "cuda"),
    "hardware.precision": ("auto", "fp32", "bf16"),
    "hardware.weights": ("fp32", "bf16"),
    "hardware.sharding": ("full", "hybrid"),
    "hardware.compile": ("auto", "none", "blocks"),
    "hardware.kernels": ("none", "liger"),
    "hardware.residual": ("fp32", "bf16"),
    "logger.progress": ("auto", "rich", "plain", "off"),
}
