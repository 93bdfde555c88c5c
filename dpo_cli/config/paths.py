"""Where the YAML files lie: in the package once installed, at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """Folder of Hydra's config groups."""
    return _yaml_dir("conf")


def recipes_dir() -> Path:
    """Folder of the recipes."""
    return _yaml_dir("recipes")


def _yaml_dir(name: str) -> Path:
    # The packaged copy first: beside an installed package, `conf/` would be a stranger's.
    packaged = PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name
