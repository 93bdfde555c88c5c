"""recipes/*.yaml: ordered steps, each a set of overrides for one `dpo-run` command.

    description: one line
    vars: {rows: 1000, path: "???"}  vars.rows=... on the command line changes it; ??? must be given
    steps:
      - name: sft
        overrides: {stage: sft, data.rows: "${vars.rows}"}
      - name: dpo
        overrides: [stage=dpo, "model.path=${steps.sft.dir}"]   words as on the command line
        sweep: false                true: run with -m, values separated by commas
    report: [{label: SFT, step: evaluate-sft}, ...]   summaries to compare at the end

`${vars.x}` and `${steps.x.dir}` are all the interpolation there is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_cli.errors import ConfigError
from dpo_cli.hints import did_you_mean
from dpo_cli.launch import as_override
from dpo_cli.paths import recipes_dir
from dpo_cli.run_folder import key_of

RESERVED = {
    "run_dir": "each step has a folder of its own",
    "hydra.run.dir": "each step has a folder of its own",
    "hydra.sweep.dir": "each step has a folder of its own",
    "resume": "unfinished steps are resumed anyway",
    "dry_run": "write it after recipe=",
    "model.trust_remote_code": "a file may not allow foreign code to run",
}
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True)
class Step:
    """One command. `overrides` still has its references."""

    number: int
    name: str
    overrides: Sequence[str] | Mapping[str, Any]
    sweep: bool

    @property
    def label(self) -> str:
        return f"{self.number:02d}-{self.name}"


@dataclass(frozen=True)
class Recipe:
    name: str
    description: str
    variables: dict[str, Any]
    steps: list[Step]
    report: list[dict[str, str]]  # {label, step}


def find_recipe(name: str) -> Path:
    """The file of a recipe's name, or the file itself where a path is given."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"recipe={name}: no such file")
        return path
    known = sorted(path.stem for path in recipes_dir().glob("*.yaml"))
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"recipe={name}: unknown recipe{hint} (available: {', '.join(known)})")
    return recipes_dir() / f"{name}.yaml"


def load_recipe(path: Path, settings: Sequence[str] = (), complete: bool = True) -> Recipe:
    """Read a recipe. settings: `x=1` for every `vars.x=1` of the command line.

    complete: variables that must be given (`???`) have to be.

    Raises ConfigError that names the file and the place.
    """
    try:
        loaded = OmegaConf.load(path)
        body: Any = OmegaConf.to_container(loaded, resolve=False)
        changed: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    except (OSError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    _expect_keys(body, {"description", "vars", "steps", "report"}, f"{path}")
    variables = body.get("vars") or {}
    for name in changed:
        if name not in variables:
            hint = did_you_mean(str(name), variables)
            raise ConfigError(
                f"vars.{name}: not a variable of this recipe{hint} (it has {_listed(variables)})"
            )
    steps = [_step(path, number, step) for number, step in enumerate(body.get("steps") or [], 1)]
    recipe = Recipe(
        name=path.stem,
        description=str(body.get("description") or ""),
        variables={**variables, **changed},
        steps=steps,
        report=body.get("report") or [],
    )
    _check(path, recipe)
    missing = [f"vars.{name}=..." for name, value in recipe.variables.items() if value == "???"]
    if missing and complete:
        raise ConfigError(f"recipe={path.stem}: needs {' '.join(missing)}")
    return recipe


def resolve(recipe: Recipe, step: Step, folders: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """The step's words for the command line, and the names of the earlier steps it uses.

    folders: name -> folder of each earlier step.
    """
    used: list[str] = []

    def value_of(reference: str) -> Any:
        kind, _, rest = reference.partition(".")
        if kind == "vars" and rest in recipe.variables:
            return recipe.variables[rest]
        name = rest.removesuffix(".dir")
        if kind == "steps" and rest.endswith(".dir") and name in folders:
            used.append(name)
            return str(folders[name])
        names = [f"vars.{v}" for v in recipe.variables] + [f"steps.{s}.dir" for s in folders]
        raise ConfigError(
            f"recipe {recipe.name}, step {step.name}: ${{{reference}}} is neither a variable nor "
            f"the folder of an earlier step{did_you_mean(reference, names)}"
        )

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(item) for item in value]
        if not isinstance(value, str):
            return value
        if whole := _REFERENCE.fullmatch(value):
            return value_of(whole[1])  # keeps its type
        return _REFERENCE.sub(lambda match: str(value_of(match[1])), value)

    if isinstance(step.overrides, Mapping):
        words = [as_override(key, fill(value)) for key, value in step.overrides.items()]
    else:
        words = [_filled_word(word, fill) for word in step.overrides]
    return words, sorted(set(used))


def _filled_word(word: str, fill: Any) -> str:
    """`key=value`: a value that is one reference is quoted as needed, other text is not."""
    key, _, value = word.partition("=")
    return as_override(key, fill(value)) if _REFERENCE.fullmatch(value) else str(fill(word))


def _step(path: Path, number: int, body: Any) -> Step:
    place = f"{path}: step {number}"
    _expect_keys(body, {"name", "overrides", "sweep"}, place)
    name, overrides = body.get("name"), body.get("overrides") or {}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{place}: name={name}: must be of a-z, 0-9 and -")
    sweep = body.get("sweep", False)
    if isinstance(overrides, dict):
        flat = _flatten(overrides)
        if sweep:
            raise ConfigError(f"{place}: a sweep's overrides are a list of words, key=a,b")
        return Step(number, name, flat, False)
    words = [str(word) for word in overrides]
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"{place}: {wrong[0]}: overrides are written key=value")
    return Step(number, name, words, bool(sweep))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{train: {epochs: 1}} -> {train.epochs: 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check(path: Path, recipe: Recipe) -> None:
    names = [step.name for step in recipe.steps]
    if not names:
        raise ConfigError(f"{path}: has no steps")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{path}: two steps are named {twice[0]}")
    for step in recipe.steps:
        for word in step.overrides:
            if reason := RESERVED.get(key_of(word)):
                raise ConfigError(f"{path}: step {step.name}: {key_of(word)}: {reason}")
    for number, row in enumerate(recipe.report, 1):
        _expect_keys(row, {"label", "step"}, f"{path}: report {number}")
        if row.get("step") not in names:
            wrong = str(row.get("step"))
            hint = did_you_mean(wrong, names)
            raise ConfigError(f"{path}: report {number}: step={wrong}: no such step{hint}")


def _expect_keys(body: Any, known: set[str], place: str) -> None:
    if not isinstance(body, dict):
        raise ConfigError(f"{place}: expected the keys {_listed(known)}")
    for key in body:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"{place}: {key}: unknown key{hint} (known: {_listed(known)})")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
