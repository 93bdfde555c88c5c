"""The data settings of a policy's own run, which an evaluation takes unless told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config import DATA_SCHEMAS, DataConfig, EvaluateConfig, RunConfig
from dpo_cli.config.fit import fit
from dpo_cli.durable.stored import yaml_of_run
from dpo_cli.errors import ConfigError

# Settings of the rows of one file or hub id: they say nothing of another.
OF_ROWS = ("eval_path", "eval_split", "eval_rows", "max_rows", "hub_config", "revision")
WHERE = ("path", "hub_id")
LEFT = ("name", "date", "responses")  # which the run or its stage finds by itself
SHOWN = 5


def with_run_data(config: RunConfig, typed: Sequence[str]) -> RunConfig:
    """An evaluation's `data` as the run of its (first) policy had it; what the user typed stays.

    Nothing is taken of a run on another dataset than the one that is typed.
    """
    keys = {word.lstrip("+").partition("=")[0] for word in typed}
    stored = _stored(config)
    if stored is None:
        return config
    named, own = config.data, stored[1]
    if "data" in keys and named.name != own.name:
        return config
    mine = {key.removeprefix("data.") for key in keys if key.startswith("data.")}
    mine |= {"date", "responses"}
    if any(getattr(named, key) != getattr(own, key) for key in WHERE if key in mine):
        mine |= {*OF_ROWS, *WHERE}
    fields = {f.name for f in dataclasses.fields(own)}
    kept = {key: getattr(named, key) for key in mine & fields if hasattr(named, key)}
    return dataclasses.replace(config, data=dataclasses.replace(own, **kept))


def data_line(config: RunConfig) -> str | None:
    """How the data settings compare with those of the policy's run, for the user to see."""
    stored = _stored(config)
    if stored is None:
        return None
    run, own = stored
    if own.name != config.data.name:
        return None
    names = [f.name for f in dataclasses.fields(own) if f.name not in LEFT]
    other = [n for n in names if getattr(own, n) != getattr(config.data, n)]
    if other:
        told = [f"data.{n}={getattr(config.data, n)} (there {getattr(own, n)})" for n in other]
        return f"data settings differ from those of {run}: {_few(told)}"
    default = type(own)()
    told = [f"data.{n}={getattr(own, n)}" for n in names if getattr(own, n) != getattr(default, n)]
    return f"data settings are those of {run}: {_few([f'data={own.name}', *told])}"


def _few(told: Sequence[str]) -> str:
    return ", ".join(told[:SHOWN]) + f" and {len(told) - SHOWN} more" * (len(told) > SHOWN)


def _stored(config: RunConfig) -> tuple[Path, DataConfig] | None:
    """The run folder of the first policy and its `data`; None for models from elsewhere."""
    stage = config.stage
    if not isinstance(stage, EvaluateConfig):
        return None
    first = next(iter(stage.policies), config.model.path)
    if first is None:
        return None
    place = Path(first).expanduser()
    candidates = [place, place / "0"]  # a run, a sweep
    candidates += [place.parent] * (place.name == "final")
    candidates += [place.parent.parent] * (place.parent.name == "checkpoints")
    for folder in candidates:
        data = _data_of(folder / "config.yaml")
        if data is not None:
            return folder, data
    return None


def _data_of(path: Path) -> DataConfig | None:
    data: Any = yaml_of_run(path).get("data")
    schema = DATA_SCHEMAS.get(str(data.get("name"))) if isinstance(data, dict) else None
    if schema is None or not isinstance(data, dict):
        return None
    fields = {f.name for f in dataclasses.fields(schema)}
    problems: list[str] = []
    known = {key: value for key, value in data.items() if key in fields}
    found: DataConfig = fit(schema, known, "data", {}, problems)
    if problems:
        raise ConfigError(f"{path}: {problems[0]}")
    return found
