"""What every stage is given, and the steps that several stages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import ModelConfig, RunConfig
from dpo_cli.data.chat import is_chat
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.distributed.checkpoint import is_sharded
from dpo_cli.distributed.fsdp import make_mesh, shard
from dpo_cli.distributed.ranks import Ranks
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.model.adapters.active import Adaptation, is_adapted
from dpo_cli.model.attention.registered import MOST_TOKENS, Placement, kernel_of
from dpo_cli.model.blocks import compile_blocks
from dpo_cli.model.fuse import round_residual
from dpo_cli.model.liger import use_liger
from dpo_cli.model.load import context_length, load_model, load_tokenizer
from dpo_cli.model.recompute import recompute_blocks
from dpo_cli.model.rope import cuts_of
from dpo_cli.model.routers import loss_function
from dpo_cli.model.source import model_folder
from dpo_cli.model.stored import refuse_non_finite
from dpo_cli.report.console import Progress
from dpo_cli.report.sinks import Sink
from dpo_cli.session.precision import hold_as_trained, note_head, refuse_rounding
from dpo_cli.session.trained import held_out_line, seen_before
from dpo_cli.train.checkpoint import Snapshot, load_provenance
from dpo_cli.train.memory import TokenBudget, read_budget, within
from dpo_cli.train.runtime import Runtime

T = TypeVar("T")
WORTH_COMPILING = 100  # steps


class Stage(Protocol):
    """A stage is a function: do the work, return the figures for summary.json."""

    def __call__(self, session: Session) -> dict[str, Any]: ...


class Chosen(Protocol):
    """Tokens of a micro-batch; as text, why so many."""

    @property
    def tokens(self) -> int: ...


@dataclass
class Session:
    """One run: resolved configuration, where it writes, where it computes."""

    config: RunConfig
    run_dir: Path
    runtime: Runtime
    progress: Progress
    sinks: list[Sink]
    snapshot: Snapshot | None = None
    # Chooses the tokens of a micro-batch by the rows and the memory that is free; None: as they are
    choose_tokens: Callable[[PreTrainedTokenizerFast, EncodedSplits], Chosen] | None = None
    data_facts: dict[str, Any] = field(default_factory=dict)  # for the model card
    budget: TokenBudget = field(init=False)
    cuts: tuple[int, ...] = field(
        init=False, default=()
    )  # where its models' rows are cut, by length
    kernel: str = field(init=False, repr=False)  # of the trained model, known when it is loaded

    def __post_init__(self) -> None:
        configured = self.config.train.micro_batch_tokens
        tokens = self.runtime.micro_batch_tokens(configured)
        self.budget = TokenBudget(tokens, fixed=self.ranks.size > 1)
        self.budget.restore(read_budget(Path(self.config.run_dir)))

    @property
    def ranks(self) -> Ranks:
        return self.runtime.ranks

    @property
    def token_budget(self) -> int:
        """Most tokens of a row that is packed now."""
        return self.budget.tokens

    def within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, a pass that only measures, in smaller rows where memory runs out."""
        return within(self.budget, self.runtime.device, self.note, work)

    def settle_tokens(self, tokenizer: PreTrainedTokenizerFast, splits: EncodedSplits) -> None:
        """Before the first pass over rows, with the trained model on its device."""
        if self.choose_tokens is not None:
            chosen = self.choose_tokens(tokenizer, splits)
            self.note(f"micro-batches: {chosen}")
            self.budget.start_with(min(self.ranks.gather(chosen.tokens)))

    @property
    def placement(self) -> Placement:
        half = self.runtime.precision == "bf16"
        return Placement(self.runtime.device, torch.bfloat16 if half else torch.float32, self.note)

    def begin(self, steps: int) -> None:
        self.progress.begin(steps, self.snapshot.step if self.snapshot else 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        self.progress.advance(step, values)

    def note(self, line: str) -> None:
        self.progress.note(line)


# (which, tokenizer, seed, the key that names it, where it will compute, how it is adapted)
# -> a model on its device; one to be sharded, and not quantised, on the CPU
LoadModel = Callable[
    [ModelConfig, PreTrainedTokenizerFast, int, str, Placement, Adaptation | None], PreTrainedModel
]


@dataclass
class Loaded:
    """Policy, tokenizer and encoded rows of a training stage."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    splits: EncodedSplits
    base: dict[str, Any]  # provenance of the weights the run started from


def load(
    session: Session,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    key: str = "model.path",
    how: LoadModel = load_model,
    adaptation: Adaptation | None = None,
    as_trained: bool = False,
    before: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """A model for this run's device; the session's rows stay as short as its attention needs.

    as_trained: in the precision of the trained weights; else the reference would not be what
    the policy was at step 0. before: what is done to it before its weights are sharded.
    """
    on = replace(session.placement, sharded=session.ranks.size > 1)
    model = how(source, tokenizer, session.config.seed, key, on, adaptation)
    before(model)
    if as_trained and session.config.hardware.residual == "bf16":
        round_residual(model)
    liger = as_trained and session.config.hardware.kernels == "liger"
    if as_trained and compiles(session):
        compile_blocks(model, session.note)
        if liger:
            session.note("hardware.kernels=liger: not used: hardware.compile=auto compiles blocks")
    elif liger:
        use_liger(model, session.placement)
    session.cuts = tuple(sorted({*session.cuts, *cuts_of(model.config)}))
    if kernel_of(model) in MOST_TOKENS:
        session.budget.limit(MOST_TOKENS[kernel_of(model)])
    held = None if is_adapted(model) else torch.float32
    if as_trained:
        held = hold_as_trained(model, session.config.hardware) or held
    note_head(model, session.placement, key)
    if session.ranks.size > 1:
        spread_weights(session, model, key, held)
    return model


def compiles(session: Session) -> bool:
    """Whether the run compiles its blocks: `auto` where that is sooner done than not."""
    choice, steps = session.config.hardware.compile, session.config.train.max_steps
    if session.config.train.router_aux_loss_coef:
        return False
    if choice == "auto":
        cuda = session.runtime.device.type == "cuda"
        return cuda and (steps is None or steps >= WORTH_COMPILING)
    return choice == "blocks"


def spread_weights(
    session: Session, model: PreTrainedModel, key: str, held: torch.dtype | None
) -> None:
    """Shard a loaded model over the ranks. ConfigError for one whose forwards differ by rank.

    held: what its weights come to be in on the way; None leaves each as it is.
    """
    if kernel_of(model) == "plain":  # as many forwards as a row needs
        raise ConfigError(
            f"{key}: {type(model).__name__} runs with attention=plain, which several devices "
            "cannot share: use hardware.devices=1"
        )
    hardware = session.config.hardware
    nodes = max(1, session.ranks.size // hardware.devices)
    mesh = make_mesh(session.runtime.device.type, hardware.devices, nodes, hardware.sharding)
    shard(model, mesh, session.placement.dtype, partial(_arrived, type(model).__name__, held))


def _arrived(
    family: str, held: torch.dtype | None, weights: list[tuple[str, torch.nn.Parameter]]
) -> None:
    """Of a block that is about to be sharded."""
    refuse_non_finite(family, weights)
    for _, weight in weights:
        if held is not None and weight.is_floating_point():
            weight.data = weight.data.to(held)


def load_policy_and_data(
    session: Session,
    how: LoadModel = load_model,
    before: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Loaded:
    """The model to train (from the checkpoint when resuming) and the encoded splits.

    before: what is done to the model before its weights are sharded.
    """
    config = session.config
    refuse_rounding(config.hardware, session.runtime)
    tokenizer = load_tokenizer(config.model)
    source, saved, adaptation = config.model, session.snapshot, None
    whole = None if saved is None or is_sharded(saved.folder) else saved.folder
    if config.lora.name != "none":
        adaptation = Adaptation(config.lora, whole)
    elif whole is not None:
        source = replace(source, path=str(whole))
    model = load(session, source, tokenizer, "model.path", how, adaptation, True, before)
    session.kernel = kernel_of(model)
    if coefficient := config.train.router_aux_loss_coef:  # refused before a pass over the rows
        loss_function(type(model), coefficient)
    if every := config.hardware.activation_checkpointing:
        recompute_blocks(model, every)
    splits = load_data(session, context_length(model), tokenizer)
    if not splits.train:
        raise DataError(f"data={config.data.name}: no training rows are left")
    if line := held_out_line(config, splits):
        session.note(line)
    if seen := seen_before(config, splits):
        session.data_facts["eval_rows_trained_on"] = seen
    session.settle_tokens(tokenizer, splits)
    return Loaded(model, tokenizer, splits, base_provenance(config.model))


def load_named(
    session: Session,
    named: str,
    tokenizer: PreTrainedTokenizerFast,
    key: str = "stage.reference",
    as_trained: bool = False,
) -> PreTrainedModel:
    """Another model by folder or hub id, for the same token ids as the policy's."""
    source = named_source(session.config.model, named, key)
    if load_tokenizer(source, key).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={named}: has another tokenizer than model={session.config.model.name}; its "
            "log-probabilities would be of other texts"
        )
    return load(session, source, tokenizer, key, as_trained=as_trained)


def named_source(config: ModelConfig, named: str, key: str = "stage.reference") -> ModelConfig:
    """Where another model is, read in the way of the run's own."""
    local = model_folder(named, key) if Path(named).is_dir() else None
    return replace(
        config, architecture=None, revision=None, tokenizer=None,
        path=str(local) if local else None, hub_id=None if local else named,
    )  # fmt: skip


def base_provenance(config: ModelConfig) -> dict[str, Any]:
    return load_provenance(model_folder(config.path)) if config.path else {}


def load_data(
    session: Session, context: int, tokenizer: PreTrainedTokenizerFast, announce: bool = True
) -> EncodedSplits:
    """Encoded rows for a model of that context length; `announce` says what was dropped."""
    config = session.config
    splits = load_encoded(config.data, tokenizer, context, config.seed, Path(config.cache_dir))
    for line in splits.drops.summary_lines() if announce else []:
        session.note(line)
    session.data_facts = {
        "name": config.data.name, "hub_id": config.data.hub_id, "path": config.data.path,
        "revision": splits.revision, "fingerprint": splits.fingerprint,
        "train_rows": len(splits.train), "eval_rows": len(splits.eval),
        "chat": is_chat(splits.train, tokenizer),
    }  # fmt: skip
    return splits
