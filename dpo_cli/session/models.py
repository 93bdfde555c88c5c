"""Loading models for a run: the one it trains, its reference, the policies it evaluates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import ModelConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.distributed.fsdp import make_mesh, shard
from dpo_cli.distributed.sharded_checkpoint import is_sharded
from dpo_cli.durable.provenance import BASE, load_provenance
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.model.adapters.active import Adaptation, is_adapted
from dpo_cli.model.attention.interface import MAX_TOKENS, Placement, kernel_of
from dpo_cli.model.base import content_at, content_in
from dpo_cli.model.blocks import compile_blocks
from dpo_cli.model.fuse import round_residual
from dpo_cli.model.liger import use_liger
from dpo_cli.model.load import context_length, load_model, load_tokenizer
from dpo_cli.model.recompute import recompute_blocks
from dpo_cli.model.rope import cuts_of
from dpo_cli.model.routers import loss_function
from dpo_cli.model.source import model_folder
from dpo_cli.model.stored import refuse_non_finite
from dpo_cli.session.precision import (
    hold_as_trained,
    note_head,
    quantized_base,
    refuse_rounding,
)
from dpo_cli.session.session import Session, load_data
from dpo_cli.session.trained import SEEN, held_out_line, seen_before

WORTH_COMPILING = 100  # steps


# (model, tokenizer, seed, key that names it, placement, adaptation) -> the model on its device;
# on the CPU if it will be sharded and is not quantized
Read = Callable[
    [ModelConfig, PreTrainedTokenizerFast, int, str, Placement, Adaptation | None], PreTrainedModel
]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    as_trained: with the precision and kernels of the trained weights; otherwise a reference would
    differ from the policy at step 0. before_sharding: applied to the loaded model.
    """

    read: Read = load_model
    adaptation: Adaptation | None = None
    as_trained: bool = False
    before_sharding: Callable[[PreTrainedModel], None] = lambda model: None


AS_TRAINED = Loading(as_trained=True)


@dataclass
class Loaded:
    """Policy, tokenizer and encoded rows of a training stage."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    splits: EncodedSplits
    base: dict[str, Any]  # provenance of the weights the run started from
    content: str  # digest of those weights; none: a model from scratch


def load(
    session: Session,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    key: str = "model.path",
    how: Loading = Loading(),
) -> PreTrainedModel:
    """A model on this run's device, sharded if the run has several. key: the key that names it.

    Limits the session's packs to the length that this model's attention supports.
    """
    on = replace(session.placement, sharded=session.ranks.size > 1)
    model = how.read(source, tokenizer, session.config.seed, key, on, how.adaptation)
    how.before_sharding(model)
    if how.as_trained:
        use_training_kernels(session, model)
    session.cuts = tuple(sorted({*session.cuts, *cuts_of(model.config)}))
    if kernel_of(model) in MAX_TOKENS:
        session.budget.limit(MAX_TOKENS[kernel_of(model)])
    dtype = None if is_adapted(model) else torch.float32
    if how.as_trained:
        dtype = hold_as_trained(model, session.config.hardware) or dtype
    note_head(model, session.placement, key)
    if session.ranks.size > 1:
        shard_weights(session, model, key, dtype)
    return model


def use_training_kernels(session: Session, model: PreTrainedModel) -> None:
    """The residual stream's dtype, compiled blocks or Liger's kernels, as `hardware` says."""
    hardware = session.config.hardware
    if hardware.residual == "bf16":
        round_residual(model)
    if compiles(session):
        compile_blocks(model, session.note)
        if hardware.kernels == "liger":
            session.note("hardware.kernels=liger: not used: hardware.compile=auto compiles blocks")
    elif hardware.kernels == "liger":
        use_liger(model, session.placement)


def compiles(session: Session) -> bool:
    """Whether the run compiles its blocks; `auto`: if compiling pays off."""
    choice, steps = session.config.hardware.compile, session.config.train.max_steps
    if session.config.train.router_aux_loss_coef:
        return False  # router logits cannot be recorded in compiled blocks
    if choice == "auto":
        cuda = session.runtime.device.type == "cuda"
        return cuda and (steps is None or steps >= WORTH_COMPILING)
    return choice == "blocks"


def shard_weights(
    session: Session, model: PreTrainedModel, key: str, dtype: torch.dtype | None
) -> None:
    """Shard a loaded model over the ranks. ConfigError for one whose forwards differ by rank.

    dtype: that its weights are converted to; None: unchanged.
    """
    if kernel_of(model) == "plain":  # as many forwards as a row needs
        raise ConfigError(
            f"{key}: {type(model).__name__} runs with attention=plain, which does not support "
            "several devices: use hardware.devices=1"
        )
    hardware = session.config.hardware
    nodes = max(1, session.ranks.size // hardware.devices)
    mesh = make_mesh(session.runtime.device.type, hardware.devices, nodes, hardware.sharding)
    shard(model, mesh, session.placement.dtype, partial(_arrived, type(model).__name__, dtype))


def _arrived(
    family: str, dtype: torch.dtype | None, weights: list[tuple[str, torch.nn.Parameter]]
) -> None:
    """Check and convert the weights of a block that is about to be sharded."""
    refuse_non_finite(family, weights)
    for _, weight in weights:
        if dtype is not None and weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def load_policy_and_data(session: Session, how: Loading = AS_TRAINED) -> Loaded:
    """The model to train (from the checkpoint when resuming) and the encoded splits. DataError if
    there are no training rows."""
    config = session.config
    refuse_rounding(config.hardware, session.runtime)
    tokenizer = load_tokenizer(config.model)
    source, saved, adaptation = config.model, session.snapshot, None
    folder = None if saved is None or is_sharded(saved.folder) else saved.folder
    if config.lora.name != "none":
        adaptation = Adaptation(config.lora, folder)
    elif folder is not None:
        source = replace(source, path=str(folder))
    how = replace(how, adaptation=adaptation, as_trained=True)
    started_from = None if source is config.model else content_at(config.model)
    model = load(session, source, tokenizer, how=how)
    content = content_in(model) if source is config.model else started_from
    digest = "none" if content is None else content.digest("model.path")
    session.kernel = kernel_of(model)
    if coefficient := config.train.router_aux_loss_coef:  # fail before a pass over the rows
        loss_function(type(model), coefficient)
    if every := config.hardware.activation_checkpointing:
        recompute_blocks(model, every)
    splits = load_data(session, context_length(model), tokenizer)
    if not splits.train:
        raise DataError(f"data={config.data.name}: no training rows are left")
    if line := held_out_line(config, splits):
        session.note(line)
    if seen := seen_before(config, splits):
        session.data_facts[SEEN] = seen
    session.choose_budget(tokenizer, splits)
    return Loaded(model, tokenizer, splits, base_provenance(config.model), digest)


def load_named(
    session: Session,
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    key: str = "stage.reference",
    how: Loading = Loading(),
) -> PreTrainedModel:
    """Another model by folder or hub id. ConfigError if its tokenizer differs from the policy's."""
    source = named_source(session.config.model, path, key)
    if load_tokenizer(source, key).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={path}: its tokenizer differs from that of model={session.config.model.name}, "
            "so their log-probabilities are not comparable"
        )
    return load(session, source, tokenizer, key, how)


def named_source(config: ModelConfig, path: str, key: str = "stage.reference") -> ModelConfig:
    """The source of another model, by folder or hub id, with the run's other model settings."""
    local = model_folder(path, key) if Path(path).is_dir() else None
    return replace(
        config, architecture=None, revision=None, tokenizer=None,
        path=str(local) if local else None, hub_id=None if local else path,
    )  # fmt: skip


def provenance_of(session: Session, loaded: Loaded, **entries: Any) -> dict[str, Any]:
    """Provenance saved with the trained weights. entries: additional ones of the stage."""
    config = session.config
    facts = {"stage": config.stage.name, **entries, "data": loaded.splits.origin}
    facts |= {"date": config.data.date, **quantized_base(config.lora)}
    return facts | ({BASE: loaded.content} if config.lora.name != "none" else {})


def identity_of(loaded: Loaded, **digests: str) -> dict[str, str]:
    """Digests that must be the same on resume. digests: additional ones of the stage."""
    return {"base": loaded.content, "rows": loaded.splits.fingerprint, **digests}


def base_provenance(config: ModelConfig) -> dict[str, Any]:
    return load_provenance(model_folder(config.path)) if config.path else {}
