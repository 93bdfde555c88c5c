"""The data settings of a policy's run, which are the defaults of its evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config import DATA_SCHEMAS, DataConfig, EvaluateConfig, RunConfig
from dpo_cli.config.fit import fit
from dpo_cli.durable.stored import yaml_of_run
from dpo_cli.errors import ConfigError

# Settings for the rows of one file or hub id, which do not apply to another.
OF_ROWS = ("eval_path", "eval_split", "eval_rows", "max_rows", "hub_config", "revision")
SOURCE = ("path", "hub_id")
DERIVED = ("name", "date", "responses")  # set by the run or its stage
SHOWN = 5


def with_run_data(config: RunConfig, typed: Sequence[str]) -> RunConfig:
    """Take an evaluation's `data` from the run of its (first) policy, except for the user's
    overrides (`typed`), and not if these name another dataset than the run's.
    """
    keys = {word.lstrip("+").partition("=")[0] for word in typed}
    stored = _stored(config)
    if stored is None:
        return config
    requested, of_run = config.data, stored[1]
    if "data" in keys and requested.name != of_run.name:
        return config
    names = {key.removeprefix("data.") for key in keys if key.startswith("data.")}
    names |= {"date", "responses"}
    if any(getattr(requested, key) != getattr(of_run, key) for key in SOURCE if key in names):
        names |= {*OF_ROWS, *SOURCE}
    fields = {f.name for f in dataclasses.fields(of_run)}
    changes = {key: getattr(requested, key) for key in names & fields if hasattr(requested, key)}
    return dataclasses.replace(config, data=dataclasses.replace(of_run, **changes))


def data_line(config: RunConfig) -> str | None:
    """A line for the user that compares the data settings with those of the policy's run."""
    stored = _stored(config)
    if stored is None:
        return None
    run, old = stored
    if old.name != config.data.name:
        return None
    names = [f.name for f in dataclasses.fields(old) if f.name not in DERIVED]
    changed = [n for n in names if getattr(old, n) != getattr(config.data, n)]
    if changed:
        items = [f"data.{n}={getattr(config.data, n)} (there {getattr(old, n)})" for n in changed]
        return f"data settings differ from those of {run}: {_few(items)}"
    default = type(old)()
    items = [f"data.{n}={getattr(old, n)}" for n in names if getattr(old, n) != getattr(default, n)]
    return f"data settings are those of {run}: {_few([f'data={old.name}', *items])}"


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + f" and {len(items) - SHOWN} more" * (len(items) > SHOWN)


def _stored(config: RunConfig) -> tuple[Path, DataConfig] | None:
    """The run folder of the first policy and its `data`; None for models not from dpo-run."""
    stage = config.stage
    if not isinstance(stage, EvaluateConfig):
        return None
    first = next(iter(stage.policies), config.model.path)
    if first is None:
        return None
    path = Path(first).expanduser()
    candidates = [path, path / "0"]  # a run, a sweep
    candidates += [path.parent] * (path.name == "final")
    candidates += [path.parent.parent] * (path.parent.name == "checkpoints")
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
    result: DataConfig = fit(schema, known, "data", {}, problems)
    if problems:
        raise ConfigError(f"{path}: {problems[0]}")
    return result
