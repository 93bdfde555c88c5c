"""Convert another tool's data settings to keys of dpo-run's `data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.durable.bounded_yaml import read_yaml
from dpo_cli.errors import ConfigError

DATASETS = ("hh", "shp", "se")
COLUMNS = {"prompt": "prompt_field", "response": "chosen_field", "chosen": "chosen_field",
           "rejected": "rejected_field", "system": "system_field", "tools": "tools_field",
           "kto_tag": "label_field", "messages": "chosen_field"}  # fmt: skip

ONE = "one data set at a time: data.path or data.hub_id"
# Names of columns by which a format is recognized (data/adapters/formats.py).
USUAL = {
    "prompt", "question", "instruction", "input", "history", "system", "tools", "output",
    "response", "completion", "chosen", "rejected", "conversations", "messages", "label",
}  # fmt: skip


@dataclass
class Conversion:
    """theirs: the settings; folder: of their file. words: ours, key -> value; left: why not."""

    tool: str
    theirs: dict[str, Any]
    folder: Path
    words: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)

    def first(self, *names: str) -> Any:
        """The first of their settings that is set, which counts as carried."""
        for name in names:
            if self.theirs.get(name) is not None:
                self.carried.add(name)
                return self.theirs[name]
        return None

    def choose(self, key: str, name: str, choices: Mapping[str, str]) -> None:
        """One of their choices as ours."""
        value = self.first(name)
        if value is None:
            return
        if str(value).lower() in choices:
            self.words[key] = choices[str(value).lower()]
        else:
            self.drop(name, f"{key} has no {value}")

    def drop(self, name: str, why: str) -> None:
        self.carried.discard(name)
        self.left[name] = why


def is_local(name: str, folder: Path) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (folder / name).exists()


def read_data(result: Conversion) -> None:
    words, named = result.words, result.first("dataset_name", "datasets", "dataset")
    if result.tool == "axolotl":
        _axolotl_data(result, named)
    elif result.tool == "LLaMA-Factory":
        _llama_factory_data(result, named)
    elif isinstance(named, list) and len(named) == 1 and named[0] in DATASETS:
        words["data"] = named[0]
    elif isinstance(named, str):
        words["data"] = "jsonl"
        words["data.path" if is_local(named, result.folder) else "data.hub_id"] = named
    elif named is not None:
        name = next(n for n in ("dataset_name", "datasets", "dataset") if n in result.carried)
        result.drop(name, ONE)
    _mixture(result)
    cut = result.first("truncation_mode")
    if cut in ("keep_end", "keep_start"):
        words["data.keep_prompt"] = cut.removeprefix("keep_")


def _mixture(result: Conversion) -> None:
    """The alignment handbook's dataset_mixer, or dataset_mixture, of a single data set."""
    mixer, mixture = result.first("dataset_mixer"), result.first("dataset_mixture")
    listed = mixture.get("datasets") if isinstance(mixture, dict) else None
    if isinstance(mixer, dict) and len(mixer) == 1:
        result.words |= {"data": "jsonl", "data.hub_id": next(iter(mixer))}
        splits = result.first("dataset_splits")
        if isinstance(splits, list) and splits:
            result.words["data.train_split"] = splits[0]
            result.words |= {"data.eval_split": splits[1]} if len(splits) > 1 else {}
    elif isinstance(listed, list) and len({str(part.get("id")) for part in listed}) == 1:
        result.words |= {"data": "jsonl", "data.hub_id": str(listed[0]["id"])}
        result.words |= {"data.train_split": listed[0].get("split", "train")}
    else:
        for name in result.theirs.keys() & {"dataset_mixer", "dataset_mixture"}:
            result.drop(name, ONE)


def _axolotl_data(result: Conversion, named: Any) -> None:
    if not isinstance(named, list) or not named or not isinstance(named[0], dict):
        return
    first, words = named[0], result.words
    words["data"] = "jsonl"
    path = str(first.get("data_files") or first.get("path"))
    words["data.path" if is_local(path, result.folder) or first.get("data_files")
          else "data.hub_id"] = path  # fmt: skip
    if first.get("split"):
        words["data.train_split"] = first["split"]
    if first.get("name"):
        words["data.hub_config"] = first["name"]
    if len(named) > 1:
        result.left["datasets"] = f"the first of {len(named)} only; one data set at a time"
    elif first.get("type"):
        result.left["datasets.type"] = "the format is recognized by the columns (data.format)"


def _llama_factory_data(result: Conversion, named: Any) -> None:
    """By dataset_info.json, in dataset_dir or next to the file."""
    if named is None:
        return
    words = result.words
    first, *others = [name.strip() for name in str(named).split(",")]
    places = [result.first("dataset_dir") or "data", "."]
    files = [result.folder / str(place) / "dataset_info.json" for place in places]
    files = [path for path in files if path.is_file()]
    if not files:
        result.drop("dataset", "found no dataset_info.json beside the file; set data.path")
        return
    entry = _entry(files[0], first)
    words["data"] = "jsonl"
    if entry.get("file_name"):
        words["data.path"] = str(files[0].parent / entry["file_name"])
    elif entry.get("hf_hub_url"):
        words["data.hub_id"] = entry["hf_hub_url"]
    _columns(result, entry.get("columns") or {})
    if others:
        result.left["dataset"] = f"the first of {len(others) + 1} only; one data set at a time"


def _entry(path: Path, name: str) -> dict[str, Any]:
    try:
        known = read_yaml(path)  # JSON is YAML
    except (OSError, ValueError) as error:
        raise ConfigError(f"convert: {path}: {error}") from error
    entry = known.get(name) if isinstance(known, dict) else None
    if not isinstance(entry, dict):
        raise ConfigError(f"convert: {path}: has no data set {name}")
    return entry


def _columns(result: Conversion, columns: dict[str, str]) -> None:
    """Their columns as keys; those of a recognized format need none."""
    if all(ours in USUAL for ours in columns.values()):
        return
    for theirs, ours in columns.items():
        if theirs in COLUMNS:
            result.words[f"data.{COLUMNS[theirs]}"] = ours
        else:
            result.left[f"dataset_info.{theirs}"] = "no column of data=jsonl"
    if "data.chosen_field" in result.words:
        result.words.setdefault("data.rejected_field", None)
