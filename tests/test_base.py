"""The same base under an adapter and at a resume, or a refusal that names both."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.durable.provenance import BASE
from dpo_cli.errors import ConfigError
from small_adapters import write_base
from small_runs import train

SMALL = ("lora.r=4", "train.eval_every_steps=0", "train.sample_prompts=0", "logger.report=false",
         "train.max_steps=2", "train.save_every_steps=1")  # fmt: skip
DIFF = re.compile(r"\(base: ([0-9a-f]{12}) -> ([0-9a-f]{12})\)")
ALLOWED = "model.other_base=true"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def base(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "base"))


def change(folder: Path) -> None:
    """One weight of many, a little."""
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path, *overrides: str) -> tuple[str, str]:
    """The two digests that are told."""
    with pytest.raises(ConfigError, match=DIFF) as caught:
        train(folder, *overrides)
    found = DIFF.search(str(caught.value))
    assert found is not None
    assert found[1] != found[2]
    assert ALLOWED in str(caught.value)
    return found[1], found[2]


def last_step_lost(run: Path) -> Path:
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-2")
    return run


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("lora", ["lora", "none"])
def test_a_run_is_resumed_over_its_own_base_alone(
    stage: str,
    lora: str,
    base: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (f"stage={stage}", f"model.path={base}", f"lora={lora}",
             *SMALL[lora == "none" :], "stage.normalize_prompts=0")  # fmt: skip
    words = words if stage == "reward" else words[:-1]
    train(tmp_path / "run", *words)
    run = last_step_lost(tmp_path / "run")
    change(base)
    refused(run, *words, "resume=true")
    assert not (run / "final").exists()
    shutil.rmtree(base)
    shutil.copytree(good, base)  # other inodes and times, the same content
    train(run, *words, "resume=true")
    change(base)
    train(last_step_lost(run), *words, "resume=true", ALLOWED, "logger.progress=plain")
    assert DIFF.search(capsys.readouterr().err)


def test_an_adapter_is_used_over_its_own_base_alone(
    base: Path, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "stage=sft", f"model.path={base}", "lora=lora", *SMALL)
    train(tmp_path / "reward", "stage=reward", "stage.normalize_prompts=0", f"model.path={base}",
          "lora=lora", *SMALL)  # fmt: skip
    adapter = tmp_path / "run" / "final"
    recorded = json.loads((adapter / "dpo_run.json").read_text())[BASE]
    ways = {
        "export": ("stage=export", f"model.path={adapter}"),
        "merged": ("stage=sft", f"model.path={adapter}", *SMALL[1:]),
        "continued": ("stage=sft", f"model.path={adapter}", "lora=lora", *SMALL),
        "sampled": ("stage=sample", f"model.path={adapter}", "stage.max_new_tokens=2"),
        "evaluated": ("stage=evaluate", f"stage.policies=[{adapter}]", "stage.max_new_tokens=2"),
        "rated": ("stage=evaluate", f"stage.policies=[{good}]", "stage.max_new_tokens=2",
                  "reward_fn=reward_model", f"reward_fn.path={tmp_path / 'reward'}"),
        "a reference": ("stage=dpo", f"model.path={base}", f"stage.reference={adapter}",
                        "lora=lora", *SMALL),
    }  # fmt: skip
    change(base)
    told = {refused(tmp_path / name, *words) for name, words in ways.items()}
    assert len(told) == 1
    assert told.pop()[0] == recorded[:12]
    train(tmp_path / "export", *ways["export"], ALLOWED, "logger.progress=plain")
    assert DIFF.search(capsys.readouterr().err)
    moved = shutil.copytree(good, tmp_path / "elsewhere")
    facts = json.loads((adapter / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = str(moved)
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    train(tmp_path / "moved", *ways["export"])  # what counts is the content
    (moved / "config.json").write_text(
        (moved / "config.json").read_text().replace('"rms_norm_eps": 1e-', '"rms_norm_eps": 3e-')
    )
    refused(tmp_path / "again", *ways["export"])


def test_an_adapter_that_does_not_say_is_used(base: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "stage=sft", f"model.path={base}", "lora=lora", *SMALL)
    (tmp_path / "run" / "final" / "dpo_run.json").unlink()
    change(base)
    train(tmp_path / "export", "stage=export", f"model.path={tmp_path / 'run'}")
    weights = load_file(tmp_path / "export" / "final" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
