"""Whatever the texts of a run hold, it finishes, and can be resumed and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_cli.config.literals import as_override
from dpo_cli.errors import ConfigError
from dpo_cli.report.page_read import read_folder
from dpo_cli.run import run as execute
from dpo_cli.workflow.child import run_child
from small_runs import configure, train

# Ends of lines to str.splitlines, controls, a mark that turns text around.
TEXT = "a\nb\rc\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\u2028j\u2029k\x1bl\x07m\u202en'\"\\${o}\x00p"
NAME = TEXT.replace("\x00", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, all of whose free texts are of that kind."""
    folder = tmp_path_factory.mktemp("runs") / f"run {NAME}"
    free = [as_override(key, NAME) for key in ("logger.wandb_project", "model.name")]
    words = ("stage=sft", "train.max_steps=1", "logger.plots=true", *free)
    train(folder, *words)
    train(folder, *words, "resume=true")
    return folder


def test_a_run_finishes_and_is_resumed(run: Path) -> None:
    assert json.loads((run / "summary.json").read_text())["stage"] == "sft"
    assert (run / "report.html").is_file()
    assert (run / "final" / "README.md").is_file()
    assert len((run / "command.txt").read_text(encoding="utf-8").splitlines()) == 2
    assert len(read_folder(run).commands) == 2


def test_its_rows_and_other_stages_finish(run: Path, tmp_path: Path) -> None:
    rows = tmp_path / f"rows {NAME.replace('/', '')}.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{i}{TEXT} ", "chosen": f"good {TEXT}", "rejected": f"bad {i}"})
            + "\n"
            for i in range(16)
        )
    )
    rated = ("stage.max_new_tokens=2", "reward_fn=length", "stage.prompts=2")
    data = ("data=jsonl", as_override("data.path", str(rows)), "data.eval_rows=4",
            "data.max_length=128")  # fmt: skip
    model = ("model=custom", as_override("model.path", str(run)))
    evaluated, dpo = tmp_path / f"evaluated {NAME}", tmp_path / "dpo"
    start(dpo, "stage=dpo", "train.max_steps=1", "train.sample_prompts=1", *data, *model)
    policies = as_override("stage.policies", [str(run), str(dpo)])
    start(evaluated, "stage=evaluate", policies, *rated, *data)
    assert len(read_folder(evaluated).points) == 2
    start(tmp_path / "f", "stage=frontier", as_override("stage.evaluations", [str(evaluated)]))
    start(tmp_path / "export", "stage=export", *model)


def start(folder: Path, *words: str) -> None:
    common = ("hardware=cpu", "logger.progress=off", as_override("run_dir", str(folder)))
    execute(configure(*common, *words), ["dpo-run", *words])


def test_a_folder_whose_name_is_no_text_is_refused_before_anything_is_done() -> None:
    for key in ("run_dir", "cache_dir", "model.path", "logger.wandb_project"):
        with pytest.raises(ConfigError, match=f"{key}: is not valid UTF-8"):
            configure(as_override(key, "a\udcff"))


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_text_that_no_process_can_be_given_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="not allowed in arguments"):
        run_child([f"vars.x={text}"])
