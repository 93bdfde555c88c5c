"""Keys of the `stage` group, one dataclass an option."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StageConfig:
    """Keys every stage has."""

    name: str = "sft"
    default_lr: float = 1e-5


CPU_BATCH_SIZE = {"sample": 64, "evaluate": 64, "ppo-baseline": 128}  # where batch_size is null


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
    normalise_prompts: int = 256  # one sample of the base model each, to measure mean and std
    normalise_max_new_tokens: int = 48


@dataclass
class PpoConfig(StageConfig):
    """Reinforcement learning on a reward: the baseline DPO is compared with."""

    name: str = "ppo-baseline"
    default_lr: float = 1.4e-5
    reference: str | None = None  # folder or hub id; null: the policy as loaded
    rollout_samples: int = 512  # completions a rollout
    completions: int = 1  # of them, of one prompt
    max_new_tokens: int | None = None  # null: what 95% of the data's responses do not exceed
    temperature: float = 1.0
    batch_size: int | None = None  # sequences decoded together; null: 128, on a GPU what fits
    ppo_epochs: int = 4  # passes over a rollout, in steps of train.batch_size completions
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2  # of the policy's ratio
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    value_lr_scale: float = 10.0  # the value head's rate, which starts at zero, over optim.lr
    whiten_advantages: bool = True
    kl_control: str = "adaptive"  # adaptive | fixed
    kl_coef: float = 0.2  # at the start, for adaptive
    target_kl: float = 6.0  # nats a sequence
    kl_horizon: int = 10000  # completions in which the coefficient may change e-fold
    normalise: bool = True  # scores to mean 0, std 1 on samples of the reference
    normalise_prompts: int = 256
    score_clip: float | None = None  # of the normalised score
    no_eos_score: float | None = -1.0  # given to completions without EOS; null: score them too
    ratio_limit: float = 10.0  # completions whose mean ratio is above it are skipped
    eval_prompts: int = 64  # held-out prompts sampled at each evaluation


@dataclass
class SampleConfig(StageConfig):
    """Completions of the dataset's prompts, written to train.jsonl and eval.jsonl."""

    name: str = "sample"
    prompts: int | None = None  # training prompts; null: all of them, 0: none
    eval_prompts: int | None = None  # held-out prompts
    completions: int = 4  # a prompt and temperature
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    top_p: float = 1.0
    max_new_tokens: int | None = None  # null: what 95% of the data's responses do not exceed
    batch_size: int | None = None


@dataclass
class LabelConfig(StageConfig):
    """Pairs out of sampled completions, labelled by a reward, to train.jsonl and eval.jsonl."""

    name: str = "label"
    samples: str | None = None  # the folder of a stage=sample run
    by: str = "reward_fn"  # reward_fn | implicit: beta log pi/pi_ref of model against reference
    reference: str | None = None  # of by=implicit; null: the one the policy was trained against
    beta: float = 0.1  # of by=implicit
    labels: str = "deterministic"  # deterministic | bradley_terry
    temperature: float = 1.0  # bradley_terry: P(a > b) = sigmoid((r_a - r_b) / temperature)
    flip_rate: float = 0.0


@dataclass
class EvaluateConfig(StageConfig):
    """Reward, sequence KL to the reference, frontier, win rates of one policy or several."""

    name: str = "evaluate"
    policies: list[str] = field(default_factory=list)  # folders of runs or sweeps; []: model.path
    checkpoints: bool = False  # every checkpoint of each run, too
    method: str | None = None  # what a frontier calls these policies
    reference: str | None = None
    pairs: str | None = None  # labelled pairs for preference accuracy; null: the held-out rows
    allow_trained: bool = False  # held-out rows that a model was trained on: report their share
    prompts: int = 256
    completions: int = 1
    temperature: float = 1.0
    max_new_tokens: int | None = None  # null: what 95% of the data's responses do not exceed
    batch_size: int | None = None
    reference_samples: int = 0  # a prompt: for the exact optimum and best-of-N; 0: neither
    best_of: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 128])
    optimum: str | None = None  # an earlier evaluation that had reference_samples
    opponent: str | None = None  # of win rates: chosen | reference | a folder
    win_temperatures: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class FrontierConfig(StageConfig):
    """Evaluations drawn together: reward against KL, and the optimum."""

    name: str = "frontier"
    evaluations: list[str] = field(default_factory=list)  # folders of stage=evaluate runs


@dataclass
class ExportConfig(StageConfig):
    """The model as a dense Hugging Face folder: an adapter merged, the dtype as asked."""

    name: str = "export"
    dtype: str = "auto"  # auto: as the base is stored | bf16 | fp32
    push_to_hub: str | None = None  # owner/name


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
    "ppo-baseline": PpoConfig,
    "sample": SampleConfig,
    "label": LabelConfig,
    "evaluate": EvaluateConfig,
    "frontier": FrontierConfig,
    "export": ExportConfig,
    "inspect": InspectConfig,
}
