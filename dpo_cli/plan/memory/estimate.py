"""Memory of one device at each moment of a run, and its peak.

Parts that are never allocated at the same time are not added: rollouts need a KV cache, training
steps need gradients and activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.plan.memory.activations import working_bytes
from dpo_cli.plan.memory.facts import Facts
from dpo_cli.plan.memory.parts import (
    Parts,
    Run,
    activations_of,
    copies_of,
    embedding_gradient,
    forward_of,
    head_gradient,
    loading_bytes,
    output_layer,
    reference_of,
    sampling_of,
    sequences_of,
    weights_of,
)
from dpo_cli.plan.memory.weights import FLOAT, state_bytes

HEAD, BACKWARD, BACKWARD_END = "the output layer", "the backward", "the backward's end"
SAMPLING, SCORING, REFERENCE = "sampling", "scoring a micro-batch", "the reference's pass"
LOADING = "loading"
# Besides tensors. cpu: Python with its libraries; cuda: the context, kernels, workspaces.
PROGRAM = {"cpu": 600 * 2**20, "cuda": 900 * 2**20}
SLACK = {"cpu": 0.10, "cuda": 0.05}  # fraction of tensors, held unused by the allocator
ONEDNN = 100 * 2**20  # for bf16 matrix products on a CPU, which reorder their operands


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device: `moments` of a run, each the sum of its parts."""

    moments: Mapping[str, Parts]

    @property
    def moment(self) -> str:
        """The moment with the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        return {name: size for name, size in self.moments[self.moment].items() if size}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def estimate(config: RunConfig, facts: Facts) -> Estimate:
    """The memory of a run that trains, samples or evaluates. A pure function."""
    run = Run(config, facts)
    moments = _training(run) if spec_of(config.stage).trains else _using(run)
    return Estimate({name: {**parts, **_around(parts, facts)} for name, parts in moments.items()})


def saved_bytes(config: RunConfig, facts: Facts) -> float:
    """Size of a checkpoint, which is also the host memory of a copy of the state."""
    trainable = Run(config, facts).trainable
    return trainable.size * trainable.parameters + state_bytes(config.optim, trainable)


def _around(parts: Parts, facts: Facts) -> Parts:
    """Memory besides tensors."""
    products = ONEDNN if facts.half and facts.device == "cpu" else 0
    allocator = SLACK[facts.device] * sum(parts.values()) + products
    return {"allocator": allocator, "program": PROGRAM[facts.device]}


def _training(run: Run) -> dict[str, Parts]:
    config, facts, trainable = run.config, run.facts, run.trainable
    shards = run.sharing.shards
    held: Parts = {
        "weights": weights_of(run),
        "optimizer state": state_bytes(config.optim, trainable) / shards,
        "reference": reference_of(run) / shards,
        "reward model": float(FLOAT * facts.scorer),
    }
    gradients = {"gradients": trainable.size * trainable.parameters / shards}
    # With one micro-batch per step, gradients replace activations as these are freed.
    accumulated = gradients if run.step > run.rows.tokens else {}
    in_use = {**held, **activations_of(run), **accumulated}
    working = working_bytes(facts.shape, run.numbers, run.rows)
    moments: dict[str, Parts] = {
        BACKWARD: {**in_use, "working memory": working, **head_gradient(run)},
        BACKWARD_END: {**held, **gradients, "working memory": embedding_gradient(run)},
    }
    if not spec_of(config.stage).reward_head:
        moments[HEAD] = {**in_use, **output_layer(run)}
    if sequences := sequences_of(config):
        moments[SAMPLING] = {**held, **sampling_of(run, sequences)}
    if reference := reference_of(run, passing=True):
        moments[REFERENCE] = {
            "weights": weights_of(run), "reference": reference / shards, **forward_of(run)
        }  # fmt: skip
    if facts.device == "cpu":
        moments[LOADING] = {"weights": loading_bytes(run)}
    return moments


def _using(run: Run) -> dict[str, Parts]:
    """Moments of a stage that does not train."""
    config, shape = run.config, run.facts.shape
    compares = spec_of(config.stage).reference(config.stage)
    held: Parts = {
        "weights": weights_of(run),
        "reference": float(FLOAT * shape.parameters) if compares else 0.0,
        "reward model": float(FLOAT * run.facts.scorer),
    }
    sampling = sampling_of(run, sequences_of(config))
    moments: dict[str, Parts] = {SAMPLING: {**held, **sampling}}
    if compares:
        moments[SCORING] = {**held, **forward_of(run), **copies_of(run)}
    return moments
