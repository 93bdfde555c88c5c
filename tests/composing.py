"""Composed configurations for tests."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dpo_cli.config.hints import groups
from dpo_cli.config.paths import conf_dir
from dpo_cli.config.read import prepare
from dpo_cli.errors import ConfigError


def composed(*overrides: str) -> DictConfig:
    """What Hydra composes; the options of groups once, the keys on a copy (it is faster)."""
    chosen = tuple(word for word in overrides if word.partition("=")[0] in groups())
    cfg = copy.deepcopy(of_groups(chosen))
    for word in (word for word in overrides if word not in chosen):
        parsed = OverridesParser.create().parse_override(word)
        value = parsed.value()
        OmegaConf.update(cfg, parsed.key_or_group, value, force_add=word.startswith("+"))
    return cfg


@functools.cache
def of_groups(chosen: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(chosen))


def problems(overrides: Sequence[str], typed: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(composed(*overrides), typed)
    return str(caught.value).splitlines()
