"""Presets: they compose, the command line wins, and each fits the hardware it names."""

from __future__ import annotations

import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig

from dpo_cli import cli as command
from dpo_cli.config import RunConfig
from dpo_cli.config.hydra import first_job, for_every_option
from dpo_cli.config.paths import conf_dir
from dpo_cli.config.read import build, finalize
from dpo_cli.plan.memory.estimate import estimate
from dpo_cli.plan.memory.facts import Facts, capacity, texts_of
from dpo_cli.plan.memory.shape import Shape, shape_of
from small_runs import TINY

PRESETS = sorted(p.stem for p in (conf_dir() / "preset").glob("*.yaml") if p.stem != "none")
DEFAULT_LENGTH = 512  # tokens, where a preset leaves data.max_length alone

# The published shapes, as in each model's config.json.
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any], float]] = {  # family, shape, billions of weights
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 0.774),
    "pythia-2.8b": ("gpt_neox", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 50304, "tie_word_embeddings": False}, 2.775),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
                          "vocab_size": 50400, "tie_word_embeddings": False}, 6.051),
    "llama-3.1-8b": ("llama", {**LLAMA, "vocab_size": 128256}, 8.030),
    "mistral-7b": ("mistral", {**LLAMA, "vocab_size": 32768}, 7.248),
    "qwen3-8b": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": False}, 8.191),
    "qwen3-0.6b": ("qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": True}, 0.596),
}  # fmt: skip


def composed(*words: str) -> RunConfig:
    """Without the checks: some ask for more devices than are here."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return finalize(build(compose("config", list(words))))


@cache
def shape(model: str) -> Shape:
    family, numbers, billions = SHAPES[model]
    found = shape_of(AutoConfig.for_model(family, **numbers))
    assert found.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    return found


def gib(config: RunConfig) -> float:
    """DPO on pairs that are as long as they may be: half a prompt, half a response each."""
    half = (config.data.max_length or DEFAULT_LENGTH) // 2
    texts = texts_of([(half, [half, half])] * 32, [range(32)])
    return estimate(config, Facts(shape(config.model.name), texts, "cuda", True)).total / 2**30


def test_there_are_presets_for_every_kind() -> None:
    assert len(PRESETS) >= 12
    for kind in ("full-24gb", "full-80gb", "full-8x80gb", "lora-80gb", "qlora-24gb"):
        assert any(name.endswith(kind) for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_its_name_says(name: str) -> None:
    config = composed("stage=dpo", "data=hh", f"preset={name}")
    model, how, memory = re.fullmatch(r"(.+)-(full|lora|qlora)-(.+)", name).groups()  # type: ignore[union-attr]
    hardware = {"24gb": "gpu-24gb", "80gb": "gpu-80gb", "8x80gb": "gpus-8x80gb"}[memory]
    assert (config.model.name, config.hardware.name) == (model, hardware)
    assert config.lora.name == ("none" if how == "full" else how)
    assert config.hardware.devices == (8 if memory == "8x80gb" else 1)
    assert config.model.hub_id


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_and_tells_its_memory(name: str) -> None:
    config = composed("stage=dpo", "data=hh", f"preset={name}")
    found, limit = gib(config), capacity(config.hardware, "cuda")
    assert limit is not None
    assert found < 0.95 * limit / 2**30
    header, about = (conf_dir() / "preset" / f"{name}.yaml").read_text().splitlines()[:2]
    assert header == "# @package _global_"  # Hydra looks for it before anything else
    told = re.search(r": about (\d+) GiB per GPU for DPO\.$", about)
    assert told, about
    assert float(told[1]) == pytest.approx(found, abs=0.51)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_only_keys_and_options_that_exist(name: str) -> None:
    """A key of its body that no group has would pass as a new one until it is fitted."""
    body = yaml.safe_load((conf_dir() / "preset" / f"{name}.yaml").read_text())
    config = composed("stage=dpo", "data=hh", f"preset={name}")
    for group, keys in body.items():
        for key, value in keys.items() if group != "defaults" else ():
            assert getattr(getattr(config, group), key) == value


def test_the_command_line_wins_over_the_preset_wherever_it_stands() -> None:
    words = ["lora=none", "train.micro_batch_tokens=77", "hardware=cpu", "optim=rmsprop",
             "model=gpt2", "data.max_length=99", "train.batch_size=8"]  # fmt: skip
    for order in (["preset=qwen3-8b-qlora-24gb", *words], [*words, "preset=qwen3-8b-qlora-24gb"]):
        config = composed("stage=dpo", "data=hh", *order)
        assert (config.lora.name, config.lora.quantization) == ("none", None)
        assert (config.train.micro_batch_tokens, config.train.batch_size) == (77, 8)
        assert (config.hardware.name, config.hardware.memory_gb) == ("cpu", None)
        assert (config.optim.name, config.model.name, config.data.max_length) == (
            "rmsprop", "gpt2", 99,
        )  # fmt: skip


def test_no_preset_changes_nothing() -> None:
    assert composed("preset=none") == composed()


def test_a_sweep_over_presets() -> None:
    words = ["stage=dpo", "data=hh", "preset=qwen3-8b-lora-80gb,mistral-7b-lora-80gb"]
    assert composed(*first_job(words)).model.name == "qwen3-8b"
    assert for_every_option(words) == words


def test_a_preset_reaches_its_run_folder_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model and hardware of this machine in place of the preset's."""
    monkeypatch.chdir(tmp_path)
    words = ["preset=qwen3-0.6b-full-24gb", *TINY, "train.max_steps=2", "run_dir=run"]
    command.main(["stage=sft", *words, "data.max_length=64"])
    stored = yaml.safe_load((tmp_path / "run/.hydra/overrides.yaml").read_text())
    assert "preset=qwen3-0.6b-full-24gb" in stored
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["train"]["micro_batch_tokens"] == 2048
    assert "preset" not in config
    command.main(["resume=run"])  # would tell what had changed


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("presett=none", "error: presett: unknown group or key; did you mean preset?"),
        ("preset=qwen3-8b-qlora-24g", "did you mean qwen3-8b-qlora-24gb? (available: "),
        ("preset=qwen3-8b", "mean qwen3-8b-full-8x80gb or qwen3-8b-lora-80gb or qwen3-8b-q"),
        ("preset.lora=none", "error: preset.lora: a preset has no keys; it sets those of other "),
    ],
)
def test_mistakes(word: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([word])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_completion_knows_presets() -> None:
    """Hydra's own, over the same folders: what `preset=qwen3-8b-q` can become."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra._internal.utils import create_config_search_path

    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    found = BashCompletion(loader)._query("config", "preset=qwen3-8b-q")
    assert found == ["preset=qwen3-8b-qlora-24gb"]


# ---------------------------------------------------------------- Slurm


def launcher(*words: str) -> Any:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["hydra/launcher=slurm", *words], return_hydra_config=True)
    return cfg.hydra.launcher


def test_nodes_and_gpus_are_written_once() -> None:
    found = launcher("hardware=slurm", "hardware.nodes=2", "hydra.launcher.partition=gpu")
    assert (found.nodes, found.gpus_per_node, found.tasks_per_node) == (2, 8, 1)
    assert found.partition == "gpu"


def test_what_slurm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch file that submitit writes, as its launcher hands it our keys."""
    submitit = pytest.importorskip("submitit")
    found = OmegaConf.to_container(launcher("hardware=slurm"), resolve=True)
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb",
              "nodes", "name", "stderr_to_stdout"}  # fmt: skip
    aside = {"_target_", "submitit_folder", "max_num_timeout"}
    params = {k if k in common else f"slurm_{k}": v for k, v in found.items() if k not in aside}
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # as on a cluster
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="slurm")
    executor.update_parameters(**params)
    text = executor._executor._make_submission_file_text("dpo-run", "x")
    for asked in ("nodes=1", "gpus-per-node=8", "ntasks-per-node=1", "time=1440",
                  "signal=USR1@300"):  # fmt: skip
        assert f"#SBATCH --{asked}\n" in text, text


def test_a_sweep_through_submitit(cli: Any, tmp_path: Path) -> None:
    """On this machine: a job is a process of the launcher, which starts dpo-run in its own."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = (
        *("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2", "seed=1"),
        *("stage=inspect", "data.rows=8", "data.eval_rows=2", "hydra.sweep.dir=sweep"),
    )
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # wherever the plugin is
    done = cli("-m", *words, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "sweep/jobs/0.json").read_text())["exit_code"] == 0


def test_a_missing_plugin_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.util import find_spec

    if find_spec("hydra_plugins") and find_spec("hydra_plugins.hydra_submitit_launcher"):
        pytest.skip("the plugin is here")
    with pytest.raises(SystemExit):
        command.main(["-m", "hydra/launcher=slurm", "seed=1,2", "dry_run=true"])
    assert "needs hydra-submitit-launcher; pip install 'dpo-run[slurm]'" in capsys.readouterr().err
