"""The schema: every key a user can set, its type, default, bounds and meaning."""

from __future__ import annotations

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
    PythonRewardFn,
    RewardFnConfig,
    RewardModelFn,
    SentimentRewardFn,
)
from dpo_cli.config.schema import (
    ArchitectureConfig,
    HardwareConfig,
    LoggerConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from dpo_cli.config.stages import STAGE_SCHEMAS, STAGES, spec_of, title_of_stage
from dpo_cli.config.stages.base import StageConfig, StageSpec
from dpo_cli.config.stages.dpo import DpoConfig, PreferenceConfig
from dpo_cli.config.stages.evaluate import EvaluateConfig
from dpo_cli.config.stages.export import ExportConfig
from dpo_cli.config.stages.frontier import FrontierConfig
from dpo_cli.config.stages.inspect import InspectConfig
from dpo_cli.config.stages.kto import KtoConfig
from dpo_cli.config.stages.label import LabelConfig
from dpo_cli.config.stages.online_dpo import OnlineDpoConfig
from dpo_cli.config.stages.ppo_baseline import PpoConfig
from dpo_cli.config.stages.reward import RewardConfig
from dpo_cli.config.stages.sample import SampleConfig
from dpo_cli.config.stages.sft import SftConfig

# of the stages whose work is sampling from the distinct prompts
SamplingConfig = SampleConfig | EvaluateConfig | PpoConfig | OnlineDpoConfig

__all__ = [
    "DATA_SCHEMAS",
    "JUDGE_SCHEMAS",
    "REWARD_FN_SCHEMAS",
    "STAGES",
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
    "KtoConfig",
    "LabelConfig",
    "LengthRewardFn",
    "LexiconRewardFn",
    "LoggerConfig",
    "LoraConfig",
    "ModelConfig",
    "NoRewardFn",
    "OnlineDpoConfig",
    "OptimConfig",
    "PpoConfig",
    "PreferenceConfig",
    "PythonRewardFn",
    "RewardConfig",
    "RewardFnConfig",
    "RewardModelFn",
    "RunConfig",
    "SampleConfig",
    "SamplingConfig",
    "SeDataConfig",
    "SentimentDataConfig",
    "SentimentRewardFn",
    "SftConfig",
    "ShpDataConfig",
    "StageConfig",
    "StageSpec",
    "TldrDataConfig",
    "TrainConfig",
    "UltrafeedbackDataConfig",
    "spec_of",
    "title_of_stage",
]
