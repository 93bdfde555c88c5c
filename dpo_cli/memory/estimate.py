"""Memory of one device at each moment of a run, and so at its peak.

Parts that never live at once are never added: rollouts need a cache of keys and values, and
steps gradients and activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.config import (
    DpoConfig,
    EvaluateConfig,
    PpoConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    SftConfig,
)
from dpo_cli.logprobs import BLOCK_BYTES, CHUNK_BYTES
from dpo_cli.memory.activations import Numbers, Rows, Trained, kept_bytes, working_bytes
from dpo_cli.memory.shape import Shape
from dpo_cli.memory.weights import (
    FLOAT,
    HALF,
    Learning,
    Sharing,
    cast_bytes,
    dequantised_bytes,
    frozen_bytes,
    gathered_bytes,
    learning,
    state_bytes,
)
from dpo_cli.model.attention import MOST_TOKENS
from dpo_cli.train.runtime import MICRO_BATCH_TOKENS

TRAINED = (SftConfig, DpoConfig, RewardConfig, PpoConfig)
STEP, UPDATE = "a micro-batch", "the optimiser's step"
BACKWARD_END = "the end of a backward"
SAMPLING, SCORING, REFERENCE = "sampling", "scoring a micro-batch", "the reference's pass"
LOADING, SAVING = "loading", "saving"
SAMPLED_LOGITS = 4  # copies of (sequences, vocabulary) floats: logits, sorted, sums, kept
# Beside tensors. cpu: Python with its libraries; cuda: the context, kernels, workspaces.
PROGRAM = {"cpu": 600 * 2**20, "cuda": 900 * 2**20}
SLACK = {"cpu": 0.04, "cuda": 0.05}  # of the rest: what an allocator holds and cannot use


@dataclass(frozen=True)
class Texts:
    """Lengths in tokens. step: packed, of the fullest step, over all devices; longest: packed,
    of one example; typical: of the example a token is in, on average; keys: as in `Rows`;
    prompt: the longest."""

    step: int
    longest: int
    typical: int
    keys: float
    prompt: int


@dataclass(frozen=True)
class Facts:
    """What an estimate needs beside the configuration. device: cpu | cuda; half: whether it
    computes in bf16; scorer: float32 weights of a reward model or classifier."""

    shape: Shape
    texts: Texts
    device: str
    half: bool
    scorer: int = 0


Parts = Mapping[str, float]  # name -> bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device: `moments` of a run, each the sum of its parts."""

    moments: Mapping[str, Parts]

    @property
    def moment(self) -> str:
        """The one that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        return {name: size for name, size in self.moments[self.moment].items() if size}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Run:
    """A configuration with what follows from it."""

    config: RunConfig
    facts: Facts

    @property
    def learnt(self) -> Learning:
        return learning(self.config.lora, self.config.hardware, self.facts.shape)

    @property
    def sharing(self) -> Sharing:
        return Sharing.of(self.config.hardware)

    @property
    def kernel(self) -> str:
        if not self.facts.shape.packed:
            return "dense"
        chosen = self.config.model.attention
        return (
            ("grouped" if self.facts.device == "cpu" else "varlen") if chosen == "auto" else chosen
        )

    @property
    def step(self) -> int:
        """Packed tokens a device computes a step."""
        ranks = self.config.hardware.devices * self.config.hardware.nodes
        return max(-(-self.facts.texts.step // ranks), self.facts.texts.longest)

    @property
    def rows(self) -> Rows:
        texts, kernel = self.facts.texts, self.kernel
        budget = token_budget(self.config, self.facts.device)
        budget = min(budget, MOST_TOKENS.get(kernel, budget))
        tokens = max(min(budget, self.step), texts.longest)
        keys = texts.keys if kernel == "varlen" else 1.0
        return Rows(tokens, texts.typical, keys)

    @property
    def numbers(self) -> Numbers:
        compute = HALF if self.facts.half else FLOAT
        kept_half = self.facts.half and not (self.learnt.whole and self.learnt.size == FLOAT)
        half_stream = kept_half or (self.facts.half and self.sharing.shards > 1)
        return Numbers(compute, HALF if half_stream else FLOAT)


def token_budget(config: RunConfig, device: str) -> int:
    return config.train.micro_batch_tokens or MICRO_BATCH_TOKENS[device]


def estimate(config: RunConfig, facts: Facts) -> Estimate:
    """Of a run that trains, samples or evaluates. Pure: reads nothing but its arguments."""
    run = _Run(config, facts)
    moments = _training(run) if isinstance(config.stage, TRAINED) else _using(run)
    shares = SLACK[facts.device]
    return Estimate({
        name: {**parts, "allocator": shares * sum(parts.values()), "program": PROGRAM[facts.device]}
        for name, parts in moments.items()
    })  # fmt: skip


def _training(run: _Run) -> dict[str, Parts]:
    config, facts, learnt = run.config, run.facts, run.learnt
    shards, size = run.sharing.shards, FLOAT * facts.shape.parameters
    held: Parts = {
        "weights": _weights(run),
        "optimiser state": state_bytes(config.optim, learnt) / shards,
        "reference": _reference(run) / shards,
        "reward model": FLOAT * facts.scorer,
    }
    gradients = {"gradients": learnt.size * learnt.parameters / shards}
    # In a step of one micro-batch gradients come as activations go.
    meanwhile = gradients if run.step > run.rows.tokens else {}
    moments: dict[str, Parts] = {
        STEP: {**held, **_step(run), **meanwhile},
        BACKWARD_END: {**held, **gradients, "working memory": _embeddings(run)},
        UPDATE: {**held, **gradients, "working memory": _update(run)},
    }
    if sequences := _sequences(config):
        moments[SAMPLING] = {**held, **_sampling(run, sequences), **_copies(run)}
    if facts.device == "cpu":
        state = held["optimiser state"]
        moments[LOADING] = {"weights": size, "reference": _reference(run, passing=True)}
        moments[SAVING] = {**held, "copy of the state": state}
    elif named := _reference(run, passing=True):
        moments[REFERENCE] = {"reference": named, **_forward(run)}
    return moments


def _using(run: _Run) -> dict[str, Parts]:
    """Stages that train nothing."""
    stage = run.config.stage
    size = FLOAT * run.facts.shape.parameters
    evaluates = isinstance(stage, EvaluateConfig)
    held: Parts = {
        "weights": size,
        "reference": size if evaluates else 0.0,
        "reward model": FLOAT * run.facts.scorer,
    }
    moments: dict[str, Parts] = {
        SAMPLING: {**held, **_sampling(run, _sequences(run.config)), **_copies(run)}
    }
    if evaluates:
        moments[SCORING] = {**held, **_forward(run), **_copies(run)}
    return moments


def _weights(run: _Run) -> float:
    config, shape, learnt = run.config, run.facts.shape, run.learnt
    own = float(learnt.size * learnt.parameters)
    if learnt.whole:
        return own / run.sharing.shards
    frozen = frozen_bytes(config.lora, shape, run.facts.half)
    shards = run.sharing.shards if config.lora.quantization is None else 1
    return own / run.sharing.shards + frozen / shards


def _reference(run: _Run, passing: bool = False) -> float:
    """A frozen copy beside the policy, of its shape; under an adapter it is the policy without.

    passing: in the pass that fills the cache, where a named reference is loaded, too.
    """
    stage: Any = run.config.stage
    if not isinstance(stage, (DpoConfig, PpoConfig)):
        return 0.0
    cached = isinstance(stage, DpoConfig) and stage.reference_logprobs == "cached"
    if cached and not (passing and stage.reference):
        return 0.0
    if run.learnt.whole or passing:
        return float(FLOAT * run.facts.shape.parameters)
    size = HALF if run.facts.half else FLOAT
    return float(size * run.facts.shape.parameters) if stage.reference else 0.0


def _copies(run: _Run) -> Parts:
    """What is there in another dtype, or whole instead of sharded, while a forward computes."""
    config, shape, learnt, half = run.config, run.facts.shape, run.learnt, run.facts.half
    sharded = run.sharing.shards > 1 and isinstance(config.stage, TRAINED)
    return {
        "bf16 copies": cast_bytes(learnt, shape, half, run.sharing),
        "gathered blocks": gathered_bytes(learnt, config.lora, shape, half) if sharded else 0.0,
        "dequantised matrix": dequantised_bytes(config.lora, shape, half),
    }


def _step(run: _Run) -> Parts:
    config, shape, learnt, rows = run.config, run.facts.shape, run.learnt, run.rows
    lora = config.lora
    trained = Trained(learnt.whole, learnt.adapted, lora.dropout > 0, lora.quantization == "int8")
    every = config.hardware.activation_checkpointing
    kept = kept_bytes(shape, run.numbers, trained, rows, run.kernel, every)
    return {
        "activations": kept,
        "working memory": working_bytes(shape, run.numbers, rows),
        "output layer": 0.0 if isinstance(config.stage, RewardConfig) else _head(run),
        **_copies(run),
    }


def _head(run: _Run) -> float:
    """`logprobs.fused_loss`: slopes of a chunk, logits and softmax of a block while the next
    one's logits are made; the weight's copy, its gradient and a chunk's part of that."""
    shape, numbers, device = run.facts.shape, run.numbers, run.facts.device
    buffers = float(CHUNK_BYTES[device] + 3 * BLOCK_BYTES[device])
    copy = shape.head * numbers.compute if numbers.casts else 0
    if not run.learnt.whole:
        return buffers + copy
    return buffers + copy + shape.head * (run.learnt.size + numbers.compute)


def _forward(run: _Run) -> Parts:
    """Without gradients."""
    return {
        "activations": working_bytes(run.facts.shape, run.numbers, run.rows),
        "output layer": 4.0 * BLOCK_BYTES[run.facts.device],
    }


def _embeddings(run: _Run) -> float:
    """The gradient of the embeddings, before it is added to that of an output layer tied to it."""
    tied = run.learnt.whole and run.facts.shape.tied
    return float(run.learnt.size * run.facts.shape.head) if tied else 0.0


def _update(run: _Run) -> float:
    """Roots of squared gradients, all at once, of PyTorch's RMSprop on CUDA."""
    if run.config.optim.name != "rmsprop" or run.facts.device == "cpu":
        return 0.0
    return run.learnt.size * run.learnt.parameters / run.sharing.shards


def _sequences(config: RunConfig) -> int:
    """Decoded together."""
    stage: Any = config.stage
    if isinstance(stage, (PpoConfig, SampleConfig, EvaluateConfig)):
        return stage.batch_size
    return 0 if isinstance(stage, RewardConfig) else config.train.sample_prompts


def _sampling(run: _Run, sequences: int) -> Parts:
    """Keys and values of prompts, which a prompt's samples share, and of what is sampled."""
    config, shape, stage = run.config, run.facts.shape, run.config.stage
    new = getattr(stage, "max_new_tokens", config.train.sample_max_new_tokens)
    prompts = -(-sequences // getattr(stage, "completions", 1))
    tokens = prompts * run.facts.texts.prompt + sequences * new
    cache = 2 * shape.layers * shape.keys * run.numbers.compute * tokens
    prefill = Rows(prompts * run.facts.texts.prompt, run.facts.texts.prompt)
    return {
        "keys and values": float(cache),
        "working memory": working_bytes(shape, run.numbers, prefill),
        "output layer": float(FLOAT * SAMPLED_LOGITS * sequences * shape.vocab),
    }
