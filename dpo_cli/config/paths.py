"""Folders of the YAML files: in the package if installed, at the top of a checkout."""

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
    # The packaged copy first: next to an installed package, `conf/` would be someone else's.
    packaged = PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name
