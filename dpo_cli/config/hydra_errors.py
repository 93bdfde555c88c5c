"""Hydra's errors as one line each, with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from dpo_cli.config.hints import (
    PRESET,
    choosable,
    groups,
    root_keys,
    unknown_key,
    valid_keys,
)
from dpo_cli.config.paths import recipes_dir
from dpo_cli.config.peers import counterpart
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.errors import ConfigError

DEFAULT_OPTIONS = {  # as in conf/config.yaml
    "data": "sentiment",
    "stage": "sft",
    "reward_fn": "sentiment",
    "judge": "reward_fn",
}
LAUNCHER = "hydra/launcher"


@contextmanager
def as_config_error(overrides: Sequence[str], *more: type[Exception]) -> Iterator[None]:
    """Convert errors of Hydra, OmegaConf and YAML to ConfigError.

    more: further exception types, for a body that only composes.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, *more) as error:
        raise ConfigError(_explain(error, overrides)) from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    if isinstance(error, OverrideParseException):
        return _syntax(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error)
    for pattern, answer in ANSWERS:
        if match := re.search(pattern, str(error), re.MULTILINE):
            return answer(match[1], overrides)
    return _gist(error, overrides)


def _syntax(override: str) -> str:
    if "=" in override or override.startswith("~"):
        return f"{override}: cannot be parsed; quote special characters: \"key='a (b)'\""
    hint = did_you_mean(override, [path.stem for path in recipes_dir().glob("*.yaml")])
    if hint:
        return f"{override}: overrides are written key=value{hint.replace('mean ', 'mean recipe=')}"
    return f"{override}: overrides are written key=value; see dpo-run --help"


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"{option}: no such config; see dpo-run --info searchpath"
    options = sorted(error.options or [])
    if group == LAUNCHER and option.startswith("submitit"):
        return f"{group}={option}: needs hydra-submitit-launcher; pip install 'dpo-run[slurm]'"
    if not options and group in choosable():
        return f"{group}/{option}: no such YAML file, but another one lists it in its defaults"
    if not options:
        return _unknown_group(group, overrides=())
    hint = did_you_mean(option, options)
    return f"{group}={option}: unknown option{hint} (available: {', '.join(options)})"


def _unknown(key: str, overrides: Sequence[str]) -> str:
    """The message for a key or group that the composed YAML does not have."""
    chosen = dict(DEFAULT_OPTIONS)
    for word in overrides:
        name, _, option = word.lstrip("+").partition("=")
        if name in chosen:
            chosen[name] = option
    group = key.partition(".")[0]
    if group == PRESET:
        return f"{key}: a preset has no keys; it sets those of other groups, see dpo-run --cfg job"
    if key in groups():
        return f"{key}: choose an option, {key}=<name>, or set its keys one by one, {key}.x=..."
    if group == "hydra":
        return f"{key}: unknown key; see dpo-run --cfg hydra"
    if key in valid_keys(chosen) and group in groups():
        return f"{key}: missing in the YAML of the chosen {group}; use +{key}=... or add it there"
    hint = did_you_mean(key, [*choosable(), *root_keys(), "recipe", "resume"])
    leaves = {valid.rpartition(".")[2] for valid in valid_keys(chosen)}
    if not hint or "." in key or key in leaves or counterpart(key):  # lr: optim.lr, not lora
        return unknown_key(key, chosen)
    return f"{key}: unknown group or key{hint}"


def _gist(error: Exception, overrides: Sequence[str]) -> str:
    """Any other error: the full text of a YAML error, else the first lines of it and its cause."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())  # file, line and what is wrong there
    lines = []
    for part in (error, error.__cause__):
        text = str(part or "").strip()
        if text and text.splitlines()[0] not in lines:
            lines.append(text.splitlines()[0])
    return f"{': '.join(lines) or 'cannot be composed'} (in: {' '.join(overrides)})"


def _needs_sweep(word: str, overrides: Sequence[str]) -> str:
    return (
        f"{word}: several values need a sweep: add -m "
        "(write a list as key=[a,b], text with a comma as \"key='a,b'\")"
    )


def _exists(key: str, overrides: Sequence[str]) -> str:
    return f"+{key}: this key exists already; remove the +"


def _nothing_to_delete(key: str, overrides: Sequence[str]) -> str:
    return f"~{key}: there is no such key to remove"


def _unknown_group(group: str, overrides: Sequence[str]) -> str:
    return f"{group}: unknown group{did_you_mean(group, choosable())}"


def _no_keys(option: str, overrides: Sequence[str]) -> str:
    return f"conf/{option}.yaml: expected keys and values, such as path: my-model"


ANSWERS: list[tuple[str, Callable[[str, Sequence[str]], str]]] = [  # Hydra's message -> ours
    (r"Ambiguous value for argument '(.+)'$", _needs_sweep),
    (r"Sweep parameters '(.+)' requires --multirun", _needs_sweep),
    (r"An item is already at '([^']+)'", _exists),
    (r"Could not override '([^']+)'", _unknown),
    (r"Could not delete(?: from config\.)? '([^']+)'", _nothing_to_delete),
    (r"config group '([^']+)' does not exist", _unknown_group),
    (r"In '([^']+)': ConfigTypeError raised while composing", _no_keys),
]
