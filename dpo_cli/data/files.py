"""Read rows from local files, within limits. Errors name the file, and the line if there is one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr

from dpo_cli.config import DataConfig
from dpo_cli.durable.refusals import reason
from dpo_cli.errors import DataError

Row = dict[str, Any]

SAVED_DATASET = ("dataset_dict.json", "state.json")  # written by datasets.save_to_disk
MB = 2**20
ROW_BYTES = 256  # that a row takes in memory beside its texts, so that empty ones count, too
MOST_FILE_MB = 8192  # where data.max_file_mb is null
ROW_LISTS = ("data", "rows", "examples", "instances")  # names of a list of rows in an object
# A text is compressed to a tenth; what expands more than this was made to.
GZIP_RATIO, GZIP_MB = 100, 64


@dataclass(frozen=True)
class Most:
    """Bytes that one row and one file may have, uncompressed; `given`: by data.max_file_mb."""

    row: int
    file: int
    given: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> Most:
        mb = config.max_file_mb
        return cls(int(config.max_row_mb * MB), int((mb or MOST_FILE_MB) * MB), mb is not None)

    def for_file(self, path: Path) -> Most:
        """With the limit of a compressed file by its size, unless one is given."""
        if path.suffix not in OPEN or self.given:
            return self
        expanded = max(GZIP_MB * MB, GZIP_RATIO * path.stat().st_size)
        return Most(self.row, min(self.file, expanded))


@dataclass
class Meter:
    """Counts what is read of a file. Raises DataError beyond its limits."""

    path: Path
    most: Most
    read: int = 0

    def add(self, size: int, rows: int) -> None:
        """Of `rows` rows of `size` bytes together."""
        self.read += size + ROW_BYTES * rows
        if self.read > self.most.file:
            raise DataError(
                f"{self.path}: more than {self.most.file / MB:,.0f} MB of rows: split it, or set "
                "data.max_file_mb"
            )


def too_long(most: int) -> str:
    """most: bytes, or characters."""
    return f"longer than {most / MB:,.4g} MB: shorten it, or raise data.max_row_mb"


def read_file(path: Path, most: Most) -> list[Row]:
    """All rows of one file; its suffix decides how it is read."""
    reader = READERS.get(suffix(path))
    if reader is None:
        raise DataError(f"{path}: unknown file type; supported are {', '.join(READERS)}")
    try:
        meter = Meter(path, most.for_file(path))
        if path.suffix not in OPEN:  # known before it is read
            Meter(path, meter.most).add(path.stat().st_size, 0)
        return reader(path, meter)
    except (OSError, EOFError, zlib.error) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise DataError(f"{path}: unreadable or incomplete file ({why})") from error


def suffix(path: Path) -> str:
    """`.jsonl`, or `.jsonl.gz` of a compressed file."""
    return "".join(path.suffixes[-2:]) if path.suffix in OPEN else path.suffix


def bounded_lines(stream: IO[AnyStr], meter: Meter) -> Iterator[AnyStr]:
    """The lines of a file, none of which is read further than a row may be long."""
    number, most = 0, meter.most.row
    while line := stream.readline(most + 1):
        number += 1
        if len(line) > most:
            raise DataError(f"{meter.path}, line {number}: {too_long(most)}")
        meter.add(len(line), 1)
        yield line


def _read_json_lines(path: Path, meter: Meter) -> list[Row]:
    with OPEN.get(path.suffix, open)(path, "rb") as stream:
        return list(_json_rows(path, stream, meter))


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    assert mode == "rb"
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _json_rows(path: Path, stream: Any, meter: Meter) -> Iterator[Row]:
    for number, line in enumerate(bounded_lines(stream, meter), start=1):
        if not line.strip():
            continue
        yield _json_object(path, number, line)


def _json_object(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected an object, not {type(row).__name__}")
    return row


def unique(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object. ValueError for a duplicate key: one of the values would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return row


def _read_json(path: Path, meter: Meter) -> list[Row]:
    """A list of objects, or an object with one; JSON Lines files often have this suffix too."""
    with path.open("rb") as stream:
        first = stream.readline(meter.most.row + 1)
        if first.lstrip()[:1] == b"{" and (len(first) > meter.most.row or _is_json(first)):
            stream.seek(0)
            rows = list(_json_rows(path, stream, meter))
            return _inner(rows[0]) or rows if len(rows) == 1 else rows
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    listed = _inner(value) if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise DataError(f"{path}: expected a list of objects, or one object per line")
    return listed


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _inner(value: dict[str, Any]) -> list[Row] | None:
    """The rows of an object that has a list of them under a usual name."""
    lists = (value.get(name) for name in ROW_LISTS)
    found = (rows for rows in lists if isinstance(rows, list) and rows)
    return next((rows for rows in found if all(isinstance(row, dict) for row in rows)), None)


def _read_parquet(path: Path, meter: Meter) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    rows: list[Row] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            refuse_twice(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096):  # rows, so that a bomb shows early
                meter.add(batch.nbytes, batch.num_rows)
                rows += batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    return rows


def _read_arrow(path: Path, meter: Meter) -> list[Row]:
    """Arrow's stream format, which the datasets library writes, or its file format."""
    import pyarrow

    rows: list[Row] = []
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            for batch in batches:
                refuse_twice(path, batch.schema.names)
                meter.add(batch.nbytes, batch.num_rows)
                rows += batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable arrow file ({error})") from error
    return rows


def refuse_twice(path: Path, names: Sequence[str]) -> None:
    """Raise DataError where two columns have one name: all values of one would be lost."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: two columns are named {twice[0]!r}; rename one")


def _read_csv(path: Path, meter: Meter) -> list[Row]:
    """The first line names the columns; every value is a string."""
    csv.field_size_limit(min(meter.most.row, 2**31 - 1))  # the default rejects over 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as stream:
        mark = "\t" if path.suffix == ".tsv" else ","
        reader = csv.DictReader(bounded_lines(stream, meter), strict=True, delimiter=mark)
        try:
            refuse_twice(path, list(reader.fieldnames or ()))
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: {_told(error, meter)}") from error
    for number, row in enumerate(rows):
        if None in row:
            raise DataError(f"{path}, row {number}: more values than columns")
    return rows


def _told(error: Exception, meter: Meter) -> str:
    large = "field larger than field limit" in str(error)
    return f"a cell is {too_long(meter.most.row)}" if large else str(error)


OPEN: dict[str, Callable[[Path, Any], Any]] = {".gz": gzip.open, ".zst": _open_zstd}

READERS: dict[str, Callable[[Path, Meter], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_csv,
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
