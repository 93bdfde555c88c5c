"""Parse and compose the key=value overrides of a command, and those of a sweep, with Hydra."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from omegaconf import DictConfig, OmegaConf

from dpo_cli.config.hints import choosable, renamed_keys
from dpo_cli.config.hydra_errors import as_config_error
from dpo_cli.config.paths import conf_dir
from dpo_cli.config.read import refuse_targets
from dpo_cli.errors import ConfigError

HYDRA_VERSION = "1.3"
# Raised by composition for values of odd types (a list as a name, a number as a group's option, a
# name too long for a file), besides Hydra's own errors.
ODD = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip
READ = ("hydra.run.dir", "hydra.sweep.dir", "hydra.job.env_set", "hydra.job.config_name")
LISTED = (ValueType.SIMPLE_CHOICE_SWEEP, ValueType.CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def quiet_hydra() -> None:
    """Have Hydra raise its errors instead of printing and exiting, and silence its warnings."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    warnings.filterwarnings("ignore", module=r"hydra|omegaconf")


def composed(words: Sequence[str], config_name: str | None = None) -> DictConfig:
    """The configuration of one run, with Hydra's node. Creates no folder. Raises ConfigError."""
    with as_config_error(words, *ODD):
        _refuse_several(words)
    with (
        as_config_error(words, *ODD),
        initialize_config_dir(str(conf_dir()), job_name="dpo-run", version_base=HYDRA_VERSION),
    ):
        cfg = compose(config_name or "config", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in values
        for key in READ:  # an interpolation that cannot be resolved would fail later
            _plain(OmegaConf.select(cfg, key, throw_on_missing=True))
    # Hydra instantiates callbacks from names in the config: arbitrary code.
    refuse_targets(OmegaConf.to_container(cfg.hydra.callbacks, resolve=False), "hydra.callbacks")
    return cfg


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _refuse_several(words: Sequence[str]) -> None:
    """ConfigError for `data=[hh,shp]`, which Hydra would merge; a run has one option per group."""
    for word in OverridesParser.create().parse_overrides(list(words)):
        if word.key_or_group in choosable() and isinstance(word.value(), list):
            raise ConfigError(f"{word.input_line}: {word.key_or_group} takes one option's name")


def with_new_names(words: Sequence[str]) -> list[str]:
    """The overrides with keys of earlier versions renamed, and a note for each on stderr."""
    current = []
    for word in words:
        key, equals, value = word.partition("=")
        bare = key.lstrip("+~")
        new = renamed_keys().get(bare)
        if new:
            print(f"note: {bare} is now called {new}", file=sys.stderr)
        current.append(f"{key[: len(key) - len(bare)]}{new or bare}{equals}{value}")
    return current


def parsed(words: Sequence[str]) -> list[Override]:
    with as_config_error(words, *ODD):
        return OverridesParser.create().parse_overrides(list(words))


def values(word: Override) -> list[Any]:
    """An override's value, or those of a sweep; empty if only Hydra's sweeper knows them."""
    if not word.is_sweep_override():
        return [word.value()]
    if word.value_type not in LISTED:
        return []
    return [v.text if isinstance(v, QuotedString) else v for v in word.sweep_iterator()]


def job_count(words: Sequence[str]) -> int | None:
    """The number of jobs of a sweep; None if only Hydra's sweeper knows it."""
    counts = [len(values(word)) for word in parsed(words) if word.is_sweep_override()]
    return math.prod(counts) if all(counts) else None


def first_job(words: Sequence[str]) -> list[str]:
    """The overrides of the sweep's first job: each swept key with its first value."""
    first = []
    for word in parsed(words):
        if not word.is_sweep_override():
            first.append(str(word.input_line))
        elif word.value_type in LISTED:  # globs match files, intervals are sampled
            first.append(f"{word.get_key_element()}={next(iter(word.sweep_string_iterator()))}")
    return first


def for_every_option(words: Sequence[str]) -> list[str]:
    """`++key=value` for the keys of a swept group.

    Hydra first composes a sweep with the default option of a swept group, which may not have
    the key; the strict schema still rejects keys that a job's option does not have.
    """
    overrides = parsed(words)
    swept = {word.key_or_group for word in overrides if word.is_sweep_override()}
    return [
        f"++{line}" if line.partition(".")[0] in swept and not line.startswith(("+", "~")) else line
        for line in (str(word.input_line) for word in overrides)
    ]
