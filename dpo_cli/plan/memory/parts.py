"""The parts of a run's memory on one device, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.config import LoraConfig, RunConfig, spec_of
from dpo_cli.logprobs import BLOCK_BYTES, CHUNK_BYTES, EAGER_BLOCKS
from dpo_cli.model.attention.interface import MAX_TOKENS
from dpo_cli.plan.memory.activations import Numbers, Rows, Trained, activation_bytes, working_bytes
from dpo_cli.plan.memory.facts import Facts
from dpo_cli.plan.memory.weights import (
    FLOAT,
    HALF,
    Sharing,
    Trainable,
    cast_bytes,
    dequantized_bytes,
    frozen_bytes,
    gathered_bytes,
    trainable_of,
)
from dpo_cli.train.runtime import MICRO_BATCH_TOKENS

SAMPLED_LOGITS = 4  # (sequences, vocabulary) float32 tensors at once while a token is drawn
Parts = Mapping[str, float]  # name -> bytes


@dataclass(frozen=True)
class Run:
    """A configuration, and the values derived from it."""

    config: RunConfig
    facts: Facts

    @property
    def trains(self) -> bool:
        return spec_of(self.config.stage).trains

    @property
    def lora(self) -> LoraConfig:
        """The adapter; none in stages that do not train, which merge it into its base."""
        return self.config.lora if self.trains else LoraConfig()

    @property
    def trainable(self) -> Trainable:
        return trainable_of(self.lora, self.config.hardware, self.facts.shape)

    @property
    def sharing(self) -> Sharing:
        """The sharding; none in stages that do not train."""
        return Sharing.of(self.config.hardware) if self.trains else Sharing()

    @property
    def kernel(self) -> str:
        if not self.facts.shape.packed:
            return "dense"
        fastest = "grouped" if self.facts.device == "cpu" else "varlen"
        chosen = self.config.model.attention
        return fastest if chosen == "auto" else chosen

    @property
    def step(self) -> int:
        """Packed tokens per device and step."""
        ranks = self.config.hardware.devices * self.config.hardware.nodes
        return max(-(-self.facts.texts.step // ranks), self.facts.texts.longest)

    @property
    def rows(self) -> Rows:
        texts, kernel = self.facts.texts, self.kernel
        budget = token_budget(self.config, self.facts.device)
        budget = min(budget, MAX_TOKENS.get(kernel, budget))
        tokens = max(min(budget, self.step), texts.longest)
        keys = texts.keys if kernel == "varlen" else 1.0
        return Rows(tokens, texts.typical, keys)

    @property
    def numbers(self) -> Numbers:
        compute = HALF if self.facts.half else FLOAT
        half_weights = self.facts.half and not (
            self.trainable.full and self.trainable.size == FLOAT
        )
        half_stream = half_weights or (self.facts.half and self.sharing.shards > 1)
        return Numbers(compute, HALF if half_stream else FLOAT)


def token_budget(config: RunConfig, device: str) -> int:
    return config.train.micro_batch_tokens or MICRO_BATCH_TOKENS[device]


def weights_of(run: Run) -> float:
    """Trained weights are sharded; so is the base under an adapter, unless it is quantized."""
    shape, trainable, shards = run.facts.shape, run.trainable, run.sharing.shards
    if not run.trains:
        return float(FLOAT * shape.parameters)
    trained = trainable.size * trainable.parameters / shards
    if trainable.full:
        return trained
    frozen = frozen_bytes(run.lora, shape, run.facts.half)
    return trained + (frozen / shards if run.lora.quantization is None else frozen)


def loading_bytes(run: Run) -> float:
    """On a CPU: the mapped pages of the files, and the converted weights if the dtype differs, of
    which ranks keep their shard. On a GPU, loading needs no more than the weights."""
    facts, shape = run.facts, run.facts.shape
    if not run.trainable.full and run.lora.quantization is not None:
        return frozen_bytes(run.lora, shape, facts.half)
    size = HALF if facts.half and not run.trainable.full else FLOAT
    copied = size / run.sharing.shards if size != facts.stored else 0.0
    return (facts.stored + copied) * shape.parameters


def reference_of(run: Run, passing: bool = False) -> float:
    """A frozen copy of the policy; with an adapter, the reference is the policy without it.

    passing: during the pass that fills the cache, which is the only one that loads a named
    reference.
    """
    stage: Any = run.config.stage
    if not (spec_of(stage).reference(stage) and run.trains):
        return 0.0
    cached = getattr(stage, "reference_logprobs", "live") == "cached"
    another = stage.reference is not None or (run.trainable.full and not cached)
    if not another or passing != cached:
        return 0.0
    size = HALF if run.facts.half and not run.trainable.full else FLOAT
    return float(size * run.facts.shape.parameters)


def copies_of(run: Run) -> Parts:
    """Copies in another dtype, or gathered from shards, during a forward."""
    shape, trainable, half = run.facts.shape, run.trainable, run.facts.half
    sharded = run.sharing.shards > 1
    return {
        "bf16 copies": cast_bytes(trainable, shape, half, run.sharing),
        "gathered blocks": gathered_bytes(trainable, run.lora, shape, half) if sharded else 0.0,
        "dequantized matrix": dequantized_bytes(run.lora, shape, half),
    }


def activations_of(run: Run) -> Parts:
    """What a forward saves for its backward."""
    config, trainable, lora = run.config, run.trainable, run.lora
    trained = Trained(
        trainable.full,
        trainable.adapted,
        lora.dropout > 0,
        lora.use_dora,
        lora.quantization == "int8",
    )
    every = config.hardware.activation_checkpointing
    shape = run.facts.shape
    saved = activation_bytes(shape, run.numbers, trained, run.rows, run.kernel, every)
    return {"activations": saved, **copies_of(run)}


def output_layer(run: Run) -> Parts:
    """The output layer in `logprobs.fused_loss`: slopes of a chunk; either logits and softmax of a
    block together with the next block's logits (a kernel's block is as large), or a chunk's part of
    the weight's gradient; the weight's copy and its gradient."""
    shape, numbers, device = run.facts.shape, run.numbers, run.facts.device
    scored = run.facts.texts.scored * run.rows.tokens
    slopes = min(CHUNK_BYTES[device], numbers.compute * scored * shape.vocab)
    logits = EAGER_BLOCKS * min(BLOCK_BYTES[device], FLOAT * scored * shape.vocab)
    copy = shape.head * numbers.compute if numbers.casts else 0
    # CUDA adds a chunk's part to the gradient in place.
    part = shape.head * numbers.compute if run.trainable.full and device == "cpu" else 0
    return {"output layer": float(slopes + max(logits, part) + copy), **head_gradient(run)}


def head_gradient(run: Run) -> Parts:
    """Computed in the forward. With FSDP it is among the gathered blocks."""
    size = run.trainable.size if run.trainable.full and run.sharing.shards == 1 else 0
    return {"output layer's gradient": float(size * run.facts.shape.head)}


def forward_of(run: Run) -> Parts:
    """A forward without gradients."""
    return {
        "activations": working_bytes(run.facts.shape, run.numbers, run.rows),
        "output layer": (1.0 + EAGER_BLOCKS) * BLOCK_BYTES[run.facts.device],
    }


def embedding_gradient(run: Run) -> float:
    """The gradient of the embeddings, before it is added to that of an output layer tied to it."""
    tied = run.trainable.full and run.facts.shape.tied
    return float(run.trainable.size * run.facts.shape.head) if tied else 0.0


def sequences_of(config: RunConfig) -> int:
    """Sequences decoded together."""
    stage: Any = config.stage
    spec = spec_of(stage)
    if spec.cpu_batch_size is not None:
        return stage.batch_size or spec.cpu_batch_size  # on a GPU, as many as fit
    return 0 if spec.reward_head else config.train.sample_prompts


def sampling_of(run: Run, sequences: int) -> Parts:
    """Keys and values of prompts, shared by a prompt's samples, and of the sampled tokens."""
    config, shape, stage = run.config, run.facts.shape, run.config.stage
    limit = getattr(stage, "max_new_tokens", None) or run.facts.texts.new
    new = limit or config.train.sample_max_new_tokens
    prompts = -(-sequences // getattr(stage, "completions", 1))
    tokens = prompts * run.facts.texts.prompt + sequences * new
    cache = 2 * shape.layers * shape.keys * run.numbers.compute * tokens
    prefill = Rows(prompts * run.facts.texts.prompt, run.facts.texts.prompt)
    quantized = run.lora.name != "none" and run.lora.quantization is not None
    gathered = run.sharing.shards > 1 and not quantized  # ranks decode independently
    return {
        **copies_of(run),
        "gathered blocks": float(run.numbers.compute * shape.parameters) if gathered else 0.0,
        "keys and values": float(cache),
        "working memory": working_bytes(shape, run.numbers, prefill),
        "output layer": float(FLOAT * SAMPLED_LOGITS * sequences * shape.vocab),
    }
