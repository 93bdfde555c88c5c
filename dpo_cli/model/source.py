"""Where weights come from: a local folder, a run folder, or a commit on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError

HUB_TIMEOUT_SECONDS = 5.0
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, in place of a config.json
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHARDS = "shards"  # in checkpoints of many ranks, see train/sharded.py
PICKLED = ("pytorch_model*.bin", "model*.pt", "*.pth")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # the oldest have no owner: gpt2


def model_folder(path: str, key: str = "model.path") -> Path:
    """The HF or PEFT folder meant by `path`: itself, or the final model of a run folder.

    key: where the user wrote it, for the message of the ConfigError.
    """
    for folder in (Path(path) / "final", Path(path)):
        if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return folder
    folder = Path(path)
    if (folder / SHARDS).is_dir():
        raise ConfigError(
            f"{key}={path}: is a checkpoint of several devices, which only resume=<run folder> "
            "reads; give the run's final/"
        )
    unfinished = (
        " (this run has checkpoints but no final/: resume it)" * (folder / "checkpoints").is_dir()
    )
    raise ConfigError(
        f"{key}={path}: no config.json there nor in final/{unfinished}; "
        "give a Hugging Face model folder or a finished run folder"
    )


@dataclass(frozen=True)
class Origin:
    """Weights of their own, and the adapter over them, if any: its folder and its configuration."""

    base: ModelConfig
    adapter: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter_files(self) -> list[Path]:
        """What decides the adapter's function."""
        if self.adapter is None:
            return []
        return [self.adapter / ADAPTER_CONFIG, self.adapter / ADAPTER_WEIGHTS]

    @property
    def task(self) -> str | None:
        """PEFT's name of what the adapter makes of the base: CAUSAL_LM, SEQ_CLS."""
        return self.facts.get("task_type")

    def identity(self) -> tuple[str, str | None]:
        """What an adapter's configuration says of its base: absolute folder, or hub id, commit."""
        if self.base.path:
            return str(model_folder(self.base.path).resolve()), None
        assert self.base.hub_id is not None
        revision = self.base.revision
        return self.base.hub_id, hub_commit(self.base.hub_id, revision) or revision


def origin_of(config: ModelConfig, key: str = "model.path") -> Origin:
    """Where the weights that `config` names begin. Raises ConfigError for an adapter without
    its base."""
    if not config.path:
        return Origin(config)
    folder = model_folder(config.path, key)
    if (folder / "config.json").is_file():
        return Origin(config)
    where = f"{key}={config.path}"
    try:
        facts = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        named = str(facts["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: {ADAPTER_CONFIG} does not name the adapter's base model ({error!r}); write "
            "its folder or hub id as base_model_name_or_path there"
        ) from None
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{where}: is an adapter without {ADAPTER_WEIGHTS}; nothing else is read")
    local = Path(named)
    if not local.is_dir() and not HUB_ID.fullmatch(named):
        raise ConfigError(
            f"{where}: is an adapter of the weights in {named}, which are gone: put them back, or "
            f"write their new folder as base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        )
    at = {"path": named, "hub_id": None, "revision": None} if local.is_dir() else {
        "path": None, "hub_id": named, "revision": facts.get("revision")
    }  # fmt: skip
    base = replace(config, architecture=None, **at)
    if base.path and not (model_folder(base.path, where) / "config.json").is_file():
        raise ConfigError(f"{where}: is an adapter of an adapter ({named}): merge that one first")
    return Origin(base, folder, facts)


def source_of(config: ModelConfig, key: str = "model.path") -> tuple[str, dict[str, Any]]:
    """Folder or hub id of the weights, under an adapter its base's; and what pins its commit for
    from_pretrained."""
    base = origin_of(config, key).base
    if base.path:
        return str(model_folder(base.path, key)), {}
    assert base.hub_id is not None  # checked with the configuration
    return hub_source(base.hub_id, base.revision, key)


def tokenizer_source(config: ModelConfig, key: str = "model.path") -> tuple[str, dict[str, Any]]:
    """As `source_of`, of the tokenizer: an adapter's own folder, where it has one."""
    adapter = origin_of(config, key).adapter
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        return str(adapter), {}
    return source_of(config, key)


def hub_source(hub_id: str, revision: str | None, key: str) -> tuple[str, dict[str, Any]]:
    """The hub id and commit; without a network the folder of the local cache."""
    commit = hub_commit(hub_id, revision)
    if commit is not None:
        return hub_id, {"revision": commit}
    try:
        return snapshot_download(hub_id, revision=revision, local_files_only=True), {}
    except (LocalEntryNotFoundError, OSError, ValueError, HTTPError) as error:
        raise ConfigError(
            f"{hub_id} is neither on the Hugging Face hub as seen from here nor in the local "
            "cache (no network, or a gated or wrong id): give a local folder with "
            f"{key}=/folder/with/config.json"
        ) from error


@cache
def hub_commit(hub_id: str, revision: str | None) -> str | None:
    """The commit `revision` (default: main) points to, or None where the hub does not answer.

    One request: from_pretrained alone repeats its own for most of a minute.
    """
    try:
        return HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except (OSError, ValueError, HTTPError):
        return None


def check_safetensors(source: str, key: str, needed: bool = True) -> None:
    """Pickled weights can run code when they are read, so they are not. needed: whether a folder
    without any weights will not do; a plan takes its configuration alone."""
    folder = Path(source)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    if any(list(folder.glob(names)) for names in PICKLED):
        raise ConfigError(
            f"{key}={source}: no .safetensors weights; pickled weights (.bin, .pt) are not read: "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    if needed:
        raise ConfigError(
            f"{key}={source}: has a config.json but no .safetensors weights; download them, too "
            "(without weights there is dry_run=true)"
        )


@contextmanager
def loading(source: str, key: str) -> Iterator[None]:
    """Turn what loading a damaged or foreign folder raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}={source}: cannot be loaded: {first}") from error
