"""Where weights come from: a local folder, a run folder, or a commit on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError

HUB_TIMEOUT_SECONDS = 5.0


def model_folder(path: str, key: str = "model.path") -> Path:
    """The HF folder meant by `path`: itself, or the final model of a run folder.

    key: where the user wrote it, for the message of the ConfigError.
    """
    folder = Path(path)
    if (folder / "final" / "config.json").is_file():
        return folder / "final"
    if (folder / "config.json").is_file():
        return folder
    unfinished = (
        " (this run has checkpoints but no final/: resume it)" * (folder / "checkpoints").is_dir()
    )
    raise ConfigError(
        f"{key}={path}: no config.json there nor in final/{unfinished}; "
        "give a Hugging Face model folder or a finished run folder"
    )


def source_of(config: ModelConfig, key: str = "model.path") -> tuple[str, dict[str, Any]]:
    """Folder or hub id, and what pins its commit for from_pretrained."""
    if config.path:
        return str(model_folder(config.path, key)), {}
    assert config.hub_id is not None  # checked with the configuration
    return hub_source(config.hub_id, config.revision, key)


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


def check_safetensors(source: str, key: str) -> None:
    """Pickled weights can run code when they are read, so they are not."""
    folder = Path(source)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{key}={source}: no .safetensors weights; pickled weights (.bin, .pt) are not read: "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )


@contextmanager
def loading(source: str, key: str) -> Iterator[None]:
    """Turn what loading a damaged or foreign folder raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}={source}: cannot be loaded: {first}") from error
