"""Sources of rows: local files, a folder of datasets.save_to_disk, or the Hugging Face hub."""

from __future__ import annotations

import glob
import hashlib
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_cli.config import DataConfig
from dpo_cli.data.files import (
    SAVED_DATASET,
    Most,
    Row,
    files_of_split,
    folder_files,
    is_saved_dataset,
    read_file,
)
from dpo_cli.durable import file_digest, mismatch
from dpo_cli.durable.refusals import as_refusal
from dpo_cli.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

Which = Literal["train", "eval"]

HUB_TIMEOUT_SECONDS = 5.0
AUTO = "auto"
# Common names of held-out splits.
USUAL = ("test", "validation", "valid", "dev", "eval", "test_prefs")
ON_HUB = {
    "hh": "test",
    "shp": "test",
    "tldr": "test",
    "imdb": "test",
    "ultrafeedback": "test_prefs",
}


@dataclass(frozen=True)
class Source:
    """What to read: one of `files`, `saved` (a save_to_disk folder) and `hub_id`.

    origin: name for messages. revision: commit on the hub.
    """

    origin: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Rows:
    """Raw rows and their source."""

    rows: Sequence[Row] | Dataset
    origin: str
    revision: str | None

    def numbered(self, max_rows: int | None, seed: int) -> Iterator[tuple[int, Row]]:
        """(row number, row), in order: all of them, or a seeded sample of `max_rows`, as several
        public datasets are sorted by label or topic.
        """
        count = len(self.rows)
        if max_rows is None or max_rows >= count:
            yield from enumerate(self.rows)
            return
        picked = sorted(random.Random(seed).sample(range(count), max_rows))
        if isinstance(self.rows, Sequence):
            yield from ((i, self.rows[i]) for i in picked)
        else:  # a Dataset reads a selection faster than row by row
            yield from zip(picked, self.rows.select(picked), strict=True)


def read_rows(config: DataConfig, which: Which) -> Rows:
    """The rows of one split.

    Raises ConfigError if the configuration names none, DataError if it cannot be read.
    """
    source = find_source(config, which)
    if source is None:
        raise ConfigError(f"data={config.name}: no {which} split; set data.eval_path=")
    return read_source(source, Most.of(config))


def find_source(config: DataConfig, which: Which) -> Source | None:
    """The source of a split; None if there is no eval split. Reads no rows."""
    held = config.eval_split
    if which == "eval" and config.eval_path is not None:
        place = Path(config.eval_path).expanduser()
        usual = _local_eval_source(place, AUTO) if held == AUTO else None
        split = None if held == AUTO else held
        return usual or _local_source(config.eval_path, "data.eval_path", split, ())
    if config.path is not None and which == "train":
        others = USUAL if held == AUTO else (held,)
        return _local_source(config.path, "data.path", config.train_split, others)
    if config.path is not None:
        return _local_eval_source(Path(config.path).expanduser(), held)
    if config.hub_id is None:
        raise ConfigError(f"data={config.name}: set data.path=<file or folder> or data.hub_id=")
    split = config.train_split if which == "train" else held
    if split == AUTO:
        split = ON_HUB.get(config.name) or _usual_hub_split(config)
    return None if split is None else _hub_source(config, config.hub_id, split)


def read_source(source: Source, most: Most) -> Rows:
    """The rows of a source. Raises DataError where they cannot be read, or are too many bytes."""
    if source.hub_id is not None:
        return Rows(_load_from_hub(source), source.origin, source.revision)
    if source.saved is not None:
        return Rows(_load_from_disk(source.saved), source.origin, None)
    for path in source.files:  # some, such as those of stage=label, have a checksum beside them
        if reason := mismatch(path):
            raise DataError(reason)
    rows = [row for path in source.files for row in read_file(path, most)]
    return Rows(rows, source.origin, None)


def content_digest(source: Source) -> str:
    """A digest that identifies the rows: of the files' sha256, or the hub's commit and split."""
    if source.hub_id is not None:
        return f"{source.hub_id}:{source.hub_config}:{source.split}@{source.revision}"
    files: Sequence[Path] = source.files
    if source.saved is not None:
        files = sorted(p for p in source.saved.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for path in files:
        try:
            digest = file_digest(path)
        except OSError as error:
            raise DataError(str(as_refusal(error, path) or error)) from error
        total.update(os.fsencode(path.name) + f" {digest}\n".encode())
    return total.hexdigest()


def _local_source(
    path: str, key: str, split: str | None, other_splits: Sequence[str | None]
) -> Source:
    """A file, or a folder: its files named after the split, else all but the other splits'."""
    place = Path(path).expanduser()
    if place.is_file():
        return Source(place.name, files=(place,))
    if not place.is_dir():
        matching = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        if files := [file for file in matching if file.is_file()]:
            return Source(path, files=tuple(files))
        raise DataError(f"{key}={path}: no such file or folder")
    if is_saved_dataset(place):
        return Source(place.name, saved=_saved_split(place, split, key))
    files = folder_files(place)
    others = [p for other in other_splits for p in files_of_split(files, other)]
    chosen = files_of_split(files, split) or [p for p in files if p not in others]
    if not chosen:
        raise DataError(f"{key}={path}: no file of split {split!r} in this folder")
    return Source(place.name, files=tuple(chosen))


def _local_eval_source(place: Path, split: str | None) -> Source | None:
    """The eval split in the folder of the training rows. DataError if a named one is missing."""
    if split is None or (split == AUTO and not place.is_dir()):
        return None
    if not place.is_dir():
        raise DataError(
            f"data.eval_split={split}: {place} is a single file without splits: set "
            "data.eval_path= or data.eval_rows="
        )
    for name in USUAL if split == AUTO else (split,):
        if is_saved_dataset(place):
            if is_saved_dataset(place / name):
                return Source(f"{place.name}/{name}", saved=place / name)
        elif files := files_of_split(folder_files(place), name):
            return Source(f"{place.name}/{name}", files=tuple(files))
    if split == AUTO:
        return None
    raise DataError(
        f"data.eval_split={split}: {place} has no such split (it has: "
        f"{', '.join(_splits_in(place)) or 'a single unnamed split'})"
    )


def _splits_in(place: Path) -> list[str]:
    """Names of a saved dataset's splits, or the prefixes of a folder's file names."""
    if is_saved_dataset(place):
        return sorted(p.name for p in place.iterdir() if is_saved_dataset(p))
    return sorted({re.split(r"[.-]", p.name)[0] for p in folder_files(place)})


def _saved_split(folder: Path, split: str | None, key: str) -> Path:
    """The folder of one split of a saved dataset; itself if it has no splits."""
    if not (folder / SAVED_DATASET[0]).is_file():
        return folder
    splits = sorted(p.name for p in folder.iterdir() if is_saved_dataset(p))
    if split in splits:
        return folder / str(split)
    if len(splits) == 1:
        return folder / splits[0]
    raise DataError(f"{key}={folder}: no split {split!r} (it has: {', '.join(splits)})")


def _load_from_disk(folder: Path) -> Dataset:
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder}: cannot be read as a folder of datasets.save_to_disk ({first_line(error)})"
        ) from error


def _hub_source(config: DataConfig, hub_id: str, split: str) -> Source:
    commit = resolve_commit(hub_id, config.revision)
    origin = f"{hub_id}@{commit[:12]}/{split}"
    return Source(
        origin, hub_id=hub_id, hub_config=config.hub_config, revision=commit, split=split
    )  # fmt: skip


def _usual_hub_split(config: DataConfig) -> str | None:
    """The first held-out split with a common name that a dataset of the hub has.

    Offline, where splits cannot be listed, there is none: what is cached is the training split.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    hub_id = str(config.hub_id)
    commit = resolve_commit(hub_id, config.revision)
    with _hub_errors(hub_id):
        names = datasets.get_dataset_split_names(hub_id, config.hub_config, revision=commit)
    return next((name for name in USUAL if name in names), None)


@cache  # so that train and eval rows of a run come from one commit
def resolve_commit(hub_id: str, revision: str | None) -> str:
    """The commit of a revision (default: main); needs no network if it is a commit and offline.

    One request with a short timeout, as load_dataset retries for half a minute.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    with _hub_errors(hub_id):
        info = HfApi().dataset_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    assert info.sha is not None
    return info.sha


def _load_from_hub(source: Source) -> Dataset:
    import datasets

    hub_id = str(source.hub_id)
    with _hub_errors(hub_id):
        return datasets.load_dataset(
            hub_id, source.hub_config, split=source.split, revision=source.revision
        )


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turn errors of the hub's clients (no network, no such dataset, gated) into a DataError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # the base of its HTTP client's errors

    try:
        yield
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        raise DataError(
            f"cannot read {hub_id} from the hub ({first_line(error)}): "
            "use a local copy with data.path=<file or folder>"
        ) from error
