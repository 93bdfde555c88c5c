"""Every file of conf/ and recipes/ composes, and says what the schema says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo_cli.config import DATA_SCHEMAS, STAGE_SCHEMAS, RunConfig
from dpo_cli.config.hints import PRESET, TABLES, groups, known_facts, optional
from dpo_cli.config.hydra import first_job
from dpo_cli.config.paths import conf_dir, recipes_dir
from dpo_cli.config.read import prepare
from dpo_cli.workflow.expand import Folders, expand, resolve
from dpo_cli.workflow.file import load_recipe

OPTIONS = sorted(  # test_presets.py tries those that set other groups' keys, or Hydra's
    path.relative_to(conf_dir())
    for path in conf_dir().rglob("*/*.yaml")
    if path.relative_to(conf_dir()).parts[0] not in (PRESET, "hydra")
)
RECIPES = sorted(recipes_dir().rglob("*.yaml"))
REQUIRED = {
    "preferences": ("model_path", "data_path"),
    "instruct": ("model_path", "data_path", "reward_path"),
}
NEEDS = {  # what an option cannot do without
    "model/custom": ["model.hub_id=somebody/something"],
    "data/jsonl": ["data.hub_id=somebody/something"],
    "data/mix": ["data.sources={a: {data: hh, hub_id: somebody/something}}"],
    "stage/export": ["model.path=."],
    "stage/label": ["stage.samples=."],
    "stage/frontier": ["stage.evaluations=[.]"],
    "reward_fn/reward_model": ["reward_fn.path=."],
    **{f"lora/{name}": ["model=gpt2"] for name in ("lora", "dora", "qlora", "int8")},
}


@pytest.fixture(autouse=True)
def folder_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `.` is in NEEDS."""
    (tmp_path / "points.jsonl").touch()
    monkeypatch.chdir(tmp_path)


def prepared(overrides: list[str]) -> RunConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return prepare(compose("config", overrides))


def schema_of(group: str, name: str) -> Any:
    if group in TABLES:
        return TABLES[group][name]
    import dpo_cli.config as module

    return getattr(module, f"{group.capitalize()}Config")


def test_there_are_options_and_recipes() -> None:
    assert {path.parts[0] for path in OPTIONS} == set(groups())
    assert RECIPES


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_composes_and_passes_the_checks(option: Path) -> None:
    group, name = option.parts[0], option.stem
    prepared([f"{group}={name}", *NEEDS.get(f"{group}/{name}", [])])


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_holds_what_differs_from_its_schema(option: Path) -> None:
    """One place per default."""
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / option))
    assert isinstance(values, dict)
    schema = schema_of(option.parts[0], option.stem)
    fields = {field.name for field in dataclasses.fields(schema)}
    assert set(values) <= fields
    defaults = dataclasses.asdict(schema())
    assert [key for key, value in values.items() if value == defaults[key]] == []
    assert values.get("name", option.stem) == option.stem


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_explains_itself(option: Path) -> None:
    first = (conf_dir() / option).read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# \S.{15,}", first)


def test_the_root_has_the_keys_outside_the_groups() -> None:
    root = OmegaConf.load(conf_dir() / "config.yaml")
    own = {str(key) for key in root} - {"defaults", "hydra"}
    assert own == {f.name for f in dataclasses.fields(RunConfig)} - set(groups())


def test_options_are_those_of_the_code() -> None:
    def names(group: str) -> set[str]:
        return {path.stem for path in OPTIONS if path.parts[0] == group}

    choices = {key: fact.choices for key, fact in known_facts()}
    assert names("data") == set(DATA_SCHEMAS)
    assert names("stage") == set(STAGE_SCHEMAS)
    assert names("optim") == set(choices["optim.name"])
    assert names("lora") == set(choices["lora.name"])
    assert names("hardware") >= set(choices["hardware.device"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_step_of_a_recipe_composes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")  # recipes that ask a judge
    one_seed = ["seeds=[0]"] if "\n  seeds: " in path.read_text() else []
    required = [f"{name}={tmp_path}" for name in REQUIRED.get(path.stem, ())]
    recipe = load_recipe(path, [*required, *one_seed])
    assert recipe.description
    folders: Folders = {}
    for task in expand(recipe):
        overrides, _ = resolve(recipe, task, folders)
        prepared(first_job(overrides) if task.step.sweep else overrides)
        folder = task.at(tmp_path, folders)
        folder.mkdir()
        for name in ("train.jsonl", "eval.jsonl", "samples.jsonl", "points.jsonl"):
            (folder / name).touch()


def test_the_schema_has_plain_types_only() -> None:
    """compose.py converts these; another kind would fail at run time."""
    import typing

    plain: set[typing.Any] = {bool, int, float, str, str | int, int | float, dict[str, typing.Any]}
    plain |= {list[float], list[int], list[str], dict[str, float]}
    for schema in [RunConfig, *(schema for table in TABLES.values() for schema in table.values())]:
        for name, hint in typing.get_type_hints(schema).items():
            kind, _ = optional(hint)
            assert kind in plain or dataclasses.is_dataclass(kind), f"{schema.__name__}.{name}"
