"""Convert a composed Hydra config to a `RunConfig`: typed, complete and checked.

No module below this uses Hydra. `_target_` is never instantiated: names of losses, datasets and
stages are looked up in closed tables.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dpo_cli.config.store  # noqa: F401  # registers the defaults for composition
from dpo_cli.config import (
    HttpJudgeConfig,
    NoRewardFn,
    RunConfig,
    SentimentDataConfig,
    SentimentRewardFn,
    spec_of,
)
from dpo_cli.config.checks import check
from dpo_cli.config.fit import fit
from dpo_cli.config.hints import TABLES
from dpo_cli.config.keys import Fact
from dpo_cli.config.rewards import TASKS
from dpo_cli.config.run_data import with_run_data
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.errors import ConfigError


def prepare(cfg: DictConfig, typed: Sequence[str] = (), coming: Sequence[Path] = ()) -> RunConfig:
    """`build`, `finalize` and `check` a configuration. Raises ConfigError.

    typed: the command line's overrides; coming: folders that earlier steps will write.
    """
    config = finalize(build(cfg))
    words = _overrides(cfg)
    if words:  # of a resumed run, those of its first start
        config = with_default_reward(with_run_data(config, words), words)
    check(config, typed, coming)
    return config


def _overrides(cfg: DictConfig) -> list[str]:
    """The overrides that the configuration was composed with; empty without Hydra's node."""
    if "hydra" not in cfg:
        return []
    words: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    return [str(word) for word in words]  # unresolved: `a=${.b}` is relative to another node here


def with_default_reward(config: RunConfig, typed: Sequence[str]) -> RunConfig:
    """Without an explicit reward, an evaluation of other data than the generated reviews, which
    the default reward rates, has none."""
    default = isinstance(config.reward_fn, SentimentRewardFn)
    explicit = any(word.lstrip("+").startswith("reward_fn") for word in typed)
    generated = isinstance(config.data, SentimentDataConfig)
    if not spec_of(config.stage).reward_optional or not default or explicit or generated:
        return config
    return dataclasses.replace(config, reward_fn=NoRewardFn())


def build(cfg: DictConfig) -> RunConfig:
    """Resolve the interpolations and convert every group to its dataclass.

    Raises ConfigError that lists all unknown keys and all values of the wrong type.
    """
    values = _plain(cfg)
    problems: list[str] = []
    chosen = {group: _option(group, values.get(group), problems) for group in TABLES}
    if problems:
        raise ConfigError("\n".join(problems))
    config = fit(RunConfig, values, "", chosen, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def finalize(config: RunConfig) -> RunConfig:
    """Fill in defaults that depend on other keys, and expand `~` in paths."""
    lr = config.optim.lr
    if lr is None:
        scratch = config.model.path is None and config.model.architecture is not None
        lr = config.stage.default_lr * (config.model.lr_scale if scratch else 1.0)
        lr *= config.lora.lr_scale if config.lora.name != "none" else 1.0
    data = config.data
    if isinstance(data, SentimentDataConfig) and data.responses is None:
        data = dataclasses.replace(data, responses=2 if spec_of(config.stage).paired else 1)
    judge = config.judge
    if isinstance(judge, HttpJudgeConfig) and judge.task is None:
        judge = dataclasses.replace(judge, task=TASKS.get(data.name, "dialogue"))
    config = dataclasses.replace(
        config,
        data=data,
        judge=judge,
        optim=dataclasses.replace(config.optim, lr=lr),
        hardware=dataclasses.replace(config.hardware, compile=_compile(config.hardware.compile)),
        cache_dir=os.path.expanduser(config.cache_dir or _user_cache()),
        run_dir=os.path.expanduser(config.run_dir),
    )
    return _with_home(config)


def _compile(value: str | bool) -> str:
    """hardware.compile was a bool in earlier versions."""
    return {True: "blocks", False: "none"}[value] if isinstance(value, bool) else value


def _user_cache() -> str:
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if os.path.isabs(base) else "~/.cache"  # as the XDG specification says
    return os.environ.get("DPO_RUN_CACHE") or f"{base}/dpo-run"


def _with_home(node: Any) -> Any:
    """Expand `~` at the start of paths: shells do not after `key=`."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_home(value)
        elif not value or field.metadata.get("fact", Fact()).path is None:
            continue
        elif isinstance(value, list):
            changed[field.name] = [os.path.expanduser(path) for path in value]
        else:
            changed[field.name] = os.path.expanduser(value)
    return dataclasses.replace(node, **changed)


def refuse_targets(node: Any, path: str = "") -> None:
    """ConfigError for Hydra's `_target_`, which names code to run. path: of `node`."""
    children: Any = ()
    if isinstance(node, Mapping):
        if "_target_" in node:
            raise ConfigError(f"{path or 'config'}._target_: a config may not name code to run")
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    for key, child in children:
        refuse_targets(child, f"{path}.{key}" if path else str(key))


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolved values of all nodes but Hydra's own."""
    values: dict[str, Any] = {}
    for key in cfg:
        if key == "hydra":
            continue
        try:
            # Key by key, in place: interpolations may refer to the root or to hydra.
            value = cfg[key]
            if OmegaConf.is_config(value):
                refuse_targets(OmegaConf.to_container(value, resolve=False), str(key))
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            where = error.full_key or str(key)
            raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
        if key == "_target_":
            refuse_targets({key: value})
        values[str(key)] = value
    return values


def _option(group: str, values: Any, problems: list[str]) -> str:
    """The option's name, which selects the schema of a group with several."""
    name = values.get("name") if isinstance(values, dict) else None
    if not isinstance(name, str) or name not in TABLES[group]:
        known = ", ".join(TABLES[group])
        hint = did_you_mean(str(name), TABLES[group])
        problems.append(f"{group}.name={name}: unknown{hint or f'; one of {known}'}")
    return str(name)
