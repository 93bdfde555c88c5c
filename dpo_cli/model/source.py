"""Sources of weights: a local folder, a run folder, or a commit on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError, UserError
from dpo_cli.model.vetting import (
    ADAPTER_CONFIG,
    CONFIG,
    HOLDS_ADAPTER,
    one_line,
    read_object,
    vet,
    vet_adapter,
    vet_config,
)

HUB_TIMEOUT_SECONDS = 5.0
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHARDS = "shards"  # in checkpoints of several ranks, see distributed/sharded_checkpoint.py
PICKLED = ("pytorch_model*.bin", "model*.pt", "*.pth")
LONGEST_ID = 96  # characters, of the hub
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # the oldest have no owner: gpt2


def model_folder(path: str, key: str = "model.path") -> Path:
    """The Hugging Face or PEFT folder at `path`, or the final model of a run folder there.

    key: configuration key of the path, for messages. Raises ConfigError.
    """
    for folder in (Path(path) / "final", Path(path)):
        if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return folder
    folder = Path(path)
    if (folder / SHARDS).is_dir():
        raise ConfigError(
            f"{key}={path}: is a sharded checkpoint, which only resume=<run folder> can load; use "
            "the run's final/"
        )
    unfinished = (
        " (this run has checkpoints but no final/: resume it)" * (folder / "checkpoints").is_dir()
    )
    raise ConfigError(
        f"{key}={path}: no config.json there or in final/{unfinished}; "
        "use a Hugging Face model folder or a finished run folder"
    )


@dataclass(frozen=True)
class Origin:
    """A base model and the adapter on it, if any: its folder and its configuration."""

    base: ModelConfig
    adapter: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter_files(self) -> list[Path]:
        """The files that define the adapter."""
        if self.adapter is None:
            return []
        return [self.adapter / ADAPTER_CONFIG, self.adapter / ADAPTER_WEIGHTS]

    @property
    def task(self) -> str | None:
        """PEFT's task type of the adapter: CAUSAL_LM, SEQ_CLS."""
        return self.facts.get("task_type")

    def identity(self) -> tuple[str, str | None]:
        """The base as adapter configurations name it: absolute folder, or hub id and commit."""
        if self.base.path:
            return str(model_folder(self.base.path).resolve()), None
        assert self.base.hub_id is not None
        revision = self.base.revision
        return self.base.hub_id, hub_commit(self.base.hub_id, revision) or revision


def origin_of(config: ModelConfig, key: str = "model.path") -> Origin:
    """The base model and adapter of a model configuration. Raises ConfigError for an adapter whose
    base is missing."""
    if not config.path:
        return Origin(config)
    folder = model_folder(config.path, key)
    if (folder / "config.json").is_file():
        return Origin(config)
    where = f"{key}={config.path}"
    facts = read_object(folder / ADAPTER_CONFIG, where)
    if not facts.get("base_model_name_or_path"):
        raise ConfigError(
            f"{where}: {ADAPTER_CONFIG} does not name the base model; set "
            "base_model_name_or_path there to its folder or hub id"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{where}: is an adapter without {ADAPTER_WEIGHTS}, the supported format")
    vet_adapter(facts, largest_dimension(folder / ADAPTER_WEIGHTS, where), where)
    named = facts["base_model_name_or_path"]
    local = os.path.isdir(named)  # unlike Path's, it takes any text
    if not local and not (HUB_ID.fullmatch(named) and len(named) <= LONGEST_ID):
        raise ConfigError(
            f"{where}: is an adapter of {named[:LONGEST_ID]}, which does not exist: restore it, or "
            f"set base_model_name_or_path in {folder / ADAPTER_CONFIG} to its new folder"
        )
    at = {"path": named, "hub_id": None, "revision": None} if local else {
        "path": None, "hub_id": named, "revision": facts.get("revision")
    }  # fmt: skip
    base = replace(config, architecture=None, **at)
    if base.path and not (model_folder(base.path, where) / "config.json").is_file():
        raise ConfigError(f"{where}: is an adapter of an adapter ({named}): merge the latter first")
    return Origin(base, folder, facts)


def source_of(config: ModelConfig, key: str = "model.path") -> tuple[str, dict[str, Any]]:
    """Folder or hub id of the (base) weights, and from_pretrained's arguments for the commit."""
    base = origin_of(config, key).base
    if base.path:
        return str(model_folder(base.path, key)), {}
    assert base.hub_id is not None  # checked with the configuration
    return hub_source(base.hub_id, base.revision, key)


def tokenizer_source(config: ModelConfig, key: str = "model.path") -> tuple[str, dict[str, Any]]:
    """As `source_of`, for the tokenizer: the adapter's folder, if it has one."""
    adapter = origin_of(config, key).adapter
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        return str(adapter), {}
    return source_of(config, key)


def hub_source(hub_id: str, revision: str | None, key: str) -> tuple[str, dict[str, Any]]:
    """The hub id and commit, or without a network the folder in the local cache."""
    commit = hub_commit(hub_id, revision)
    if commit is not None:
        return hub_id, {"revision": commit}
    try:
        return snapshot_download(hub_id, revision=revision, local_files_only=True), {}
    except (LocalEntryNotFoundError, OSError, ValueError, HTTPError) as error:
        raise ConfigError(
            f"{hub_id} cannot be loaded from the Hugging Face hub (no network, or a gated or wrong "
            f"id) and is not in the local cache: use a local folder with {key}=<folder>"
        ) from error


@cache
def hub_commit(hub_id: str, revision: str | None) -> str | None:
    """The commit of `revision` (default: main), or None if the hub does not answer.

    One request, as from_pretrained retries for most of a minute.
    """
    try:
        return HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except (OSError, ValueError, HTTPError):
        return None


def check_safetensors(source: str, key: str, needed: bool = True) -> None:
    """ConfigError for pickled weights, which can execute code when loaded. needed: whether a
    folder without weights is an error (a plan reads only its configuration)."""
    folder = Path(source)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    if any(list(folder.glob(names)) for names in PICKLED):
        raise ConfigError(
            f"{key}={source}: no .safetensors weights; pickled weights (.bin, .pt) are not loaded: "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    if needed:
        raise ConfigError(
            f"{key}={source}: has a config.json but no .safetensors weights; download them as well "
            "(only dry_run=true works without weights)"
        )


def largest_dimension(weights: Path, where: str) -> int:
    """Of all tensors in a safetensors file, of which only the header is read."""
    try:
        with safe_open(weights, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: {weights.name} cannot be read: {one_line(error)}") from None
    return max((size for shape in shapes for size in shape), default=0)


@contextmanager
def loading(source: str, key: str, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Vet a folder's files, then turn whatever reading them raises into a ConfigError: libraries
    raise any kind of error for a damaged or hostile folder, tokenizers `Exception` itself.

    options: arguments to from_pretrained of a hub id, whose config.json is then vetted.
    """
    where = f"{key}={source}"
    try:
        if Path(source).is_dir():
            vet(Path(source), where)
        elif options is not None:
            from transformers.utils import cached_file

            quiet = {"_raise_exceptions_for_missing_entries": False}
            config, adapter = (
                cached_file(source, name, **quiet, **options) for name in (CONFIG, ADAPTER_CONFIG)
            )
            if config:
                vet_config(Path(config), where)
            if adapter:  # transformers would load it, with all that it says
                raise ConfigError(f"{where}: {HOLDS_ADAPTER}: download each to a folder of its own")
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: cannot be loaded: {one_line(error)}") from error
