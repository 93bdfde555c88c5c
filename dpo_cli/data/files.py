"""Read rows from local files. Errors name the file and the line, if there is one."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.errors import DataError

Row = dict[str, Any]

SAVED_DATASET = ("dataset_dict.json", "state.json")  # written by datasets.save_to_disk


def read_file(path: Path) -> list[Row]:
    """All rows of one file; its suffix decides how it is read."""
    reader = READERS.get(suffix(path))
    if reader is None:
        raise DataError(f"{path}: unknown file type; supported are {', '.join(READERS)}")
    try:
        return reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable or incomplete file ({error})") from error


def suffix(path: Path) -> str:
    """`.jsonl`, or `.jsonl.gz` of a compressed file."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _read_json_lines(path: Path) -> list[Row]:
    open_binary = gzip.open if path.suffix == ".gz" else open
    with open_binary(path, "rb") as lines:
        return list(_json_rows(path, lines))


def _json_rows(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        yield _json_object(path, number, line)


def _json_object(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected an object, not {type(row).__name__}")
    return row


def _read_json(path: Path) -> list[Row]:
    """A list of objects; JSON Lines files often have this suffix too."""
    content = path.read_bytes()
    if content.lstrip()[:1] == b"{":
        return list(_json_rows(path, content.splitlines()))
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects, or one object per line")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _read_csv(path: Path) -> list[Row]:
    """The first line names the columns; every value is a string."""
    csv.field_size_limit(2**31 - 1)  # the default rejects values over 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    for number, row in enumerate(rows):
        if None in row:
            raise DataError(f"{path}, row {number}: more values than columns")
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_DATASET)


def folder_files(folder: Path) -> list[Path]:
    """The data files of a folder, by name, or of its `data/`, as in repositories on the hub."""
    for place in (folder, folder / "data"):
        inside = sorted(place.iterdir()) if place.is_dir() else []
        if files := [p for p in inside if p.is_file() and _has_rows(p)]:
            return files
    raise DataError(f"{folder}: no data files ({', '.join(READERS)}) in this folder")


def _has_rows(path: Path) -> bool:
    """Whether a file is data, not metadata of the hub or the datasets library."""
    return suffix(path) in READERS and path.name not in ("dataset_info.json", "dataset_infos.json")


def files_of_split(files: Sequence[Path], split: str | None) -> list[Path]:
    """Files whose name begins with the split's (`train-00000.parquet`); none without a split."""
    if split is None:
        return []
    return [p for p in files if p.name == split or p.name.startswith((f"{split}.", f"{split}-"))]
