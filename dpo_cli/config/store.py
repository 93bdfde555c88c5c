"""Hydra's ConfigStore with the default of every key, which the options of `conf/` override.

Importing this module fills it: `keys/stage/dpo` has the defaults of DpoConfig, and conf/config.yaml
merges the chosen option's YAML over it. Plain values, so that `read.py` checks types and reports
all problems together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dpo_cli.config import RunConfig
from dpo_cli.config.hints import TABLES, groups

GROUP = "keys"


def fill(store: ConfigStore) -> None:
    hints = get_type_hints(RunConfig)
    for group in groups():
        if group not in TABLES:
            store.store(group=GROUP, name=group, node=_node(hints[group]()))
        for option, schema in TABLES.get(group, {}).items():
            node = _node(schema()) | {"name": option}
            store.store(group=f"{GROUP}/{group}", name=option, node=node)


def _node(config: Any) -> dict[str, Any]:
    """The values of a group; mappings accept keys that are not in the schema."""
    values = dataclasses.asdict(config)
    return {
        name: OmegaConf.create(value, flags={"struct": False}) if isinstance(value, dict) else value
        for name, value in values.items()
    }


fill(ConfigStore.instance())
