"""Ways in which a command used to do something else than what was typed."""

import json

import pytest

from dpo_cli.errors import ConfigError
from dpo_cli.run_folder import check_free
from dpo_cli.workflow.state import outside_files
from small_runs import TINY, configure, train


def test_the_tiny_models_rate_is_for_weights_from_scratch(tmp_path):
    (tmp_path / "config.json").touch()
    assert configure("stage=dpo").optim.lr == pytest.approx(1e-4)
    assert configure("stage=dpo", f"model.path={tmp_path}").optim.lr == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.hub_id=a/b",), r"model\.hub_id=a/b: has no effect with model=tiny"),
        (("stage=dpo", "stage.loss=dpo"), "is called sigmoid"),
        (("stage=evaluate", "data=hh"), r"reward_fn=sentiment: rates the reviews of"),
    ],
)
def test_refused_with_a_remedy(words, message):
    with pytest.raises(ConfigError, match=message):
        configure(*words)


@pytest.fixture
def failed(tmp_path):
    """A run folder whose run failed before it did anything."""
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    for name in ("config.yaml", "command.txt", "versions.json", "metrics.jsonl"):
        (folder / name).touch()
    return folder


def test_a_failed_start_gives_its_folder_back(failed):
    before = sorted(failed.rglob("*"))
    check_free(failed, resume=False)
    assert sorted(failed.rglob("*")) == before  # nothing goes before the folder is locked


@pytest.mark.parametrize("name", ["summary.json", "final", "checkpoints", "notes.txt"])
def test_a_folder_with_anything_else_is_kept(failed, name):
    (failed / name).mkdir()
    with pytest.raises(ConfigError, match="not empty"):
        check_free(failed, resume=False)
    assert (failed / name).exists()


def test_a_folder_with_metrics_is_kept(failed):
    (failed / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="not empty"):
        check_free(failed, resume=False)


def test_a_recipe_sees_changed_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    digests = []
    for text in ("one", "two"):
        path.write_text(text)
        digests.append(outside_files([f"data.path={path}", "seed=1"], tmp_path / "run"))
    assert digests[0].keys() == digests[1].keys() == {str(path)}
    assert digests[0] != digests[1]
    assert outside_files([f"data.path={path}"], tmp_path) == {}  # the recipe's own files


@pytest.mark.slow
def test_a_sweep_over_a_group(cli, tmp_path):
    """Keys that only the swept options have must not be looked for in the default ones."""
    train(tmp_path / "sft", "stage=sft", "train.max_steps=1")
    path = tmp_path / "rows.jsonl"
    turns = [f"\n\nHuman: hello {i}\n\nAssistant:" for i in range(20)]
    rows = [{"prompt": t, "chosen": f"{t} yes", "rejected": f"{t} no"} for t in turns]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    small = [w for w in TINY if w.startswith(("train.", "hardware", "logger"))]
    done = cli("-m", "stage=dpo", f"model.path={tmp_path / 'sft'}", "data=jsonl,hh",
               f"data.path={path}", "data.max_length=64", "data.max_prompt_length=32",
               "train.max_steps=1", "data.eval_rows=2", *small)  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert len(list(tmp_path.glob("runs/sweep-*/[01]/summary.json"))) == 2
