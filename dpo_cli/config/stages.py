"""Keys of the `stage` group, one dataclass an option."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StageConfig:
    """Keys every stage has."""

    name: str = "sft"
    default_lr: float = 1e-5


@dataclass
class SftConfig(StageConfig):
    """Supervised fine-tuning on the best response (Preferred-FT)."""

    name: str = "sft"
    reduction: str = "mean"  # mean over target tokens | sum over an example's tokens
    train_on_prompt: bool = False


@dataclass
class DpoConfig(StageConfig):
    """Preference losses on pairs, against a frozen reference."""

    name: str = "dpo"
    default_lr: float = 1e-6
    loss: str = "sigmoid"  # a key of losses.LOSSES
    beta: float = 0.1
    label_smoothing: float = 0.0  # cDPO: probability that a label is flipped
    length_normalised: bool = False
    nll_weight: float = 0.0  # adds eta * NLL(chosen) per token (RPO)
    alpha: float = 0.1  # unlikelihood: weight of the rejected response
    reference: str | None = None  # folder or hub id; null: the policy as loaded
    reference_logprobs: str = "cached"  # cached | live


LOSS_OPTIONS: dict[str, frozenset[str]] = {  # loss -> the keys of DpoConfig it reads
    "sigmoid": frozenset({"beta", "label_smoothing", "length_normalised", "nll_weight"}),
    "hinge": frozenset({"beta", "length_normalised", "nll_weight"}),
    "ipo": frozenset({"beta", "nll_weight"}),
    "unlikelihood": frozenset({"alpha"}),
    "plackett_luce": frozenset({"beta", "nll_weight"}),
}


@dataclass
class RewardConfig(StageConfig):
    """A Bradley-Terry reward model on ranked responses."""

    name: str = "reward"
    label_smoothing: float = 0.0  # probability that a label is flipped, as in cDPO
    margins: bool = False  # subtract the difference of the data's scores from the rewards'
    center_coefficient: float = 0.0  # adds this much (r_w + r_l)^2: rewards of mean zero


@dataclass
class SampleConfig(StageConfig):
    """Completions of the dataset's prompts, written to train.jsonl and eval.jsonl."""

    name: str = "sample"
    prompts: int | None = None  # training prompts; null: all of them, 0: none
    eval_prompts: int | None = None  # held-out prompts
    completions: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 48
    batch_size: int = 64


@dataclass
class LabelConfig(StageConfig):
    """Pairs out of sampled completions, labelled by a scorer, to train.jsonl and eval.jsonl."""

    name: str = "label"
    samples: str | None = None  # the folder of a stage=sample run
    scorer: str = "sentiment"
    labels: str = "deterministic"  # deterministic | bradley_terry
    temperature: float = 1.0  # bradley_terry: P(a > b) = sigmoid((r_a - r_b) / temperature)
    flip_rate: float = 0.0


@dataclass
class EvaluateConfig(StageConfig):
    """Ground-truth reward, sequence KL to the reference, preference accuracy."""

    name: str = "evaluate"
    reference: str | None = None
    scorer: str = "sentiment"
    pairs: str | None = None  # labelled pairs for preference accuracy
    prompts: int = 256
    completions: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 48
    batch_size: int = 64


@dataclass
class InspectConfig(StageConfig):
    """Shows examples token by token, length percentiles and dropped rows."""

    name: str = "inspect"
    examples: int = 3
    split: str = "train"


STAGE_SCHEMAS: dict[str, type[StageConfig]] = {
    "sft": SftConfig,
    "dpo": DpoConfig,
    "reward": RewardConfig,
    "sample": SampleConfig,
    "label": LabelConfig,
    "evaluate": EvaluateConfig,
    "inspect": InspectConfig,
}
