"""Checkpoints: written atomically, verified by sha256 before they are loaded.

    checkpoints/step-120/  model.safetensors config.json tokenizer*   (Hugging Face layout; for an
                           adapter PEFT's adapter_model.safetensors adapter_config.json)
                           heads.safetensors   (modules trained beside the model, such as PPO's
                           value head)
                           carried.safetensors   (tensors of the stage, such as a moving reference)
                           optimizer.safetensors optimizer.json rng.safetensors state.json
                           MANIFEST.json   (sha256 and size of each file; world size, run)

A run of several ranks has shards/ (`distributed.sharded_checkpoint`) in place of model.safetensors
and optimizer.safetensors; the folder must be on a shared disk.

A save writes `.tmp-step-N-<id>/`, syncs every file, writes the manifest, syncs the folder
and renames it: a folder named `step-N` is complete or was damaged later, which the
manifest shows. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.distributed import sharded_checkpoint
from dpo_cli.distributed.fsdp import full_tensor, reshard
from dpo_cli.distributed.ranks import ALONE, Ranks
from dpo_cli.durable import damage, publish_folder
from dpo_cli.durable.temporary import remove_folder
from dpo_cli.errors import CheckpointError
from dpo_cli.train import contents
from dpo_cli.train.contents import HEADS, OPTIMIZER, RNG, Contents

LAYOUT = 1  # raise it when older checkpoints can no longer be read
STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Snapshot:
    """A verified checkpoint. skipped: newer folders that failed verification, and why."""

    folder: Path
    step: int
    state: dict[str, Any]
    skipped: list[str]


def steps_in(folder: Path) -> list[int]:
    """Step numbers of the published checkpoints, ascending."""
    matches = (STEP_FOLDER.fullmatch(p.name) for p in folder.glob("step-*"))
    return sorted(int(m.group(1)) for m in matches if m)


def newest_valid(folder: Path) -> Snapshot:
    """The newest checkpoint whose files all verify. Raises CheckpointError if there is none."""
    skipped: list[str] = []
    for step in reversed(steps_in(folder)):
        candidate = folder / f"step-{step}"
        reason = damage(candidate)
        if reason is None:
            state = json.loads((candidate / "state.json").read_text(encoding="utf-8"))
            _check_layout(candidate, state.get("layout", LAYOUT))
            return Snapshot(candidate, step, state, skipped)
        skipped.append(f"{candidate.name}: {reason}")
    detail = "; ".join(skipped) or "there is none"
    raise CheckpointError(f"{folder}: no valid checkpoint to resume from ({detail})")


def _check_layout(folder: Path, layout: int) -> None:
    """Raise CheckpointError if another version of dpo-run wrote the checkpoint differently."""
    if layout != LAYOUT:
        raise CheckpointError(
            f"{folder}: has layout {layout}, this version of dpo-run resumes from layout {LAYOUT}: "
            "finish the run with the version in its versions.json, or start a new run from its "
            f"weights with model.path={folder}"
        )


def save(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: Optimizer,
    state: dict[str, Any],
    provenance: dict[str, Any],
    heads: torch.nn.Module | None = None,
    ranks: Ranks = ALONE,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write `folder/step-N` (a collective). `state` and `provenance` must be JSON.

    facts: entries about the run for the manifest.
    """
    if ranks.size == 1:
        files = contents.of_model(model, contents.of_tokenizer(tokenizer), provenance)
        files |= contents.of_training(optimizer, heads, state_json(step, state))
        return publish(folder, step, files, facts)

    def write(target: Path) -> None:
        sharded_checkpoint.write(ranks.from_first(lambda: target), _with(model, heads), optimizer)
        contents.of_generators(state_json(step, state)).write(target)

    published = folder / f"step-{step}"
    reshard(model)
    if ranks.first:
        publish_folder(published, write, {"world_size": ranks.size, **(facts or {})})
    else:
        sharded_checkpoint.write(
            ranks.from_first(lambda: published), _with(model, heads), optimizer
        )
    ranks.wait()  # a rank that fails in its next step would end the one still writing
    return published


def publish(folder: Path, step: int, files: Contents, facts: dict[str, Any] | None = None) -> Path:
    """Write `folder/step-N` atomically, in a single-process run."""
    published = folder / f"step-{step}"
    publish_folder(published, files.write, {"world_size": 1, **(facts or {})})
    return published


def state_json(step: int, state: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint's state.json."""
    return {"step": step, "layout": LAYOUT, **state}


def _with(model: torch.nn.Module, heads: torch.nn.Module | None) -> torch.nn.Module:
    return model if heads is None else torch.nn.ModuleList([model, heads])


def save_final(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    provenance: dict[str, Any],
    ranks: Ranks = ALONE,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save the final model and other `files`, replacing an older folder only once complete.
    A collective."""
    weights = None if ranks.size == 1 else gathered_weights(model, ranks)
    if ranks.first:
        texts = {**contents.of_tokenizer(tokenizer), **(files or {})}
        publish_folder(target, contents.of_model(model, texts, provenance, weights).write)
    ranks.wait()


def gathered_weights(model: PreTrainedModel, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The full state dict, on the CPU of rank 0; empty on the other ranks."""
    reshard(model)
    weights: dict[str, torch.Tensor] = {}
    once = {id(value): name for name, value in model.named_parameters()}
    tied = {
        name
        for name, value in model.named_parameters(remove_duplicate=False)
        if once[id(value)] != name
    }
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    for name, value in model.state_dict().items():
        if name in tied or (hasattr(model, "adapter_files") and name not in trained):
            continue
        full = full_tensor(value.detach())
        if ranks.first:
            weights[name] = full.cpu()
    return weights


def prune(folder: Path, step: int, keep: int, protect: int | None) -> None:
    """After saving `step`: remove all but the `keep` newest up to it and `protect` (the best).

    Later steps are damaged folders that a resume skipped; they are removed as well.
    """
    steps = steps_in(folder)
    remaining = {*[s for s in steps if s <= step][-keep:], protect}
    for old in steps:
        if old not in remaining:
            remove_folder(folder / f"step-{old}")


def restore(
    snapshot: Snapshot,
    model: PreTrainedModel,
    optimizer: Optimizer,
    heads: torch.nn.Module | None = None,
) -> None:
    """Restore optimizer state, heads and random generators. The model's weights are restored
    only from a sharded checkpoint; otherwise the caller has loaded them."""
    if sharded_checkpoint.is_sharded(snapshot.folder):
        sharded_checkpoint.read(snapshot.folder, _with(model, heads), optimizer)
        _read_rng(snapshot.folder)
        return
    if heads is not None:
        heads.load_state_dict(load_file(snapshot.folder / HEADS))
    saved = json.loads((snapshot.folder / "optimizer.json").read_text(encoding="utf-8"))
    flat = {**saved["scalars"], **load_file(snapshot.folder / OPTIMIZER)}
    state: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        index, *keys, last = name.split("/")
        node: dict[str, Any] = state.setdefault(int(index), {})
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = value
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        sharded_checkpoint.distribute(state, optimizer)
    else:
        optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    _read_rng(snapshot.folder)


def _read_rng(folder: Path) -> None:
    states = load_file(folder / RNG)
    other = json.loads((folder / "rng.json").read_text(encoding="utf-8"))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, words, gauss = other["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = other["numpy"]
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))  # noqa: NPY002
