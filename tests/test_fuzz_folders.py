"""Random values in a model's, an adapter's and a recipe's files: read, or refused in one line.

DPO_RUN_FUZZ=2000 tries as many of each, which takes half an hour.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.config import LoraConfig, ModelConfig
from dpo_cli.data.chat import chat_format
from dpo_cli.data.tokens import tokenizer_digest, tokenizer_facts
from dpo_cli.errors import UserError
from dpo_cli.model.adapters.active import Adaptation
from dpo_cli.model.load import count_parameters, load_model, load_tokenizer
from dpo_cli.workflow.expand import Folders, expand, resolve
from dpo_cli.workflow.file import load_recipe
from small_adapters import write_base
from test_adapter_kinds import low_rank, written

EXAMPLES = int(os.environ.get("DPO_RUN_FUZZ", "25"))
SECONDS = 10  # of the processor, for one folder
ABSURD: list[Any] = [
    -1, 0, 10**6, 2**31, 10**30, 1e308, "x" * 5000, "../x", "a/b", "\x00", "\ud800", "(.*)*" * 6,
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", [[]],
    {"": None},
]  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(ABSURD) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ALSO = {  # keys that the files here do not have
    "config.json": ["attn_implementation", "quantization_config", "num_labels", "rope_scaling",
                    "sliding_window", "layer_types", "head_dim", "auto_map", "torch_dtype"],
    "tokenizer_config.json": ["chat_template", "added_tokens_decoder", "extra_special_tokens",
                              "auto_map", "model_input_names", "padding_side", "vocab_file"],
    "adapter_config.json": ["token_indices", "feedforward_modules", "runtime_config"],
    "generation_config.json": ["eos_token_id", "temperature", "cache_implementation"],
    "tokenizer.json": [],
    "special_tokens_map.json": ["eos_token", "pad_token"],
}  # fmt: skip
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 25,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("fuzz") / "base", "llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(low_rank(), base, tmp_path_factory.mktemp("fuzz") / "adapter")


def copied(source: Path) -> Path:
    return Path(shutil.copytree(source, source.with_name("tried"), dirs_exist_ok=True))


def changed(source: Path, name: str, data: st.DataObject) -> Path:
    """A copy of the folder with other values of one or two keys of a file."""
    folder = copied(source)
    path = folder / name
    known = json.loads((source / name).read_text()) if (source / name).is_file() else {}
    keys = sorted({*known, *ALSO[name]})
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=2))
    path.write_text(json.dumps({**known, **changes}))
    return folder


def told(act: Callable[[], object]) -> str:
    """What a user's error says, if there is one; any other is raised."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def use(folder: Path, train: bool) -> None:
    """What a plan and a start do with it: any error is for the user, in one line, soon."""
    config, began = ModelConfig(path=str(folder)), time.process_time()
    adaptation = Adaptation(LoraConfig(name="lora", r=4, alpha=8)) if train else None

    def act() -> None:
        tokenizer = load_tokenizer(config)
        tokenizer_digest(tokenizer)
        if tokenizer.chat_template is not None:
            told(lambda: chat_format(tokenizer, tokenizer_facts(tokenizer)))
        count_parameters(config, tokenizer)
        load_model(config, tokenizer, adaptation=adaptation)

    error = told(act)
    assert "\n" not in error
    assert len(error) < 1000
    assert time.process_time() - began < SECONDS


@fuzz
@given(st.data(), st.sampled_from([name for name in ALSO if not name.startswith("adapter")]))
def test_a_models_files(base: Path, data: st.DataObject, name: str) -> None:
    folder = changed(base, name, data)
    try:
        use(folder, train=False)
    finally:
        shutil.rmtree(folder)


@fuzz
@given(st.data(), st.booleans())
def test_an_adapters_settings(adapter: Path, data: st.DataObject, train: bool) -> None:
    use(changed(adapter, "adapter_config.json", data), train)


@fuzz
@given(VALUES, st.dictionaries(st.text(), VALUES, max_size=3))
def test_an_index(base: Path, whole: Any, table: dict[str, Any]) -> None:
    folder = copied(base)
    try:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": table} if table else whole)
        (folder / "model.safetensors.index.json").write_text(text)
        use(folder, train=False)
    finally:
        shutil.rmtree(folder)


STEPS = st.lists(st.dictionaries(
    st.sampled_from(["name", "overrides", "sweep", "once", "minutes", "x"]), VALUES, max_size=4,
), max_size=3)  # fmt: skip


@fuzz
@given(st.fixed_dictionaries({}, optional={
    "steps": STEPS | VALUES, "vars": VALUES, "repeat": VALUES, "report": VALUES, "x": VALUES,
    "description": VALUES,
}) | VALUES)  # fmt: skip
def test_a_recipe(tmp_path_factory: pytest.TempPathFactory, body: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(body), errors="backslashreplace")

    def act() -> None:
        recipe, folders = load_recipe(path, []), Folders()
        for task in expand(recipe):
            resolve(recipe, task, folders)
            task.at(Path("runs"), folders)

    told(act)  # as a line, it is cut where it is printed
